"""Hostile Python values."""

from __future__ import annotations

import decimal
import fractions
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch


class BadRepr:
    """Its repr fails, as that of a closed or half-made object does."""

    def __repr__(self):
        raise RuntimeError("no repr")


class LongRepr:
    """Its repr is long and has several lines."""

    def __repr__(self):
        return "long\n" * 100_000


class BadIndex:
    """Says that it is a whole number and then fails."""

    def __index__(self):
        raise TypeError("no index")

    def __repr__(self):
        return "<bad index>"


class Text(str):
    """A str of somebody else's."""


def _generator():
    yield 1
    yield "x"


_MAKERS = (
    lambda: None, lambda: True, lambda: False, lambda: 0, lambda: 1, lambda: 2, lambda: 3, lambda: 7, lambda: -1,
    lambda: 2**31, lambda: 2**63,
    lambda: 10**20, lambda: 10**400, lambda: -(10**400), lambda: 10**5000, lambda: 0.0, lambda: 0.5, lambda: 1.0, lambda: 2.5,
    lambda: 1e300,
    lambda: 5e-324, lambda: math.nan, lambda: math.inf, lambda: -math.inf, lambda: 1j, lambda: decimal.Decimal("0.5"),
    lambda: decimal.Decimal("NaN"),
    lambda: fractions.Fraction(1, 2), lambda: np.int64(2), lambda: np.int8(1), lambda: np.uint64(2**63),
    lambda: np.float32(0.5),
    lambda: np.float64(1.0), lambda: np.float16(np.inf), lambda: np.bool_(True), lambda: np.array(2),
    lambda: np.array([1, 2]), lambda: np.array([]),
    lambda: np.array([1.5]), lambda: np.array([[1, 2]]), lambda: np.array(["a"]), lambda: np.array([None]),
    lambda: np.datetime64("2020-01-01"),
    lambda: torch.tensor(2), lambda: torch.tensor(0.5), lambda: torch.tensor(True), lambda: torch.tensor([1, 2, 3]),
    lambda: torch.tensor([1.0]),
    lambda: torch.tensor([]), lambda: torch.tensor([[1, 2]]), lambda: torch.tensor([1 + 1j]),
    lambda: torch.zeros(2, requires_grad=True), lambda: "", lambda: " ", lambda: "x", lambda: "2", lambda: "no",
    lambda: "true", lambda: "\0",
    lambda: "\ud800", lambda: "x" * 100_000, lambda: "a\nb", lambda: "\u2581 \ufeff", lambda: Text("tree"), lambda: b"",
    lambda: b"ab",
    lambda: bytearray(b"ab"), lambda: memoryview(b"ab"), lambda: [], lambda: (), lambda: {}, lambda: set(), lambda: [None],
    lambda: [1.0], lambda: [1, 2],
    lambda: [4, 6, 7], lambda: (2, 3), lambda: [-1], lambda: [10**400], lambda: [True], lambda: ["a"], lambda: ["tree", None],
    lambda: ["tree", ""],
    lambda: ["tree", "node"], lambda: [[1]], lambda: {1: 2}, lambda: {1, 2}, lambda: frozenset({2}), lambda: range(3),
    lambda: range(0, 10**12),
    lambda: iter([1, 2]), lambda: _generator(), lambda: map(int, "12"), lambda: object(), lambda: int, lambda: len,
    lambda: BadRepr(), lambda: LongRepr(), lambda: BadIndex(), lambda: [BadRepr()], lambda: [LongRepr()] * 3,
    lambda: NotImplemented, lambda: ...,
    lambda: Path("x"), lambda: Path("/dev/zero"), lambda: ValueError("x"), lambda: torch.nn.Linear(1, 1),
    lambda: torch.Generator(),
    lambda: [0] * 100_000, lambda: _nested(), lambda: _recursive(), lambda: np.zeros(1 << 16, dtype=np.int64),
    lambda: slice(1, 2),
)  # fmt: skip


def _nested() -> list:
    value: list = []
    for _ in range(5000):
        value = [value]
    return value


def _recursive() -> list:
    value: list = []
    value.append(value)
    return value


def hostile(rng: random.Random) -> Any:
    """A value that is new each time: iterators are not shared."""
    return rng.choice(_MAKERS)()


def describe(value: Any) -> str:
    """A short line about a value whose repr may fail."""
    try:
        return repr(value)[:60].split("\n")[0] if not isinstance(value, int) or value.bit_length() < 500 else "huge int"
    except Exception:
        return f"<{type(value).__name__}>"


# ---------------------------------------------------------------------------------------------------- what a value means

NOTHING = object()


def as_whole(value: Any) -> Any:
    """The int that a value plainly is: Python's, NumPy's, a float or tensor or array of one whole number. Else NOTHING."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        if value.size == 1 if isinstance(value, np.ndarray) else value.numel() == 1:
            return as_whole(value.item())
        return NOTHING
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer, float, np.floating)):
        return NOTHING
    if isinstance(value, (int, np.integer)):
        return int(value)
    return int(value) if math.isfinite(value) and value == int(value) else NOTHING


def as_number(value: Any) -> Any:
    """The float that a value plainly is, else NOTHING."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        if value.size == 1 if isinstance(value, np.ndarray) else value.numel() == 1:
            return as_number(value.item())
        return NOTHING
    if isinstance(value, (bool, np.bool_)):
        return NOTHING
    if not isinstance(value, (int, float, np.integer, np.floating, decimal.Decimal, fractions.Fraction)):
        return NOTHING
    try:
        number = float(value)
    except (OverflowError, ValueError):
        return NOTHING
    return number if math.isfinite(number) else NOTHING


def as_bool(value: Any) -> Any:
    """The bool that a value plainly is, else NOTHING."""
    return bool(value) if isinstance(value, (bool, np.bool_)) else NOTHING


def as_ids(value: Any) -> Any:
    """The list of ints that a value plainly is, else NOTHING. A fresh value has to be given where it is an iterator."""
    if isinstance(value, str) or (isinstance(value, range) and len(value) > 10**6):
        return NOTHING
    try:
        items = value.tolist() if isinstance(value, (torch.Tensor, np.ndarray)) else list(value)
    except Exception:
        return NOTHING
    items = items if isinstance(items, list) else [items]
    plain = [int(item) if isinstance(item, bool) else as_whole(item) for item in items]
    return NOTHING if any(item is NOTHING or isinstance(items[i], (float, np.floating)) for i,
                          item in enumerate(plain)) else plain
