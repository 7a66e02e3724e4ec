"""Checks of the numbers, flags and words that a caller gives: plain Python values come back, or a ValueError names them."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any

import numpy as np

from hbll_seq.utils.reading import quote


def whole_or_none(value: Any) -> int | None:
    """``value`` as an int, where it is a whole number of Python or NumPy (a bool and 1.0 are not); else None."""
    return int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else None


def number_or_none(value: Any) -> float | None:
    """``value`` as a float, where it is a real number (a bool is not, nor one too large for a float); NaN is None too."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        plain = float(value)
    except OverflowError:
        return None
    return None if math.isnan(plain) else plain


def as_whole(name: str, value: Any, least: int, most: int | None = None, remedy: str = "") -> int:
    """``value`` as an int of at least ``least``, and at most ``most``.

    Raises:
        ValueError: it is something else; the message names it, the range and the remedy.
    """
    plain = whole_or_none(value)
    if plain is None or plain < least or (most is not None and plain > most):
        allowed = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name}={quote(value)}: must be a whole number {allowed}{remedy}")
    return plain


def check_choice(name: str, value: Any, allowed: Iterable[str]) -> None:
    """Raises ValueError unless ``value`` is one of these words. An array or a list is none, whatever it compares as."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}={quote(value)}: allowed are {', '.join(allowed)}")


def as_flag(name: str, value: Any) -> bool:
    """``value`` as a bool; nothing but a bool of Python or NumPy is one: ``"no"`` is true in Python.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name}={quote(value)}: must be True or False")
    return bool(value)
