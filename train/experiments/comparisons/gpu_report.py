"""What ``gpu.py`` stores, prints and draws. A row is a measured cell, or one that failed and says why in ``reason``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from comparisons.gpu_cells import FORMS, Cell, Form
from hbll_seq.training.plots import new_figure, save_figure
from hbll_seq.utils.atomic import atomic_write

Row = dict[str, Any]
STYLES = {"plain": "-", "CUDA graph": "--", "compiled blocks": "-.", "compiled blocks, CUDA graph": ":"}
#: figure -> kind, size along the axis, its words, size that each panel has its own of
FIGURES = {
    "step-time-by-blocks.png": ("depth", "blocks", "blocks", "width"),
    "step-time-by-steps.png": ("time", "steps", "N, steps of a sequence", "batch"),
}


class Stored:
    """The file of results: written whole after every cell.

    Args:
        path: of the JSON file.
        setting: what the numbers hold for; None takes what the file says.

    Raises:
        ValueError: the file is of another setting, or no file of results; with ``setting=None`` there is none.
    """

    def __init__(self, path: Path, setting: dict[str, Any] | None):
        self.path, self.rows = path, dict[str, Row]()
        self.setting = None if setting is None else json.loads(json.dumps(setting))  # tuples as JSON has them
        if path.exists():
            self._load()
        elif setting is None:
            raise ValueError(f"there is no results file {path}: leave --report-only out to make it, or give --output")

    def _load(self) -> None:
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            stored, rows = dict(data["setting"]), {row["cell"]: dict(row) for row in data["cells"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} holds no results of this script: choose another --name, or remove it") from error
        given = stored if self.setting is None else self.setting
        differ = [f"{key} {stored.get(key)!r}, here {value!r}" for key, value in given.items() if stored.get(key) != value]
        if differ:
            raise ValueError(f"{self.path} is of another setting ({'; '.join(differ)}): choose another --name, or remove it")
        self.setting, self.rows = stored, rows

    def add(self, row: Row) -> None:
        """Stores a row at once."""
        self.rows[row["cell"]] = row
        self._save()

    def drop_failed(self) -> None:
        """Forgets the rows that failed, so that they are measured again."""
        self.rows = {name: row for name, row in self.rows.items() if "reason" not in row}
        if self.path.exists():
            self._save()

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        data = {"setting": self.setting, "cells": list(self.rows.values())}
        atomic_write(self.path, json.dumps(data, indent=1) + "\n")

    def measured(self, cells: Iterable[Cell]) -> list[tuple[Cell, Row]]:
        """Those of the cells that have a time, with their rows."""
        found = ((cell, self.rows.get(cell.name, {})) for cell in cells)
        return [(cell, row) for cell, row in found if "median_ms" in row]


def line_of(row: Row) -> str:
    """A row to read."""
    if "reason" in row:
        return f"{row['cell']}: not measured: {row['reason']}"
    low, high = row["spread_ms"]
    line = f"{row['cell']}: {row['median_ms']:.3f} ms ({low:.3f} .. {high:.3f}, {row['repeats']} repeats)"
    if row["peak_mib"] is not None:
        line += f", peak {row['peak_mib']:,.0f} MiB"
    if "tokens_per_second" in row:
        line += f", {row['tokens_per_second']:,.0f} tokens/s"
    if "loss_difference" in row:
        line += f", off the plain step by {row['loss_difference']:.1g}"
    return line


def summary(stored: Stored, cells: Sequence[Cell]) -> list[str]:
    """For each shape the fastest form of backprop, of ours, and their ratio."""
    sides: dict[str, dict[str, tuple[float, str]]] = {}
    for cell, row in stored.measured(cells):
        side = next((form.side for form in FORMS.get(cell.kind, ()) if form.name == cell.form), None)
        if side in ("backprop", "ours"):
            found = sides.setdefault(cell.group, {})
            found[side] = min(found.get(side, (row["median_ms"], cell.form)), (row["median_ms"], cell.form))
    lines = []
    for group, found in sides.items():
        if len(found) == 2:
            (backprop, of_backprop), (ours, of_ours) = found["backprop"], found["ours"]
            lines.append(f"{group}: backprop {backprop:.3f} ms ({of_backprop}), ours {ours:.3f} ms ({of_ours}): "
                         f"{backprop / ours:.2f} times as fast")  # fmt: skip
    return lines


def draw(folder: Path, stored: Stored, cells: Sequence[Cell]) -> None:
    """The figures: time of a float32 step by blocks with a panel for each width, and by N with one for each batch size."""
    for name, (kind, along, words, panel) in FIGURES.items():
        rows = [(c, r) for c, r in stored.measured(cells) if c.kind == kind and c.precision == "float32"]
        if not rows:
            continue
        lengths = {v: len({c.size(along) for c, _ in rows if c.size(panel) == v}) for v in {c.size(panel) for c, _ in rows}}
        values = sorted(v for v, n in lengths.items() if n > 1 or n == max(lengths.values()))  # one point is no line
        n_columns = min(2, len(values))
        n_rows = -(-len(values) // n_columns)
        figure = new_figure(5.5 * n_columns + 1.0, 3.6 * n_rows + 1.4)
        all_axes = figure.subplots(n_rows, n_columns, squeeze=False).flatten()
        handles: dict[str, Any] = {}
        ticks = sorted({cell.size(along) for cell, _ in rows})  # also of a panel that a stop has left without some of them
        for axes, value in zip(all_axes, values):
            handles |= _panel(axes, [(c, r) for c, r in rows if c.size(panel) == value], kind, along)
            axes.set_title(f"{panel} {value}", fontsize="medium")
            axes.set_xscale("log")
            axes.set_xticks(ticks, [str(n) for n in ticks])
            axes.set_xticks([], minor=True)
            axes.set_xlabel(words)
        for axes in all_axes[len(values) :]:
            axes.remove()
        setting = stored.setting
        figure.suptitle(f"{setting['device']}, torch {setting['torch']}: forward and backward, float32", fontsize="medium")
        in_order = [form.name for form in FORMS[kind] if form.name in handles]
        figure.legend([handles[name] for name in in_order], in_order, loc="outside lower center", ncols=2,
                      fontsize="small", handlelength=3.5)  # fmt: skip
        save_figure(figure, folder / name)


def _panel(axes, rows: Sequence[tuple[Cell, Row]], kind: str, along: str) -> dict[str, Any]:
    """One line for each form that has a time here; returns them by name."""
    forms: list[Form] = FORMS[kind]
    bases = list(dict.fromkeys(form.base for form in forms))
    lines = {}
    for form in forms:
        points = sorted((cell.size(along), row["median_ms"]) for cell, row in rows if cell.form == form.name)
        if points:
            marker = {"backprop": "o", "ours": "s"}.get(form.side, "x")
            (lines[form.name],) = axes.plot(*zip(*points), STYLES[form.way], marker=marker, markersize=4,
                                            color=f"C{bases.index(form.base)}")  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("milliseconds a step")
    axes.grid(color="0.9")
    return lines
