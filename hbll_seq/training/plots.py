"""Figures of a run as PNG files: no display, no global state."""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

from hbll_seq.atomic import atomic_write


def plot_training_curve(
    rows: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]], path: str | os.PathLike
) -> None:
    """Cross-entropy over steps, with the validation loss of every path, and the learning rate below.

    Args:
        rows: lines of metrics.jsonl (``step``, ``ce``, ``lr``).
        evaluations: lines of evaluations.jsonl (``step``, ``validation``: rows of ``evaluate_paths``).
        path: the PNG file to write.

    Raises:
        OSError: it cannot be written.
    """
    figure = new_figure(7.0, 5.0)
    top, bottom = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (4, 1)})
    steps = [row["step"] for row in rows]
    top.plot(steps, [row["ce"] for row in rows], color="0.7", linewidth=0.8)
    top.plot(steps, _smooth([row["ce"] for row in rows]), color="0.2", label="training")
    names = {row["name"]: row["depth"] for evaluation in evaluations for row in evaluation["validation"]}
    shades = dict(zip(names, _shades(len(names))))
    for name in names:
        points = [(e["step"], r["loss"]) for e in evaluations for r in e["validation"] if r["name"] == name]
        top.plot(*zip(*points), marker="o", markersize=3, linewidth=1, color=shades[name], label=f"validation, {name}")
    top.set_ylabel("nats per token")
    if steps or names:
        top.legend(fontsize="small")
    bottom.plot(steps, [row["lr"] for row in rows], color="0.2")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    save_figure(figure, path)


def plot_perplexity_by_depth(
    splits: Mapping[str, Sequence[Mapping[str, Any]]], path: str | os.PathLike
) -> None:
    """Perplexity per token against the number of blocks of the path.

    Args:
        splits: label -> rows of ``evaluate_paths`` (``depth``, ``perplexity``, ``path``).
        path: the PNG file to write.

    Raises:
        OSError: it cannot be written.
    """
    figure = new_figure(6.0, 4.0)
    axes = figure.subplots()
    depths = sorted({row["depth"] for rows in splits.values() for row in rows})
    for label, rows in splits.items():
        rows = sorted(rows, key=lambda row: row["depth"])
        axes.plot([row["depth"] for row in rows], [row["perplexity"] for row in rows], marker="o", label=label)
    axes.set_xticks(depths)
    axes.set_xlabel("blocks on the path")
    axes.set_ylabel("perplexity per token")
    axes.grid(axis="y", color="0.9")
    axes.legend(fontsize="small")
    save_figure(figure, path)


def plot_comparison(path: str | os.PathLike, runs: Mapping[str, Sequence[Mapping[str, Any]]], metric: str) -> None:
    """The sides of a comparison: the test figure by depth, and validation of the deepest path over steps and over work.

    Args:
        path: the PNG file to write.
        runs: side -> its runs, one per seed (entries of train/compare.py's results); sides named ``backprop-N`` are models
            of one depth each and are drawn as one line.
        metric: ``"perplexity"`` or ``"accuracy"``, the name of the figure.

    Raises:
        OSError: it cannot be written.
    """
    figure = new_figure(13.0, 4.2)
    by_depth, by_step, by_work = figure.subplots(1, 3)
    points: dict[str, list[tuple[int, float]]] = {}
    for side, of_side in runs.items():
        single = side.startswith("backprop-") and side != "backprop-mix"
        label = "backprop, a model per depth" if single else side
        points.setdefault(label, []).extend((row["depth"], row[metric]) for run in of_side for row in run["test"])
    for (label, values), marker in zip(points.items(), itertools.cycle("os^vDP*X")):
        depths = sorted({depth for depth, _ in values})
        (line,) = by_depth.plot(depths, [_mean(y for x, y in values if x == depth) for depth in depths], label=label)
        by_depth.plot(*zip(*values), marker, color=line.get_color(), markersize=4)
    by_depth.set_xticks(sorted({depth for values in points.values() for depth, _ in values}))
    by_depth.set_xlabel("blocks on the path")
    by_depth.set_ylabel(f"test {metric}")
    deepest = max(depth for values in points.values() for depth, _ in values)
    for side, of_side in runs.items():
        name = f"depth {deepest}"
        curve = [(step, row[name]) for run in of_side[:1] for step, row in run["evaluations"] if name in row]
        if curve:
            steps, values = zip(*curve)
            marker = "o" if len(steps) == 1 else None  # a line of one point shows nothing
            by_step.plot(steps, values, marker=marker, label=side)
            by_work.plot([step * of_side[0]["work"] for step in steps], values, marker=marker, label=side)
    by_step.set_xlabel("steps")
    by_work.set_xlabel("block evaluations of training")
    by_work.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    for axes in (by_step, by_work):
        axes.set_ylabel(f"validation {metric}, {deepest} blocks")
    for axes in (by_depth, by_step, by_work):
        if metric == "perplexity" and axes is not by_depth:
            axes.set_yscale("log")
            for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                which("{x:.0f}")
        axes.grid(axis="y", color="0.9")
        if axes.has_data():
            axes.legend(fontsize="small")
    save_figure(figure, path)


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def new_figure(width: float, height: float):
    """An empty figure of so many inches, for :func:`save_figure`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes a second; only the end of a run needs it
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _shades(count: int) -> list:
    from matplotlib import colormaps

    return [colormaps["viridis"](0.9 * i / max(1, count - 1)) for i in range(count)]


def _smooth(values: Sequence[float], weight: float = 0.95) -> list[float]:
    """Exponential moving average, corrected for its start."""
    smoothed, total, norm = [], 0.0, 0.0
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + 1 - weight
        smoothed.append(total / norm)
    return smoothed


def save_figure(figure, path: str | os.PathLike) -> None:
    """Writes a PNG file, whole or not at all. Raises OSError where it cannot be written."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    atomic_write(path, buffer.getvalue())
