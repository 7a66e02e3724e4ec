"""Training steps of several methods timed by turns, so that what else the machine does falls on all of them alike.

A run's own ``step_seconds`` is processor time, but a processor that other jobs share is slower too: its caches and clock
are not ours alone. Runs that were made one after the other on such a machine differ by that. Steps taken by turns do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from comparisons.fit import take_step, usual_step, work_clock

WARM_UP = 3  # rounds that are not counted: the first steps allocate


@dataclass(frozen=True)
class Training:
    """What a run trains, and with what.

    model, objective, optimizer: of it.
    batch: step -> inputs and labels.
    clip: largest norm of the gradient.
    carry: see :func:`comparisons.fit.fit`.
    """

    model: nn.Module
    objective: nn.Module
    optimizer: torch.optim.Optimizer
    batch: Callable[[int], tuple[Tensor, Tensor | None]]
    clip: float
    carry: str | None = None


def seconds_by_turns(trainings: Mapping[str, Training], rounds: int) -> dict[str, float]:
    """Processor seconds of a training step by name, see :func:`usual_step`: a step of each in every round.

    Raises:
        ValueError: ``rounds`` is less than 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: must be at least 1; some 100 are good")
    spent: dict[str, list[float]] = {name: [] for name in trainings}
    carried: dict[str, dict[str, Any]] = {name: {} for name in trainings}
    for step in range(WARM_UP + rounds):
        for name, training in trainings.items():
            inputs, labels = training.batch(step)
            begun = work_clock(inputs)
            output = take_step(training.objective, training.optimizer, inputs, labels, step, training.clip, **carried[name])
            if step >= WARM_UP:
                spent[name].append(work_clock(inputs) - begun)
            if training.carry is not None:
                carried[name] = {training.carry: getattr(output, training.carry)}
    return {name: usual_step(seconds) for name, seconds in spent.items()}


def with_step_times(runs: Mapping[str, Sequence[dict]], times: Mapping[str, float]) -> dict[str, list[dict]]:
    """The runs with the time of a step by turns in place of each run's own, where that of every method was taken.

    Args:
        runs: by method.
        times: seconds by description of a method.
    """
    if not all(run["description"] in times for of_method in runs.values() for run in of_method):
        return {name: list(of_method) for name, of_method in runs.items()}
    return {
        name: [{**run, "step_seconds": times[run["description"]]} for run in of_method] for name, of_method in runs.items()
    }


def told_step_times(times: Mapping[str, float]) -> str:
    """One line; also of methods that have no run."""
    return "milliseconds of a step, taken by turns: " + "; ".join(f"{name} {1e3 * t:.1f}" for name, t in times.items())
