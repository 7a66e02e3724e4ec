"""Methods compared at equal time or equal work rather than at equal steps: by processor seconds of the training steps alone,
or by block evaluations.

A run stores ``step_seconds``, what a step took by the processor's clock (``fit.usual_step``), and the ``evaluations`` of its
course. So its figure at a time is known, by interpolation. Runs from before that have the wall clock's ``seconds`` alone, on
a machine that other jobs shared: of these nothing is said at equal time.

Runs over depth also store ``work``, the block evaluations of a step (a forward or an input-only product 1, a full backward
2). How often a cell is evaluated along time is stored of no run: at equal work nothing is said of these.

A run's learning rate falls to the end of its own steps. A method that is not through at the time of comparison is read in
the middle of its schedule, where it is worse than a shorter run of its own would be.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from comparisons.statistics import mean, told, told_paired

Runs = Mapping[str, Sequence[dict]]
#: from what an evaluation stored to the figure; None where it lacks it
Figure = Callable[[Any], "float | None"]


class Cost(NamedTuple):
    """What runs are made equal in.

    key: under which a run stores that of a step.
    name, unit: in a sentence, and where it is not stored.
    of_step: what a step's is called.
    """

    key: str
    name: str
    unit: str
    of_step: str


TIME = Cost("step_seconds", "time", "processor seconds", "step time")
WORK = Cost("work", "work", "block evaluations", "work of a step")
_MISSING = {TIME: "processor time", WORK: "work"}


def step_time(run: Mapping[str, Any]) -> float | None:
    """Processor seconds of a training step; None where they were not stored."""
    return run.get("step_seconds")


def told_step_time(of_method: Sequence[dict], form: str = ".4f") -> str:
    """Mean over seeds; with "~" before it by the wall clock, where the processor's was not stored."""
    times = [step_time(run) for run in of_method]
    if None not in times:
        return f"{mean(times):{form}}"
    return f"~{mean([run['seconds'] / run['curve'][-1][0] for run in of_method]):{form}}"


def figure_at(
    run: Mapping[str, Any], spent: float, figure: Figure, geometric: bool = False, cost: Cost = TIME
) -> float | None:
    """The figure of a run after so many processor seconds or block evaluations, between two evaluations by interpolation.

    Args:
        run: with the cost of a step and ``evaluations``.
        spent: since its first step.
        figure: of an evaluation.
        geometric: interpolate the logarithm, as of perplexities.
        cost: what ``spent`` counts.

    Returns:
        None before the first evaluation, and where the run had ended by then, a rounding error apart.
    """
    points = [(step, figure(value)) for step, value in run["evaluations"]]
    points = [(step, value) for step, value in points if value is not None and math.isfinite(value)]
    at = spent / run[cost.key]
    if not points or at < points[0][0] or at > points[-1][0] * (1 + 1e-9):
        return None
    right = min(bisect.bisect_left([step for step, _ in points], at), len(points) - 1)
    (x1, y1), (x0, y0) = points[right], points[max(0, right - 1)]
    share = 1.0 if x1 == x0 else min(1.0, (at - x0) / (x1 - x0))
    if geometric:
        return math.exp(math.log(y0) + share * (math.log(y1) - math.log(y0)))
    return y0 + share * (y1 - y0)


def first_seen(run: Mapping[str, Any], least: float, figure: Figure) -> float | None:
    """Processor seconds until an evaluation first shows a figure of at least ``least``; None where none does."""
    reached = (step for step, value in run["evaluations"] if (figure(value) or -math.inf) >= least)
    return next((step * run["step_seconds"] for step in reached), None)


