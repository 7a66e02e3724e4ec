"""Whole numbers given by a caller."""

from __future__ import annotations

from numbers import Integral

from .reading import quote


def whole(name: str, value: object, least: int, most: int | None = None) -> int:
    """``value`` as an int, when it is a whole number in ``least .. most``; numbers of NumPy are.

    Raises ValueError for another type (truth values and floats included) or a number outside.
    """
    if isinstance(value, Integral) and not isinstance(value, bool) and least <= value and (most is None or value <= most):
        return int(value)
    allowed = f"of at least {least}" if most is None else f"in {least} .. {most}"
    raise ValueError(f"{name} is {quote(value)}; it must be a whole number {allowed}")
