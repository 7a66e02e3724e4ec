"""The contract that every block of a language model keeps, and the decoder that reads text with it token by token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

#: positions that a decoder can take back by default; a draft is shorter.
ROLLBACK = 64


class Decoder(ABC):
    """One block that reads a growing batch of sequences, with buffers of its own that it writes in place.

    It is made for one generation: weights may be prepared when it is made, so that a model that is trained on needs a new
    one. It is used without gradients. Outputs are new tensors, and inputs are left as they are.

    Args:
        rollback: how many of the last positions :meth:`truncate` can take back.
        start: [B], the number of left-padding positions of each row, or None for none.

    Attributes:
        length: positions read so far, left padding included.
        start: as it was given, of the rows that are left.
    """

    def __init__(self, rollback: int = ROLLBACK, start: Tensor | None = None):
        self.length, self.rollback = 0, rollback
        self._lowest = 0  # what was before may be gone
        self._set_start(start)

    def _set_start(self, start: Tensor | None) -> None:
        self.start, self._last_start = start, 0 if start is None else int(start.max())  # padding ends here in every row

    @abstractmethod
    def read(self, x: Tensor) -> Tensor:
        """The next tokens at once: ``x`` [B, T, C] -> [B, T, C]. The first call says how many rows there are."""

    def step(self, x: Tensor) -> Tensor:
        """The next token: ``x`` [B, C] -> [B, C]."""
        return self.read(x.unsqueeze(1)).squeeze(1)

    def truncate(self, length: int) -> None:
        """Forget all positions from ``length`` on, as though they had never been read.

        Raises:
            ValueError: there are fewer, or more than ``rollback`` of them would go.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"length={length}: {self.length} positions have been read; name one of 0 to {self.length}")
        self._lowest = max(self._lowest, self.length - self.rollback)
        if length < self._lowest:
            raise ValueError(
                f"length={length} of {self.length} positions: only positions from {self._lowest} on can be taken back; make "
                f"this with a rollback above {self.rollback}"
            )
        if length < self.length:
            self._truncate(length)
            self.length = length

    @abstractmethod
    def _truncate(self, length: int) -> None:
        """What :meth:`truncate` does, of a checked length below ``self.length``."""

    @abstractmethod
    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone, [B'] of int64: some rows, in any order, a row several times."""
        if self.start is not None:
            self._set_start(self.start.index_select(0, rows))


def select_rows(value: Any, rows: Tensor) -> Any:
    """The rows of every tensor inside nested tuples, lists and dictionaries, along the first dimension."""
    if isinstance(value, Tensor):
        return value.index_select(0, rows)
    if isinstance(value, dict):
        return {key: select_rows(part, rows) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [select_rows(part, rows) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


class CellDecoder(Decoder):
    """The decoder of any :class:`Cell`, by its ``forward`` and ``step`` and their immutable states.

    Args:
        cell: the block.
        start, rollback: see :meth:`Cell.decoder`.
    """

    def __init__(self, cell: Cell, start: Tensor | None = None, rollback: int = ROLLBACK):
        super().__init__(rollback)
        self.cell, self.state = cell, cell.initial_state(start)
        #: of each late call: positions and state before it, and what it read [B, T, C]
        self._calls: list[tuple[int, Any, Tensor]] = []

    def read(self, x: Tensor) -> Tensor:
        """See :meth:`Decoder.read`."""
        y, state = self.cell(x, self.state)
        self._note(x, state)
        return y

    def step(self, x: Tensor) -> Tensor:
        """See :meth:`Decoder.step`."""
        y, state = self.cell.step(x, self.state)
        self._note(x.unsqueeze(1), state)
        return y

    def _note(self, x: Tensor, state: Any) -> None:
        self._calls.append((self.length, self.state, x))
        self.length, self.state = self.length + x.shape[1], state
        while len(self._calls) > 1 and self._calls[1][0] <= self.length - self.rollback:
            del self._calls[0]

    def _truncate(self, length: int) -> None:
        while True:
            before, state, x = self._calls.pop()
            if before <= length:
                break
        self.length, self.state = before, state
        if before < length:
            self.read(x[:, : length - before])

    def keep(self, rows: Tensor) -> None:
        """See :meth:`Decoder.keep`."""
        self.state = select_rows(self.state, rows)
        self._calls = [(before, select_rows(state, rows), x.index_select(0, rows)) for before, state, x in self._calls]


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

    def decoder(self, start: Tensor | None = None, *, rollback: int = ROLLBACK) -> Decoder:
        """What reads text token by token: the same function as ``forward``, faster where a block has a decoder of its own.

        Args:
            start: [B], the number of left-padding positions of each row, or None for none.
            rollback: how many positions can be taken back at once.
        """
        return CellDecoder(self, start, rollback)