def at_equal_time(runs: Runs, reference: str, metric: str, figure: Figure, cost: Cost = TIME) -> list[str]:
    """Lines: the figures when the cheapest method was through, and what a step takes beside the reference's.

    Args:
        runs: methods that are to be compared with one another, by name.
        reference: one of them, such as ``"bptt"``.
        metric: ``"perplexity"`` is compared by ratios, every other figure by differences.
        figure: of an evaluation.
        cost: what is equal: processor seconds, or with ``WORK`` block evaluations.
    """
    unknown = [name for name, of_method in runs.items() if any(run.get(cost.key) is None for run in of_method)]
    known = {name: of_method for name, of_method in runs.items() if name not in unknown}
    of_whom = ", ".join(unknown) if known else "these runs"
    lines = [f"no {_MISSING[cost]} is stored of {of_whom}: nothing at equal {cost.name}"] if unknown else []
    if len(known) < 2:
        return lines
    whole = {name: statistics.median(_whole(run, cost) for run in of_method) for name, of_method in known.items()}
    cheapest = min(whole, key=whole.get)
    lines.append(f"validation {metric} at equal {cost.name}, {whole[cheapest]:,.1f} {cost.unit} of training, when {cheapest} "
                 "was through (interpolated; others in the middle of their schedules):")  # fmt: skip
    at = {name: _by_seed(of_method, whole[name], whole[cheapest], metric, figure, cost) for name, of_method in known.items()}
    width = max(map(len, known))
    for name, of_method in known.items():
        by_seed = {run["seed"]: run for run in known.get(reference, ())}
        ratios = [run[cost.key] / by_seed[run["seed"]][cost.key] for run in of_method if run["seed"] in by_seed]
        price = f"; {cost.of_step} / {reference}'s: {told_paired(ratios, '.2f')}" if ratios and name != reference else ""
        figures = [value for value in at[name].values() if value is not None]
        shown = told(figures, ".4g" if metric != "perplexity" else ".2f") if figures else "before its first evaluation"
        lines.append(f"  {name:<{width}}  {shown}{_beside(at, name, reference, metric)}{price}")
    return lines


def _whole(run: Mapping[str, Any], cost: Cost) -> float:
    """What a whole run took."""
    return run[cost.key] * run["curve"][-1][0]


def _by_seed(
    of_method: Sequence[dict], whole: float, spent: float, metric: str, figure: Figure, cost: Cost
) -> dict[int, float | None]:
    """The figure by seed when so much was spent. Seeds of a method cost the same: a step's noise is no part of its figure."""
    return {
        run["seed"]: figure_at(run, min(1.0, spent / whole) * _whole(run, cost), figure, metric == "perplexity", cost)
        for run in of_method
    }


def _beside(at: Mapping[str, Mapping[int, float | None]], name: str, reference: str, metric: str) -> str:
    """The paired comparison with the reference, by seed."""
    pairs = [(value, at.get(reference, {}).get(seed)) for seed, value in at[name].items()]
    pairs = [(ours, theirs) for ours, theirs in pairs if ours is not None and theirs is not None]
    if name == reference or not pairs:
        return ""
    if metric == "perplexity":
        return f"; ratio to {reference}: {told_paired([ours / theirs for ours, theirs in pairs])}"
    return f"; minus {reference}'s: {told_paired([ours - theirs for ours, theirs in pairs], '+.3f')}"


def until_reached(runs: Runs, reference: str, metric: str, figure: Figure, margin: float) -> list[str]:
    """Lines: processor seconds until a run is first seen within a margin of the last figure of the reference's run of the
    same seed, where higher is better, and that time over the reference's own whole time and time until then.

    Args:
        runs, reference, metric, figure: see :func:`at_equal_time`.
        margin: in the metric's unit.
    """
    references = {run["seed"]: run for run in runs.get(reference, ()) if step_time(run) and run["evaluations"]}
    if not references:
        return []
    lines = [f"processor seconds until the validation {metric} is first within {margin:g} of {reference}'s last, and over "
             f"the seconds of {reference}'s whole run:"]  # fmt: skip
    width = max(map(len, runs))
    for name, of_method in runs.items():
        pairs = [(run, references[run["seed"]]) for run in of_method if step_time(run) and run["seed"] in references]
        seen = [(first_seen(run, figure(to["evaluations"][-1][1]) - margin, figure), _whole(to, TIME)) for run, to in pairs]
        if not seen:
            continue
        reached = [(own, whole) for own, whole in seen if own is not None]
        missing = f"not by {len(seen) - len(reached)} of {len(seen)} seeds" if len(reached) < len(seen) else ""
        shown = f"{told([own for own, _ in reached], '.1f')}; {told_paired([own / whole for own, whole in reached], '.2f')}"
        lines.append(f"  {name:<{width}}  " + "; ".join(filter(None, (shown if reached else "", missing))))
    return lines
