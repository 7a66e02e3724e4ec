"""Tables of comparisons, and the parts that they share.

``runs`` is everywhere a method's name -> its runs at its learning rate, one per seed, as the file of results holds them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from comparisons.equal_time import TIME, WORK, Figure, at_equal_time, told_step_time, until_reached
from comparisons.results import deepest
from comparisons.statistics import told, told_paired

Runs = Mapping[str, Sequence[dict]]
#: what the sign means that ``told_step_time`` puts before a time
WALL = "s/step: processor seconds of a training step; ~ by the wall clock, of runs from before that was stored"
#: points of accuracy within which a method counts as having got where the reference did
MARGIN = 1.0


def first_lowest_last(values: Sequence[float]) -> str:
    """Of a cosine in the course of training."""
    return f"{values[0]:.3f}, {min(values):.3f}, {values[-1]:.3f}"


def cosines(of_method: Sequence[dict]) -> list[float]:
    """Of the gradient to the exact one, all seeds one after the other."""
    return [row[1] for run in of_method for row in run["alignment"]]


def paired(of_method: Iterable[dict], reference: Iterable[dict], by: Callable[[dict, dict], float]) -> list[float]:
    """A figure of each run and the reference's run of the same seed."""
    by_seed = {run["seed"]: run for run in reference}
    return [by(run, by_seed[run["seed"]]) for run in of_method if run["seed"] in by_seed]


def join(parts: Iterable[tuple[str, Sequence[str]]], missing: str) -> str:
    """``"a 1, 2; b 3"``, without methods that have no figure."""
    return "; ".join(f"{name} " + ", ".join(values) for name, values in parts if values) or missing


def join_paired(parts: Iterable[tuple[str, Sequence[float]]], form: str, missing: str) -> str:
    """The same of paired figures, with what the seeds say of their mean."""
    return "; ".join(f"{name} {told_paired(values, form)}" for name, values in parts if values) or missing


def at_equal_cost(runs: Runs, reference: str, metric: str, figure: Figure) -> list[str]:
    """Lines at equal time and at equal work; arguments: see :func:`at_equal_time`."""
    return [line for cost in (TIME, WORK) for line in at_equal_time(runs, reference, metric, figure, cost)]


# ------------------------------------------------------------------------------------------------------------ over depth


def report_depth(runs: Runs, metric: str, how: str = "") -> str:
    """The figures by depth, what they cost, the bits per token of text, and one last line with the ratio.

    Args:
        runs: methods named ``backprop-N`` are models of one depth each and share a column.
        metric: the figure's name in a row.
        how: the networks were evaluated, where that is to be told.
    """
    single, others = _columns(runs)
    depths = list(single)
    last = single[depths[-1]]
    n_seeds = max(map(len, runs.values()))
    over = f"mean and standard deviation over {n_seeds} seeds" if n_seeds > 1 else "one seed"
    lines = [f"test {metric}, {over}{how}", *rows_by_depth(runs, metric), "", *_costs(runs), ""]
    whole = {name: of_method for name, of_method in runs.items() if deepest(of_method[0], "test")["depth"] == depths[-1]}
    if shown := at_equal_cost(whole, last, metric, lambda row: row.get(f"depth {depths[-1]}")):
        lines += [*shown, ""]
    lines += _ratios_by_depth(runs, metric, single, others)
    if metric == "perplexity":
        if lines[-1]:
            lines.append("")
        lines += _bits_per_token(runs, last)

    def ratio(run: dict, reference: dict) -> float:
        return deepest(run, "test")[metric] / max(deepest(reference, "test")[metric], 1e-9)

    parts = ((name, paired(runs[name], runs.get(last, ()), ratio)) for name in others)
    lines.append(f"\nratio of {metric} on the full path to {depths[-1]}-block backprop at equal steps: "
                 + join_paired(parts, ".3f", "no run of it"))  # fmt: skip
    return "\n".join(lines)


