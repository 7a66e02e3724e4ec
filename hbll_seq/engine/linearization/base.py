"""Jacobian approximations: what carries a change of a state from transition to transition between two passes.

A pass evaluates all transitions at once, ``a_n = f_n(s_{n-1})``; the linearization A_n then approximates f_n's Jacobian in
``new_n = a_n + A_n (new_{n-1} - s_{n-1})`` (docs/method.md 2.2). These objects name one and hold its options.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Linearization:
    """What approximates the Jacobians between passes.

    Attributes:
        name: the word for it on a command line.
    """

    name: ClassVar[str]


@dataclass(frozen=True)
class Zero(Linearization):
    """A = 0 (Jacobi): a pass wins one exact state for each transition or segment."""

    name: ClassVar[str] = "zero"


@dataclass(frozen=True)
class Identity(Linearization):
    """A = 1 (Picard): for residual blocks, whose Jacobians are near it."""

    name: ClassVar[str] = "identity"


@dataclass(frozen=True)
class Diagonal(Linearization):
    """The transitions' own diagonals (quasi-DEER): for gated recurrent cells, which tell them."""

    name: ClassVar[str] = "diagonal"
