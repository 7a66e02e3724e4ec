"""The contract that every block of a language model keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn


class Cell(nn.Module, ABC):
    """A causal sequence-to-sequence block in two forms that are one function.

    ``forward`` reads a whole sequence, ``step`` one token; running ``step`` along a sequence gives what ``forward``
    gives. A state is an immutable value: a later call never changes an earlier state, so states can be shared.
    """

    @abstractmethod
    def initial_state(self, start: Tensor | None = None) -> Any:
        """State before the first token; ``start`` [B] is the number of left-padding positions of each row."""

    @abstractmethod
    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """``x`` [B, T, C] -> ``(y [B, T, C], state)``; ``state=None`` starts afresh."""

    def step(self, x_t: Tensor, state: Any) -> tuple[Tensor, Any]:
        """``x_t`` [B, C] -> ``(y_t [B, C], state)``: one token."""
        y, state = self(x_t.unsqueeze(1), state)
        return y.squeeze(1), state
