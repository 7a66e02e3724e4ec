"""The pictures of README and docs, drawn anew: ``python docs/pictures/make_pictures.py [--output FOLDER]``.

Each picture has two files, ``NAME-light.svg`` and ``NAME-dark.svg``, for pages with a light and a dark background. The
figures come from the stored results in train/results/. The same results and the same matplotlib give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.ticker import MultipleLocator

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parents[1] / "train" / "results"
sys.path.insert(0, str(HERE.parents[1] / "train" / "experiments"))  # for the words of older results

from comparisons.words import current_run  # noqa: E402

STYLE = {"svg.hashsalt": "hbll_seq", "svg.fonttype": "path", "font.family": "DejaVu Sans", "font.size": 11}


@dataclass(frozen=True)
class Theme:
    """Colours of one background."""

    name: str
    ink: str
    faint: str
    paper: str
    ours: str
    theirs: str
    other: str
    segments: tuple[str, ...]


THEMES = (
    Theme("light", ink="#24292f", faint="#57606a", paper="#ffffff", ours="#0969da", theirs="#bc4c00", other="#1a7f37",
          segments=("#0969da", "#1a7f37", "#8250df", "#bf3989")),
    Theme("dark", ink="#e6edf3", faint="#9da7b1", paper="#0d1117", ours="#58a6ff", theirs="#f0883e", other="#3fb950",
          segments=("#58a6ff", "#3fb950", "#bc8cff", "#f778ba")),
)  # fmt: skip


def arrow(axes: Axes, start, end, colour: str, *, bend: float = 0.0, width: float = 1.8, **kwargs) -> None:
    """An arrow between two points; ``bend`` curves it."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=colour, linewidth=width,
                                   connectionstyle=f"arc3,rad={bend}", shrinkA=0, shrinkB=0, **kwargs))  # fmt: skip


def box(axes: Axes, x: float, y: float, colour: str, theme: Theme, *, size: float = 0.62) -> None:
    """One step of a chain."""
    axes.add_patch(FancyBboxPatch((x - size / 2, y - size / 2), size, size, boxstyle="round,pad=0,rounding_size=0.14",
                                  facecolor=colour + "33", edgecolor=colour, linewidth=1.6))  # fmt: skip


def tree_and_segments(theme: Theme) -> plt.Figure:
    """Backpropagation's one chain, the same chain cut into segments, and the binary tree of the paper."""
    figure = plt.figure(figsize=(10, 4.9))
    left = figure.add_axes((0.0, 0.0, 0.60, 1.0), xlim=(-0.4, 17.9), ylim=(-1.15, 13.8))
    right = figure.add_axes((0.62, 0.0, 0.38, 1.0), xlim=(-0.6, 8.6), ylim=(-1.15, 13.8))
    for axes in (left, right):
        axes.set_axis_off()
    _one_chain(left, theme)
    _segments(left, theme)
    _tree(right, theme)
    return figure


def _one_chain(axes: Axes, theme: Theme) -> None:
    axes.text(0, 13.0, "Backpropagation: one chain, there and back", color=theme.ink, weight="bold", fontsize=12.5)
    xs = [0.4 + 1.1 * i for i in range(16)]
    for x in xs:
        box(axes, x, 10.5, theme.theirs, theme)
    arrow(axes, (xs[0] - 0.3, 11.6), (xs[-1] + 0.3, 11.6), theme.theirs)
    arrow(axes, (xs[-1] + 0.3, 9.4), (xs[0] - 0.3, 9.4), theme.theirs, linestyle=(0, (5, 2)))
    axes.text(0, 8.25, "N steps or blocks forward, N back, one after the other", color=theme.faint, fontsize=11)


def _segments(axes: Axes, theme: Theme) -> None:
    axes.text(0, 6.35, "Here: segments, walked side by side", color=theme.ink, weight="bold", fontsize=12.5)
    ends = []
    for s, colour in enumerate(theme.segments):
        xs = [0.4 + 4.55 * s + 1.02 * i for i in range(4)]
        for x in xs:
            box(axes, x, 3.3, colour, theme)
        arrow(axes, (xs[0] - 0.3, 4.25), (xs[-1] + 0.3, 4.25), colour)
        arrow(axes, (xs[-1] + 0.3, 2.35), (xs[0] - 0.3, 2.35), colour, linestyle=(0, (4, 2)))
        ends.append((xs[0] - 0.3, xs[-1] + 0.3))
    for (_, end), (begin, _) in zip(ends, ends[1:]):
        arrow(axes, (end - 0.15, 4.6), (begin + 0.15, 4.6), theme.ink, bend=-0.75, width=1.3)
        arrow(axes, (begin + 0.15, 2.0), (end - 0.15, 2.0), theme.ink, bend=-0.75, width=1.3)
    axes.text(0, 0.45, "K + 1 short walks forward, M + 1 back, joined by one scan;\neach step learns from a loss of its own",
              color=theme.faint, fontsize=11, va="top", linespacing=1.4)  # fmt: skip


