"""What a few seeds say: mean, spread, and an interval and a test for the mean of paired figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean over ``n`` seeds, and the bounds of its interval."""

    mean: float
    low: float
    high: float
    n: int


def mean(values: Sequence[float]) -> float:
    """Of at least one number. Raises ValueError where there is none."""
    if not values:
        raise ValueError("values=[]: a mean needs at least one; leave out what has no run")
    return math.fsum(values) / len(values)


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation over seeds, with n - 1 below; None of fewer than two, which show none."""
    if len(values) < 2:
        return None
    middle = mean(values)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1))


def paired_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval | None:
    """The t-interval for the mean of figures that are paired already, a ratio or difference a seed; None of fewer than two.

    Seeds are taken as independent draws of a normal distribution (Student 1908): with three of them the interval reaches 2.5
    standard deviations to each side, and that is what three seeds say.

    Args:
        values: one a seed.
        confidence: share of such intervals that would hold the true mean, above 0 and below 1.

    Raises:
        ValueError: the confidence is out of range.
    """
    deviation = spread(values)
    quantile = t_quantile(confidence, max(1, len(values) - 1))
    if deviation is None:
        return None
    half = quantile * deviation / math.sqrt(len(values))
    middle = mean(values)
    return Interval(middle, middle - half, middle + half, len(values))


def paired_test(values: Sequence[float], null: float) -> float | None:
    """Probability of a mean at least so far from ``null`` if that were the true one: the paired t-test, two-sided, under the
    assumption of :func:`paired_interval`; None of fewer than two values.

    Args:
        values: one a seed, such as differences or ratios.
        null: their mean if there is nothing to be seen: 0 of differences, 1 of ratios.
    """
    deviation = spread(values)
    if deviation is None:
        return None
    distance = abs(mean(values) - null)
    if deviation == 0:
        return 1.0 if distance == 0 else 0.0
    return 1.0 - _within(distance * math.sqrt(len(values)) / deviation, len(values) - 1)


def t_quantile(confidence: float, freedom: int) -> float:
    """How far from 0 Student's t with so many degrees of freedom stays with this probability, on either side.

    Raises:
        ValueError: an argument is out of range.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence!r}: must be above 0 and below 1, such as 0.95")
    if freedom < 1:
        raise ValueError(f"freedom={freedom!r}: must be at least 1; two seeds have one degree of freedom")
    low, high = 0.0, 1.0
    while _within(high, freedom) < confidence:
        low, high = high, 2 * high
    for _ in range(80):  # halvings: to the last bit
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < confidence else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """P(-t <= T <= t), in closed form (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    term = total = math.cos(angle) if freedom % 2 else 1.0
    for k in range(3 if freedom % 2 else 2, freedom, 2):
        term *= math.cos(angle) ** 2 * (k - 1) / k
        total += term
    if freedom % 2 == 0:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if freedom > 1 else 0.0))


def told(values: Sequence[float], form: str = ".2f") -> str:
    """``"12.34 ± 0.05"``, mean and standard deviation; of one seed the figure alone; a dash where there is none."""
    if not values:
        return "-"
    deviation = spread(values)
    return f"{mean(values):{form}}" + (f" ± {deviation:{form.removeprefix('+')}}" if deviation is not None else "")


def told_paired(values: Sequence[float], form: str = ".3f") -> str:
    """All figures of paired seeds, and what they say of the mean: an interval and a test, or that there is one seed alone, or
    that all agree: their spread is then below what the figures resolve, and no zero.

    Args:
        values: differences, which are tested against 0, or ratios, which are tested against 1.
        form: of a figure; with a sign ("+.2f") they are differences.
    """
    shown = ", ".join(f"{value:{form}}" for value in values)
    found = paired_interval(values)
    if found is None:
        return f"{shown} (one seed)" if values else ""
    if found.high - found.low <= 1e-9 * max(map(abs, values)):  # a rounding error apart
        return f"{shown} (mean {found.mean:{form}}, the same of all seeds: no interval)"
    p = paired_test(values, 0.0 if form.startswith("+") else 1.0)
    chance = "p < 0.001" if p < 1e-3 else f"p = {p:.2g}"
    return f"{shown} (mean {found.mean:{form}}, 95% interval {found.low:{form}} to {found.high:{form}}, {chance})"
