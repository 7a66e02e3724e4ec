"""Tables and figures of ``bench_parallel.py`` and ``bench_sequence.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from hbll_seq.training.plots import new_figure, save_figure
from hbll_seq.utils.tables import table

MIB = 2**20
BAR = 1e-4  # by which losses of exact methods may differ from backprop's, float32
NORM_BAR = 1e-3  # by which the norms of their gradients may, as a part of it
_HEAD = ("method", "steps/s", "ratio", "least", "most", "linked", "core", "act. MiB", "ratio", "recomp.", "ratio", "w. grads",
         "ratio", "params MiB", "state MiB", "coll.", "mess.", "KiB")  # fmt: skip
_FORMATS = (
    "<",
    ">.2f",
    ">.2f",
    ">.2f",
    ">.2f",
    ">.2f",
    ">.2f",
    ">.1f",
    ">.2f",
    ">.1f",
    ">.2f",
    ">.1f",
    ">.2f",
    ">.1f",
    ">.1f",
    ">d",
    ">d",
    ">.0f",
)


def ratios(row: Mapping[str, Any], name: str = "seconds") -> list[float]:
    """Backprop's time over the method's in every round: above 1 the method is faster."""
    return [base / own for base, own in zip(row["baseline_seconds"], row[name])]


def title_of(point: Mapping[str, Any]) -> str:
    """What was trained."""
    what = f"{point['blocks']} blocks" if "blocks" in point else f"{point['context_length']} steps"
    return f"{what}, width {point['width']}, {point['ranks']} ranks"


def table_of(point: Mapping[str, Any]) -> str:
    """A line for every method; the ratios of bytes are to backprop on one process in the same form, where it was run."""
    methods = point["methods"]
    backprop = methods.get("backprop") or methods.get("bptt", {})
    lines, notes = [], []
    for name, row in methods.items():
        if "refused" in row:
            notes.append(f"{name} is refused: {row['refused']}")
            continue
        if "recompute_refused" in row:
            notes.append(f"{name} with activation checkpointing is refused: {row['recompute_refused']}")
        if row.get("idle_segments"):
            notes.append(f"{name}: no exit trains segments {row['idle_segments']}, from 0")
        speeds, linked = ratios(row), ratios(row, "linked_seconds")
        memory = []
        for bytes_of in ("activation_bytes", "recomputed_bytes", "recomputed_step_bytes"):
            most, whole = (max(found[bytes_of]) if bytes_of in found else None for found in (row, backprop))
            memory += [most and most / MIB, most / whole if most and whole else None]
        core = sum(row["baseline_processor_seconds"]) / sum(row["baseline_seconds"])
        lines.append((name, 1 / median(row["seconds"]), median(speeds), min(speeds), max(speeds),
                      median(linked) if linked else None, core, *memory, max(row["parameter_bytes"]) / MIB,
                      max(row["state_bytes"]) / MIB, max(row["collectives"]), max(row["messages"]),
                      max(row["bytes"]) / 1024))  # fmt: skip
    link = f", linked: {point['link'][0]:g} ms and {point['link'][1]:g} Gb/s" if point["link"] else ""
    title = f"{title_of(point)}; ratio: to backprop on one process{link}"
    return "\n".join([title, table(_HEAD, lines, _FORMATS), *notes])


def lines_of_agreement(point: Mapping[str, Any]) -> list[str]:
    """Whether the losses of exact methods are backprop's after some steps."""
    lines = []
    for name, row in point["methods"].items():
        if row.get("exact") and "loss_difference" in row:
            loss, norm = row["loss_difference"], row.get("norm_difference", 0.0)  # older rows have no norms
            agrees = "agrees with" if loss <= BAR and norm <= NORM_BAR else "DIFFERS FROM"
            told = f", norm of the gradient by {norm:.1e} of it" if "norm_difference" in row else ""
            lines.append(f"{name}: {agrees} backprop after {len(row['losses'])} steps (loss by {loss:.1e}{told})")
    return lines


def plot(points: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Speed over backprop on one process, with its spread, and the activations of a rank; a row for each point."""
    figure = new_figure(12.0, 1.0 + 4.0 * len(points))
    for (left, right), point in zip(figure.subplots(len(points), 2, squeeze=False), points):
        rows = {name: row for name, row in point["methods"].items() if "refused" not in row}
        places, middle = list(range(len(rows))), [median(ratios(row)) for row in rows.values()]
        spread = [[m - min(ratios(row)) for m, row in zip(middle, rows.values())],
                  [max(ratios(row)) - m for m, row in zip(middle, rows.values())]]  # fmt: skip
        left.barh(places, middle, xerr=spread, color="C0", label="this machine's link")
        if point["link"]:
            slow = [median(ratios(row, "linked_seconds")) for row in rows.values()]
            left.barh(places, slow, height=0.4, color="C1", label=f"{point['link'][0]:g} ms, {point['link'][1]:g} Gb/s")
            left.legend(fontsize="small")
        left.axvline(1.0, color="0.3", linewidth=0.8)
        left.set_xlabel("steps per second / backprop on one process")
        for name, height, color in (("activation_bytes", 0.8, "C2"), ("recomputed_bytes", 0.4, "C3")):
            sizes = [max(row[name]) / MIB if name in row else 0.0 for row in rows.values()]
            if rows and not any(sizes):
                continue  # recurrent models are not recomputed
            right.barh(places, sizes, height=height, color=color, label=name.replace("_", " "))
        right.set_xlabel("peak activations of a rank (MiB)")
        right.legend(fontsize="small")
        for axes in (left, right):
            axes.set_yticks(places, list(rows), fontsize="small")
            axes.invert_yaxis()
        left.set_title(title_of(point), fontsize="medium")
    save_figure(figure, path)
