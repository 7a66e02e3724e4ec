"""Figures as PNG files: no display, no global state. The curves of a training run, and what other figures are drawn with."""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hbll_seq.utils.atomic import atomic_write
from hbll_seq.utils.console import printable, say
from hbll_seq.utils.reading import shorten


def plot_training_curve(
    rows: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]], path: str | os.PathLike
) -> None:
    """Cross-entropy over steps, with the validation loss of every path, and the learning rate below.

    Lines join evaluations of the same text alone: those on as many tokens as the first. Others (at the end of a run, as a
    rule, on the whole split) are diamonds.

    Args:
        rows: lines of metrics.jsonl (``step``, ``ce``, ``lr``); where a figure is null or missing, the line has a gap.
        evaluations: lines of evaluations.jsonl (``step``, ``validation``: rows of ``evaluate_paths``).
        path: the PNG file to write.

    Raises:
        OSError: it cannot be written.
    """
    draw_figure(7.0, 5.0, path, lambda figure: _training_curve(figure, rows, evaluations))


def _training_curve(figure, rows, evaluations) -> None:
    top, bottom = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (4, 1)})
    steps = [row["step"] for row in rows]
    losses = [finite_or_gap(row.get("ce")) for row in rows]
    top.plot(steps, losses, color="0.7", linewidth=0.8)
    top.plot(steps, smooth(losses), color="0.2", label="training")
    points = [(e["step"], row) for e in evaluations for row in e.get("validation", ())]
    names, sizes = (list(dict.fromkeys(row.get(key) for _, row in points)) for key in ("name", "tokens"))
    for name, shade in zip(names, _shades(len(names))):
        for size in sizes:
            curve = [(step, finite_or_gap(row.get("loss"))) for step, row in points
                     if row["name"] == name and row.get("tokens") == size]  # fmt: skip
            if not curve:
                continue
            if size == sizes[0]:
                top.plot(*zip(*curve), marker="o", markersize=3, linewidth=1, color=shade,
                         label=as_label(f"validation, {name}"))  # fmt: skip
            else:
                top.plot(*zip(*curve), marker="D", markersize=6, linestyle="none", color=shade, markeredgecolor="0.2")
    for size in sizes[1:]:
        top.plot([], [], marker="D", markersize=6, linestyle="none", color="1", markeredgecolor="0.2",
                 label=f"on {_tokens(size)} (the lines: {_tokens(sizes[0])})")  # fmt: skip
    top.set_ylabel("nats per token")
    if steps or names:
        top.legend(fontsize="small")
    bottom.plot(steps, [finite_or_gap(row.get("lr")) for row in rows], color="0.2")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")


def _tokens(size: int | None) -> str:
    return "other text" if size is None else f"{size:,} tokens"


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
    draw_figure(6.0, 4.0, path, lambda figure: _perplexity_by_depth(figure, splits))


def _perplexity_by_depth(figure, splits) -> None:
    axes = figure.subplots()
    depths = sorted({row["depth"] for rows in splits.values() for row in rows})
    for label, rows in splits.items():
        rows = sorted(rows, key=lambda row: row["depth"])
        values = [finite_or_gap(row["perplexity"]) for row in rows]
        axes.plot([row["depth"] for row in rows], values, marker="o", label=as_label(label))
    axes.set_xticks(depths)
    axes.set_xlabel("blocks on the path")
    axes.set_ylabel("perplexity per token")
    axes.grid(axis="y", color="0.9")
    axes.legend(fontsize="small")


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


def smooth(values: Sequence[float], share: float = 0.03) -> list[float]:
    """Means over a window centred on each value, so that a bend of the curve is where the data have it.

    Near an end the window narrows on both sides: a mean of the past alone would lag. At the beginning it is narrower still (a
    quarter of what lies before on either side), since losses fall there as steeply as they ever do. A missing value leaves a
    gap and does not count.

    Args:
        values: the curve, NaN where a value is missing.
        share: the window's width, as a share of the curve; at least three values.
    """
    half, smoothed = max(1, round(share * len(values) / 2)), []
    for i, value in enumerate(values):
        reach = min(half, i // 4, len(values) - 1 - i)
        window = [v for v in values[i - reach : i + reach + 1] if not math.isnan(v)]
        smoothed.append(math.nan if math.isnan(value) else sum(window) / len(window))
    return smoothed


def finite_or_gap(value: Any) -> float:
    """A figure to draw: what is null, missing or infinite is a gap."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else math.nan


def as_label(text: str) -> str:
    """A name as it is: neither a formula nor hidden (a leading underscore), nor of characters that nothing can draw."""
    text = printable(text.encode("utf-8", "backslashreplace").decode("utf-8")).replace("$", r"\$")
    return " " + text if text.startswith("_") else text


def draw_figure(width: float, height: float, path: str | os.PathLike, fill: Callable[[Any], None]) -> None:
    """A figure that ``fill`` draws, saved as :func:`save_figure` does."""
    try:
        figure = new_figure(width, height)
        fill(figure)
    except Exception as error:
        _tell(path, error)
        return
    save_figure(figure, path)


def save_figure(figure, path: str | os.PathLike) -> None:
    """Writes a PNG file, whole or not at all.

    Where Matplotlib fails (no folder for its cache, no font, a broken installation) that is said, and the figure is left out:
    the run that it shows is worth more.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        data = _png(figure)
    except Exception as error:
        _tell(path, error)
        return
    atomic_write(path, data)


def _tell(path: str | os.PathLike, error: Exception) -> None:
    say(f"warning: {os.fspath(path)} is not drawn: {type(error).__name__}: {shorten(error)}")


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # drawn as a box
        figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
