"""The learning rate of every step: a pure function of the step, so that a resumed run has the same."""

from __future__ import annotations

import math
from collections.abc import Sequence


def learning_rate(step: int, *, peak: float, total: int, warmup: int, floor: float) -> float:
    """Linear warm-up to ``peak``, then a cosine down to ``floor * peak`` at the last step; a pure function of the step.

    Args:
        step: the step about to be done, 0 .. total - 1.
        total: steps of the whole run.
        warmup: steps of warm-up; at most half of the run is used.
        floor: final learning rate as a fraction of ``peak``.
    """
    warmup = min(warmup, total // 2)
    if step < warmup:
        return peak * (step + 1) / warmup
    return _cosine(step - warmup, total - warmup, peak, floor)


def rate_of_step(step: int, parts: Sequence[int], *, peak: float, warmup: int, floor: float) -> float:
    """The rate of a run that may have been extended: each part ends at ``floor * peak``, where the next begins.

    The first part is :func:`learning_rate`'s. An added one rises from ``floor * peak`` to ``peak`` during the warm-up (at
    most a tenth of the part), and goes down to ``floor * peak`` again by a cosine.

    Args:
        step: the step about to be done, 0 .. sum(parts) - 1.
        parts: steps of the run, then the steps that each extension adds.
        peak, warmup, floor: as in :func:`learning_rate`.
    """
    first, *added = parts
    if step < first or not added:
        return learning_rate(step, peak=peak, total=first, warmup=warmup, floor=floor)
    step -= first
    while step >= added[0] and len(added) > 1:
        step -= added.pop(0)
    total, warmup = added[0], min(warmup, added[0] // 10)
    if step < warmup:
        return peak * (floor + (1 - floor) * (step + 1) / warmup)
    return _cosine(step - warmup, total - warmup, peak, floor)


def _cosine(step: int, total: int, peak: float, floor: float) -> float:
    """From ``peak`` at step 0 to ``floor * peak`` at the last one."""
    progress = min(1.0, step / max(1, total - 1))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
