"""Transitions that are calls of their own, such as blocks with different weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class Calls(ABC):
    """Transitions by name, evaluated in parallel wherever the algorithm allows it."""

    #: whether :meth:`diagonal` is there: gated recurrent cells have it, Transformer blocks do not.
    has_diagonal = False
    #: whether products compute the inside of a transition again
    recomputes = False

    @abstractmethod
    def apply(self, indices: Sequence[Hashable], states: Sequence[Tensor]) -> list[Tensor]:
        """``[f_n(s) for n, s in zip(indices, states)]``: one step of the algorithm's span, however many they are."""

    def parameters(self, index: Hashable) -> list[Tensor]:
        """What training changes of f_n: leaves that need a gradient."""
        return []

    def remembers(self, index: Hashable) -> bool:
        """Whether evaluations of f_n without gradient improve later ones: iterations then evaluate the last segment too,
        whose end they do not need."""
        return False

    def bind(self, index: Hashable) -> Callable[[Tensor], Tensor]:
        """f_n as :meth:`apply` would evaluate it now, however often and however late it is called."""
        return lambda state: self.apply((index,), (state,))[0]

    def diagonal(self, indices: Sequence[Hashable], states: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Tensor]:
        """Diagonals of the Jacobians d f_n(s) / d s, of the states' shape, given the outputs too."""
        raise NotImplementedError(f"{type(self).__name__} says has_diagonal={self.has_diagonal}")


class Recomputed(Calls):
    """Calls that keep no graph inside a transition: a product computes what it needs again (activation checkpointing).

    Alive at any time are the states between transitions and the inside of the one in flight (docs/method.md 2.5).
    """

    recomputes = True

    def __init__(self, calls: Calls):
        self.calls, self.has_diagonal = calls, calls.has_diagonal
        self.parameters, self.remembers, self.diagonal = calls.parameters, calls.remembers, calls.diagonal

    def apply(self, indices: Sequence[Hashable], states: Sequence[Tensor]) -> list[Tensor]:
        """See :meth:`Calls.apply`."""
        if not torch.is_grad_enabled():
            return self.calls.apply(indices, states)
        bound = [self.calls.bind(n) for n in indices]
        return [checkpoint(call, s, use_reentrant=False, preserve_rng_state=False) for call, s in zip(bound, states)]
