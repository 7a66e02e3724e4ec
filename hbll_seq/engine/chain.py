"""What a chain is: N transitions, and a call that evaluates many of them at once.

What is written here knows nothing of layers, time, attention or optimisers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class Chain(ABC):
    """Transitions s_n = f_n(s_{n-1}), evaluated in parallel wherever the algorithm allows it."""

    #: whether :meth:`diagonal` is there: gated recurrent cells have it, Transformer blocks do not.
    has_diagonal = False

    @abstractmethod
    def apply(self, indices: Sequence[int], states: Sequence[Tensor]) -> list[Tensor]:
        """``[f_n(s) for n, s in zip(indices, states)]``: one step of the algorithm's span, however many they are."""

    @staticmethod
    def number(index: int | tuple[int, ...]) -> int:
        """The transition's own number, where it is named by all that lead up to it (as in a chain over depth)."""
        return index[-1] if isinstance(index, tuple) else index

    def remembers(self, index: int) -> bool:
        """Whether evaluations of f_n without gradient improve later ones: iterations then evaluate the last transition too,
        whose output they do not need."""
        return False

    def bind(self, index: int) -> Callable[[Tensor], Tensor]:
        """f_n as :meth:`apply` would evaluate it now, however often and however late it is called."""
        return lambda state: self.apply((index,), (state,))[0]

    def diagonal(self, indices: Sequence[int], states: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Tensor]:
        """Diagonals of the Jacobians d f_n(s) / d s, of the states' shape, given the outputs too."""
        raise NotImplementedError(f"{type(self).__name__} says has_diagonal={self.has_diagonal}")


class Recomputed(Chain):
    """A chain that keeps no graph inside a transition: a product computes what it needs again (activation checkpointing).

    Alive at any time are the states between transitions and the inside of the one in flight (docs/method.md 2.5).
    """

    def __init__(self, chain: Chain):
        self.chain, self.has_diagonal = chain, chain.has_diagonal

    def apply(self, indices: Sequence[int], states: Sequence[Tensor]) -> list[Tensor]:
        """See :meth:`Chain.apply`."""
        if not torch.is_grad_enabled():
            return self.chain.apply(indices, states)
        calls = [self.chain.bind(n) for n in indices]
        return [checkpoint(call, s, use_reentrant=False, preserve_rng_state=False) for call, s in zip(calls, states)]

    def diagonal(self, indices: Sequence[int], states: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Tensor]:
        """See :meth:`Chain.diagonal`."""
        return self.chain.diagonal(indices, states, outputs)

    def remembers(self, index: int) -> bool:
        """See :meth:`Chain.remembers`."""
        return self.chain.remembers(index)
