"""Figures of what the tree of blocks gives: quality against time of every depth, and the losses of its arcs."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.depth_dial import ms_per_token
from hbll_seq.objectives.auxiliary import segment_ends
from hbll_seq.objectives.depth_mix import sub_networks_of_step
from hbll_seq.objectives.options import DepthMix, Sweeps
from hbll_seq.training.plots import draw_figure, finite_or_gap
from hbll_seq.tree.topology import DyadicTree

#: tokens that a path is timed over, and seconds after which no further path is begun
_TOKENS, _MOST_SECONDS = 12, 5.0
#: steps over which the weights of a mix that draws its paths are averaged
_STEPS = 200
#: inner nodes of a tree whose nodes still have room for a number
_LABELLED = 31


def time_paths(model: HBLLForCausalLM, paths: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Milliseconds a token of each path, batch 1; see :func:`hbll_seq.models.depth_dial.ms_per_token`.

    Returns:
        name -> ms; a path that was not reached within seconds is missing.
    """
    found, began = {}, time.perf_counter()
    for name, path in paths.items():
        if time.perf_counter() - began > _MOST_SECONDS:
            break
        found[name] = ms_per_token(model, tuple(path), _TOKENS)
    return found


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, loss) that no other beats in both, by rising cost."""
    best, front = math.inf, []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if points[i][1] < best:
            best = points[i][1]
            front.append(i)
    return front


def plot_tradeoff(rows: Sequence[Mapping[str, Any]], ms: Mapping[str, float], path: str | os.PathLike) -> None:
    """Perplexity of every path against its time a token, with the Pareto front: paths that no other beats in both.

    Args:
        rows: of ``evaluate_paths`` (``name``, ``depth``, ``perplexity``).
        ms: milliseconds a token by name, as :func:`time_paths` measures them; a path without one is left out.
        path: the PNG file to write.

    Raises:
        OSError: it cannot be written.
    """
    points = [(ms[row["name"]], finite_or_gap(row["perplexity"]), row["depth"]) for row in rows if row["name"] in ms]
    points = [point for point in points if not math.isnan(point[1])]
    draw_figure(6.0, 4.0, path, lambda figure: _tradeoff(figure, points))


def _tradeoff(figure, points: list[tuple[float, float, int]]) -> None:
    axes = figure.subplots()
    front = [points[i] for i in pareto_front([point[:2] for point in points])]
    if front:
        axes.step([p[0] for p in front], [p[1] for p in front], where="post", color="0.6", label="Pareto front")
        axes.plot(*zip(*(point[:2] for point in points)), "o", color="C0", label="depth")
        axes.legend(fontsize="small")
    for x, y, depth in points:
        axes.annotate(str(depth), (x, y), textcoords="offset points", xytext=(6, 5))
    axes.margins(0.1)
    axes.set_xlim(left=0)
    axes.set_xlabel("milliseconds a token on this machine, batch 1")
    axes.set_ylabel("perplexity per token")
    axes.grid(color="0.92")


def exit_weights(mix: DepthMix, tree: DyadicTree, sweeps: Sweeps | None = None) -> list[float]:
    """How much the losses of the exits after each block 1 .. N - 1 weigh in a step of sweeps along the full path; of a mix
    that draws its paths, on average. With resolved ``sweeps`` their auxiliary exits count too."""
    weights, path = [0.0] * tree.n_nodes, tuple(range(1, tree.N))
    ends = segment_ends(path, sweeps.chunk_size) if sweeps is not None and sweeps.auxiliary_exits else ()
    for seed in range(_STEPS):
        main, *others = sub_networks_of_step(mix.name, mix.total_weight, tree, path, seed)
        auxiliary = {n: sweeps.auxiliary_exits for n in ends if n not in main.exits}
        for exits in (main.exits, auxiliary, *(network.exits for network in others)):
            for n, weight in exits.items():
                weights[n - 1] += weight / _STEPS
    return weights


def losses_of_nodes(rows: Sequence[Mapping[str, Any]], weights: Sequence[float], share: float = 0.1) -> list[float]:
    """The mean loss of every node over the last tenth of the lines of metrics.jsonl; empty where they do not give one each.

    Args:
        rows: lines of metrics.jsonl (``node_losses``).
        weights: of the losses, for each node; 0 where it has none, and then its loss here is 0.
        share: of the lines, that count.
    """
    n_nodes = len(weights)
    last = [row.get("node_losses") for row in rows[-max(1, math.ceil(share * len(rows))) :]]
    last = [losses for losses in last if isinstance(losses, list) and len(losses) == n_nodes]
    last = [losses for losses in last if not any(math.isnan(finite_or_gap(loss)) for loss in losses)]
    return [statistics.fmean(column) / weight if weight else 0.0 for column, weight in zip(zip(*last), weights)]


def plot_tree(tree: DyadicTree, losses: Sequence[float], objective: str, path: str | os.PathLike) -> None:
    """The tree of the blocks, each node and the two arcs through it (from its left parent, to its right parent) in the colour
    of the node's local loss.

    Args:
        tree: over the blocks.
        losses: of the nodes 1 .. N - 1, as :func:`losses_of_nodes` takes them from the run; 0: none of its own.
        objective: its name. Sweeps give a loss to blocks after which the head reads and adjoints to the others.
        path: the PNG file to write.

    Raises:
        OSError: it cannot be written.
    """
    draw_figure(7.5, 1.6 + 0.8 * (tree.n_level + 1), path, lambda figure: _tree(figure, tree, losses, objective))


def _tree(figure, tree: DyadicTree, losses: Sequence[float], objective: str) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    axes = figure.subplots()
    own = [loss for loss in losses if loss] or [0.0]
    colours = ScalarMappable(Normalize(min(own) - 1e-9, max(own) + 1e-9), colormaps["viridis"])
    colour_of = lambda loss: colours.to_rgba(loss) if loss else "0.75"
    height = {0: tree.n_level, tree.N: tree.n_level, **{n: tree.n_level - 1 - tree.level_of(n) for n in range(1, tree.N)}}
    few = tree.n_nodes <= _LABELLED
    for n, loss in enumerate(losses, 1):
        for parent in tree.parents(n):
            axes.plot([parent, n], [height[parent], height[n]], color=colour_of(loss), linewidth=2 if few else 1, zorder=1)
    for n in (0, tree.N):
        axes.plot([n], [height[n]], "s", color="0.2", markersize=9, zorder=2)
        axes.annotate("input" if n == 0 else "head", (n, height[n]), textcoords="offset points", xytext=(0, 9), ha="center")
    nodes = range(1, tree.N)
    axes.scatter(nodes, [height[n] for n in nodes], s=340 if few else 12, c=[colour_of(loss) for loss in losses], zorder=2,
                 edgecolors="white")
    for n, loss in enumerate(losses, 1) if few else ():
        dark = loss and sum(colour_of(loss)[:3]) < 1.4
        axes.annotate(str(n), (n, height[n]), ha="center", va="center", color="white" if dark else "black", zorder=3)
        axes.annotate(f"{loss:.3g}" if loss else "adjoint", (n, height[n]), textcoords="offset points", xytext=(0, -20),
                      ha="center", fontsize="small", zorder=3,
                      bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5})
    axes.set_ylim(-0.6, tree.n_level + 0.5)
    axes.axis("off")
    means = "nats a token" if objective == "sweeps" else "nats a token at the head, energy of a state elsewhere"
    axes.set_title(f"local losses of the {objective}, mean of the last tenth of the run", fontsize=10)
    figure.colorbar(colours, ax=axes, label=means, shrink=0.9)