def _columns(runs: Runs) -> tuple[dict[int, str], list[str]]:
    """The methods that are models of one depth each, by depth, which share a column; and all others."""
    depths = sorted({row["depth"] for of_method in runs.values() for run in of_method for row in run["test"]})
    single = {depth: f"backprop-{depth}" for depth in depths}
    return single, [name for name in runs if name not in single.values()]


def rows_by_depth(runs: Runs, metric: str) -> list[str]:
    """A line for each depth and one above them: a figure of the test by method."""
    single, others = _columns(runs)

    def cell(name: str, depth: int) -> str:
        rows = (row for run in runs.get(name, ()) for row in run["test"])
        return told([row[metric] for row in rows if row["depth"] == depth])

    lines = [f"{'blocks':>6}  {'backprop, own model':>19}" + "".join(f"  {name:>16}" for name in others)]
    for depth, own in single.items():
        lines.append(f"{depth:>6}  {cell(own, depth):>19}" + "".join(f"  {cell(name, depth):>16}" for name in others))
    return lines


def _costs(runs: Runs) -> list[str]:
    lines = [WALL, f"{'method':>24}  {'lr':>7}  {'seeds':>5}  {'work/step':>9}  {'s/step':>7}  cosine to the exact gradient: "
             "first, lowest, last"]  # fmt: skip
    for name, of_method in runs.items():
        found = cosines(of_method)
        shown = first_lowest_last(found) if found else ""
        alone = [row[4] for run in of_method for row in run["alignment"] if len(row) > 4]
        shown += f"; of the full path alone: {first_lowest_last(alone)}" if alone else ""
        lines.append(f"{name:>24}  {of_method[0]['lr']:>7.2g}  {len(of_method):>5}  {of_method[0]['work']:>9.1f}  "
                     f"{told_step_time(of_method, '.3f'):>7}  " + shown)  # fmt: skip
    return lines


def _ratios_by_depth(runs: Runs, metric: str, single: Mapping[int, str], others: Sequence[str]) -> list[str]:
    def at(run: dict, depth: int) -> float | None:
        return next((row[metric] for row in run["test"] if row["depth"] == depth), None)

    lines = []
    for name in others:
        ratios = {}
        for depth, own in single.items():
            both = paired(runs[name], runs.get(own, ()), lambda a, b: (at(a, depth), at(b, depth)))  # noqa: B023
            both = [ours / theirs for ours, theirs in both if ours is not None and theirs]
            if both:
                ratios[depth] = told(both, ".3f")
        if len(ratios) > 1:
            by_depth = ", ".join(f"{depth}: {ratio}" for depth, ratio in ratios.items())
            lines.append(f"{name}, ratio to the model of each depth: {by_depth}")
    return lines


def _bits_per_token(runs: Runs, last: str) -> list[str]:
    """Two lines: log2 of the perplexity on each method's deepest path by seed, and how much more that is than the method
    ``last`` has."""

    def bits(run: dict) -> float:
        return deepest(run, "test")["loss"] / math.log(2)

    own = ((name, [f"{bits(run):.4f}" for run in of_method]) for name, of_method in runs.items())
    lines = ["bits per token on each method's deepest path, by seed: " + join(own, "")]
    others = (name for name in runs if not name.removeprefix("backprop-").isdigit())
    more = ((name, paired(runs[name], runs.get(last, ()), lambda run, other: bits(run) - bits(other))) for name in others)
    return [*lines, f"bits minus {last}'s at equal steps: " + join_paired(more, "+.4f", "no run of both")]


# ------------------------------------------------------------------------------------------------------------- over time


