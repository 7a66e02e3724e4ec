"""Figures of comparisons. ``runs`` is a method's name -> its runs at its learning rate, one per seed."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hbll_seq.training.plots import as_label, draw_figure, finite_or_gap, new_figure, save_figure

Runs = Mapping[str, Sequence[Mapping[str, Any]]]


# ------------------------------------------------------------------------------------------------------------ over depth


def plot_depth(path: str | os.PathLike, runs: Runs, metric: str) -> None:
    """The test figure by depth, and validation of the deepest path over steps and over work.

    Args:
        path: the PNG file to write.
        runs: methods named ``backprop-N`` are models of one depth each and are drawn as one line.
        metric: ``"perplexity"`` or ``"accuracy"``, the name of the figure.

    Raises:
        OSError: it cannot be written.
    """
    draw_figure(13.0, 4.2, path, lambda figure: _fill_depth(figure, runs, metric))


def _fill_depth(figure, runs: Runs, metric: str) -> None:
    by_depth, by_step, by_work = figure.subplots(1, 3)
    deepest = _draw_by_depth(by_depth, runs, metric)
    _draw_curves(by_step, by_work, runs, f"depth {deepest}")
    for axes in (by_step, by_work):
        axes.set_ylabel(f"validation {metric}, {deepest} blocks")
        if metric == "perplexity":
            axes.set_yscale("log")
            for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                which("{x:.0f}")
    for axes in (by_depth, by_step, by_work):
        axes.grid(axis="y", color="0.9")
        if axes.has_data():
            axes.legend(fontsize="small")


def _draw_by_depth(axes, runs: Runs, metric: str) -> int:
    """Returns the greatest depth."""
    points: dict[str, list[tuple[int, float]]] = {}
    for name, of_method in runs.items():
        single = name.startswith("backprop-") and name != "backprop-mix"
        label = "backprop, a model per depth" if single else name
        rows = (row for run in of_method for row in run["test"])
        points.setdefault(label, []).extend((row["depth"], finite_or_gap(row[metric])) for row in rows)
    for (label, values), marker in zip(points.items(), itertools.cycle("os^vDP*X")):
        depths = sorted({depth for depth, _ in values})
        means = [_mean([y for x, y in values if x == depth]) for depth in depths]
        (line,) = axes.plot(depths, means, label=as_label(label))
        axes.plot(*zip(*values), marker, color=line.get_color(), markersize=4)
    depths = sorted({depth for values in points.values() for depth, _ in values})
    axes.set_xticks(depths)
    axes.set_xlabel("blocks on the path")
    axes.set_ylabel(f"test {metric}")
    return depths[-1]


def _draw_curves(by_step, by_work, runs: Runs, row_name: str) -> None:
    for name, of_method in runs.items():
        first = of_method[0]
        curve = [(step, finite_or_gap(row[row_name])) for step, row in first["evaluations"] if row_name in row]
        if curve:
            steps, values = zip(*curve)
            marker = "o" if len(steps) == 1 else None  # a line of one point shows nothing
            by_step.plot(steps, values, marker=marker, label=as_label(name))
            by_work.plot([step * first["work"] for step in steps], values, marker=marker, label=as_label(name))
    by_step.set_xlabel("steps")
    by_work.set_xlabel("block evaluations of training")
    by_work.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# ------------------------------------------------------------------------------------------------------------- over time


def plot_time(path: Path, runs: Runs, metric: str) -> None:
    """Validation figure over steps and over seconds, first seed of each method; processor seconds where they are stored."""
    figure = new_figure(10.0, 4.2)
    by_step, by_second = figure.subplots(1, 2)
    for name, of_method in runs.items():
        run = of_method[0]
        curve = run["evaluations"]
        if not curve:  # a run shorter than one evaluation
            continue
        steps, values = zip(*curve)
        per_step = run.get("step_seconds") or run["seconds"] / run["curve"][-1][0]
        marker = "o" if len(steps) == 1 else None  # a line of one point shows nothing
        by_step.plot(steps, values, marker=marker, label=name)
        by_second.plot([step * per_step for step in steps], values, marker=marker, label=name)
    for axes, label in ((by_step, "steps"), (by_second, "seconds of training")):
        axes.set_xlabel(label)
        axes.set_ylabel(f"validation {metric}")
        axes.grid(axis="y", color="0.9")
    if not by_second.has_data():
        by_second.set_title("no evaluation before the end", fontsize="small")
    else:
        by_second.legend(fontsize="x-small", loc="best")
    save_figure(figure, path)


# ---------------------------------------------------------------------------------------------------------------- speed

COLORS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "C9")  # of ours; the grey among them is the published curve's
#: speed-up of HBLL-RNN over BPTT as published (arXiv 2606.21497): GPU, unfused GRU, H = 2048, bf16
PUBLISHED = dict(zip((2, 4, 8, 16, 32, 64, 128, 256), (0.47, 0.28, 0.39, 0.37, 0.86, 1.67, 2.58, 3.6)))
Curve = tuple[str, Sequence[tuple[int, float | None]]]


def plot_speedups(path: Path, panels: Mapping[str, Mapping[str, Curve]], title: str) -> None:
    """Speed-up over BPTT by the number of steps, a panel for each batch size, beside the paper's published curve.

    Args:
        path: the PNG file to write.
        panels: title -> label -> what it is ("ours", or a baseline's kind) and its points; None where it was not timed.
        title: of the figure.
    """
    n_columns = min(2, len(panels))
    n_rows = -(-len(panels) // n_columns)
    figure = new_figure(5.5 * n_columns, 3.6 * n_rows + 1.0)
    all_axes = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, (name, curves) in zip(all_axes, panels.items()):
        _draw_speedups(axes, curves)
        axes.set_title(name, fontsize="medium")
    for axes in all_axes[len(panels) :]:
        axes.remove()
    figure.suptitle(title, fontsize="medium")
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=n_columns, fontsize="x-small")
    save_figure(figure, path)


def _draw_speedups(axes, curves: Mapping[str, Curve]) -> None:
    colors = itertools.cycle(COLORS)
    for label, (kind, points) in curves.items():
        color = next(colors) if kind == "ours" else "black"
        style = {"ours": "-", "fused": "--"}.get(kind, ":")
        steps, ratios = [n for n, _ in points], [ratio for _, ratio in points]
        axes.plot(steps, ratios, style, color=color, marker="o", markersize=3, label=label)
    axes.plot(PUBLISHED.keys(), PUBLISHED.values(), color="0.6", linewidth=3, zorder=1,
              label="published: the paper's HBLL-RNN (GPU, GRU, H = 2048, batch 128, bf16)")  # fmt: skip
    axes.axhline(1.0, color="0.3", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("N, steps of a sequence")
    axes.set_ylabel("speed-up over explicit BPTT")
    axes.grid(color="0.9")


# --------------------------------------------------------------------------------------------- accuracy-span trade-off

ROUNDING = 1e-6  # below it two gradients differ by rounding alone


def plot_trade_off(path: Path, models: Sequence[dict], variants: Sequence[str]) -> None:
    """A row per model: the grid of forward and backward iterations on the left, the forward parts by span on the right.

    Colours and the right axis are of 1 - cosine on a logarithmic scale: most of what is to be told apart is above 0.9.

    Args:
        path: the PNG file to write.
        models: what ``tradeoff.py`` measured.
        variants: labels of the forward parts; the first has the grid.
    """
    figure = new_figure(12.0, 4.4 * len(models))
    for (left, right), measured in zip(figure.subplots(len(models), 2, squeeze=False), models):
        _draw_grid(figure, left, measured, variants[0])
        _draw_spans(right, measured, variants)
    save_figure(figure, path)


def _draw_grid(figure, axes, measured: dict, variant: str) -> None:
    from matplotlib.colors import LogNorm

    size = measured["n_blocks"]
    grid = [[1.0] * size for _ in range(size)]
    for row in measured["rows"]:
        if row["variant"] == variant:
            grid[row["forward"]][row["backward"]] = max(ROUNDING, 1 - row["cosine"])
    image = axes.imshow(grid, norm=LogNorm(ROUNDING, 1), origin="lower", cmap="viridis_r", aspect="auto")
    figure.colorbar(image, ax=axes, label="1 - cosine", extend="min")
    if size < 10:  # in more cells the numbers could not be read
        for k, m in itertools.product(range(size), repeat=2):
            shade = "white" if grid[k][m] > 1e-3 else "black"  # the middle of the colours
            axes.text(m, k, f"{1 - grid[k][m]:.4f}", ha="center", va="center", fontsize="small", color=shade)
    axes.set_xlabel("backward iterations M")
    axes.set_ylabel("forward iterations K")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_title(f"{measured['name']}: cosine to backprop's gradient", fontsize="medium")


def _draw_spans(axes, measured: dict, variants: Sequence[str]) -> None:
    size = measured["n_blocks"]
    for (i, label), marker in zip(enumerate(variants), "os^Dv"):
        rows = [row for row in measured["rows"] if row["variant"] == label and row["backward"] == size - 1]
        # V-cycles of a small tree soon cost far more than the chain itself.
        points = [(row["forward_span"], max(ROUNDING, 1 - row["cosine"])) for row in rows if row["forward_span"] <= 2 * size]
        axes.plot(*zip(*points), marker=marker, markersize=5, linewidth=1.2, label=label, zorder=2 if i else 3)
    axes.axvline(size, color="0.6", linestyle="--", linewidth=1, label=f"plain chain, exact ({size} blocks)")
    axes.set_yscale("log")
    axes.set_ylim(ROUNDING / 2, 3)
    axes.set_xlabel("span of the forward part (block calls one after the other)")
    axes.set_ylabel(f"1 - cosine (lower is closer; {ROUNDING:g}: or less)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(f"{measured['name']}: forward parts at M = {size - 1}", fontsize="medium")
    axes.grid(color="0.9")
    axes.legend(fontsize="small", loc="upper right")