def _tree(axes: Axes, theme: Theme) -> None:
    """The tree of N = 8, and two of the networks that one model holds."""
    axes.text(-0.35, 13.0, "One tree, every depth", color=theme.ink, weight="bold", fontsize=12.5)
    heights = {4: 10.9, 2: 9.2, 6: 9.2, 1: 7.5, 3: 7.5, 5: 7.5, 7: 7.5}
    for parent, children in ((4, (2, 6)), (2, (1, 3)), (6, (5, 7))):
        for child in children:
            axes.plot([parent, child], [heights[parent], heights[child]], color=theme.faint, linewidth=1.4, zorder=1)
    circle = dict(boxstyle="circle,pad=0.28", facecolor=theme.paper, edgecolor=theme.ours, linewidth=1.6)
    for n, y in heights.items():
        axes.text(n, y, f"$z_{n}$", color=theme.ink, ha="center", va="center", fontsize=12, zorder=3, bbox=circle)
    paths = ((5.0, (4,), "depth 1"), (3.0, (2, 4), "depth 2"), (1.0, (1, 2, 3, 4, 5, 6, 7), "depth 7"))
    for (y, path, label), colour in zip(paths, (theme.segments[3], theme.segments[2], theme.segments[0])):
        stops = (0, *path, 8)
        for i, j in zip(stops, stops[1:]):
            arrow(axes, (i + 0.14, y), (j - 0.14, y), colour, bend=-0.14 if j - i > 1 else 0.0, width=1.5)
        for n in range(9):
            axes.plot([n], [y], "o", markersize=6.5 if n in stops else 3,
                      color=colour if n in stops else theme.faint, zorder=3)  # fmt: skip
        axes.text(-0.35, y - 0.42, label, color=colour, fontsize=10.5, va="top")
    axes.text(0, 5.55, "x", color=theme.ink, fontsize=11, ha="center", va="bottom")
    axes.text(8, 5.55, "y", color=theme.ink, fontsize=11, ha="center", va="bottom")


# ---------------------------------------------------------------------------------------------------------- perplexity


MIX = "depth_mix=octaves,paths=prefix,exit_rank=16"
METHODS = {
    "exact": "sweeps:forward=1,backward=1,chunk_size=4",
    "alone": "sweeps:forward=1,backward=0,chunk_size=4,linearization=zero",
}


def perplexities(runs: list[dict], name: str, lr: float | None = None) -> dict[int, list[float]]:
    """Test perplexity by depth of the runs of one method at one learning rate (None: the one that most seeds have)."""
    runs = [run for run in runs if run["method"] == name]
    if runs and lr is None:
        rates = [run["lr"] for run in runs]
        lr = max(sorted(set(rates)), key=rates.count)
    found: dict[int, list[float]] = {}
    for run in sorted((run for run in runs if run["lr"] == lr), key=lambda run: run["seed"]):
        for row in run["test"]:
            found.setdefault(row["depth"], []).append(row["perplexity"])
    return found


def perplexity_by_depth(theme: Theme) -> plt.Figure:
    """One model at all its depths, beside backprop: with the same mix, and one model for each depth."""
    apart, mixed = (
        [current_run(run, "depth") for run in json.loads((RESULTS / name).read_text(encoding="utf-8"))["runs"]]
        for name in ("compare.json", "compare-engine-octaves.json")
    )
    figure, axes = plt.subplots(figsize=(8, 4.3), layout="constrained")
    separate = {}
    for depth in range(1, 8):
        separate |= perplexities(apart, f"backprop-{depth}")
    of_mix = {kind: perplexities(mixed, f"{method},{MIX}") for kind, method in METHODS.items()}
    curves = (
        ("backprop, seven models, one for each depth", separate, theme.theirs, "s", "none"),
        ("backprop with the mix octaves, one model", perplexities(mixed, f"backprop:{MIX}"), theme.other, "^", (0, (5, 2))),
        ("segments alone with this mix, one model", of_mix["alone"], theme.faint, "v", (0, (1, 1))),
        ("exact segments with this mix, one model", of_mix["exact"], theme.ours, "o", "-"),
    )
    for label, values, colour, marker, line in curves:
        if not values:
            continue
        depths = sorted(values)
        means = [sum(values[d]) / len(values[d]) for d in depths]
        axes.plot(depths, means, marker=marker, linestyle=line, color=colour, markersize=8, linewidth=2.2, label=label)
        for d in depths:  # of all seeds, where there are several
            axes.vlines(d, min(values[d]), max(values[d]), color=colour, linewidth=5, alpha=0.35)
    _dress(axes, theme)
    return figure


def _dress(axes: Axes, theme: Theme) -> None:
    axes.set_facecolor("none")
    axes.set_xlabel("blocks run", color=theme.ink)
    axes.set_ylabel("test perplexity per token", color=theme.ink)
    axes.yaxis.set_major_locator(MultipleLocator(5))
    axes.tick_params(colors=theme.ink, length=0)
    axes.grid(axis="y", color=theme.faint, alpha=0.3, linewidth=0.8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(theme.faint)
    axes.legend(frameon=False, labelcolor=theme.ink, loc="upper right", fontsize=11)


PICTURES: dict[str, Callable[[Theme], plt.Figure]] = {
    "tree-and-segments": tree_and_segments,
    "perplexity-by-depth": perplexity_by_depth,
}


def make_all(folder: Path, kind: str = "svg") -> list[Path]:
    """Draws every picture for both backgrounds into a folder, which is made where it is missing; the files' paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(STYLE):
        for name, draw in PICTURES.items():
            for theme in THEMES:
                figure = draw(theme)
                written.append(folder / f"{name}-{theme.name}.{kind}")
                opaque = {} if kind == "svg" else {"facecolor": theme.paper}  # a svg shows the page behind it
                dated = {"metadata": {"Date": None}} if kind == "svg" else {}
                figure.savefig(written[-1], transparent=kind == "svg", dpi=110, **opaque, **dated)
                plt.close(figure)
    return written


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the files (default: the script's own)")
    parser.add_argument("--kind", choices=("svg", "png"), default="svg", help="png: to look at (default: svg)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    args = parse(None)
    print(*make_all(args.output, args.kind), sep="\n")