def report_time(runs: Runs, metric: str, unit: str) -> str:
    """Figures by method, what they cost, the figures at equal time, and one last line with the difference to BPTT."""
    lines = [f"test {metric} of the deployed network ({unit}), by seed, mean and standard deviation", WALL,
             f"{'method':>58}  {'lr':>6}  {'by seed':>25}  {metric:>17}  {'s/step':>7}  "
             "cosine to BPTT's gradient: lowest; last, by seed"]  # fmt: skip
    for name, of_method in runs.items():
        figures = [run["test"][0][metric] for run in of_method]
        values = f"{', '.join(f'{value:.4f}' for value in figures):>25}  {told(figures, '.4f'):>17}"
        by_seed = [cosines([run]) for run in of_method if run["alignment"]]
        shown = f"{min(map(min, by_seed)):.3f}; {', '.join(f'{c[-1]:.3f}' for c in by_seed)}" if by_seed else ""
        lines.append(f"{name:>58}  {of_method[0]['lr']:>6.2g}  {values}  {told_step_time(of_method):>7}  {shown}")
    lines += _times(runs, "bptt", metric)

    def difference(run: dict, reference: dict) -> float:
        return run["test"][0][metric] - reference["test"][0][metric]

    bptt = runs.get("bptt", ())
    parts = ((name, paired(r, bptt, difference)) for name, r in runs.items() if name != "bptt")
    lines.append(f"\n{metric} minus BPTT's at equal steps: " + join_paired(parts, "+.4f", "no run of both"))
    return "\n".join(lines)


def _times(runs: Runs, reference: str | None, metric: str) -> list[str]:
    """Lines at equal time, and where it is accuracy also the time until it is reached."""
    if reference not in runs:
        return []
    lines = at_equal_time(runs, reference, metric, lambda value: value)
    if metric == "accuracy":
        lines += until_reached(runs, reference, metric, lambda value: value, MARGIN)
    return ["", *lines] if lines else []


# --------------------------------------------------------------------------------------------------------------- classes


def report_classes(runs: Runs, setting: Mapping) -> str:
    """The figures by method, and one last line with the difference from BPTT.

    Args:
        runs: of classifiers.
        setting: of the file of results.
    """
    task = f"{'p' if setting['permutation_seed'] is not None else ''}sMNIST"
    width, pixels = max(map(len, runs)), -(-setting["n_inputs"] // setting["n_steps"])
    lines = [f"test accuracy in %, mean and standard deviation over seeds; {task}, N = {setting['n_steps']} steps of "
             f"{pixels} pixel{'s' * (pixels > 1)}, {setting['cell']}, hidden {setting['hidden_size']}, "
             f"{setting['steps']} steps of {setting['batch_size']} images", WALL,
             f"{'method':>{width}}  {'lr':>7}  {'seeds':>5}  {'deployed':>13}  {'tree':>13}  {'f_D':>13}  {'s/step':>7}  "
             "cosine to the exact gradient: first, lowest, last"]  # fmt: skip
    for name, of_method in runs.items():
        found = cosines(of_method)
        figures = [[run["test"][read] for run in of_method if read in run["test"]] for read in ("deployed", "tree", "top")]
        cells = "  ".join(f"{told(values):>13}" for values in figures)
        shown = first_lowest_last(found) if found else ""
        rate, step = of_method[0]["lr"], told_step_time(of_method)
        lines.append(f"{name:>{width}}  {rate:>7.2g}  {len(of_method):>5}  {cells}  {step:>7}  {shown}".rstrip())

    def difference(run: dict, reference: dict) -> float:
        return run["test"]["deployed"] - reference["test"]["deployed"]

    bptt = next((name for name in runs if name.partition(":")[0] == "bptt"), None)
    reference = runs.get(bptt, ())
    parts = ((name, paired(r, reference, difference)) for name, r in runs.items() if name != bptt)
    lines += [*_times(runs, bptt, "accuracy"), "", "deployed minus BPTT in points: "
              + join_paired(parts, "+.2f", "no run of bptt" if bptt is None else "no other method")]  # fmt: skip
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------- speed


def speedup(point: dict, method: str, over: str, clock: str) -> float | None:
    """How many times faster a method is than another at a point of ``bench_rnn.py``; None where one of them was not timed."""
    timed = point["methods"]
    return timed[over][clock]["min"] / timed[method][clock]["min"] if method in timed and over in timed else None


def crossover(points: Sequence[dict], method: str, over: str, clock: str) -> int | None:
    """The smallest N from which on a method is faster at every N that was measured; points of one batch size."""
    first = None
    for point in sorted(points, key=lambda p: -p["steps"]):
        if (speedup(point, method, over, clock) or 0.0) <= 1.0:
            break
        first = point["steps"]
    return first
