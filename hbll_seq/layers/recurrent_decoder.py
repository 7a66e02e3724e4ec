"""The decoder of a recurrent block: its late states, one for each position that can be taken back.

Shapes: B batch, T tokens of a call, C width of the stream and of the cell, G gates.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hbll_seq.layers.base import ROLLBACK, Decoder
from hbll_seq.layers.prepared import MANY_ROWS, MLP, Matrix, Norm, can_prepare, prepared
from hbll_seq.layers.recurrent import RecurrentState


class PreparedRecurrence:
    """A recurrent block's matrices for a few rows at a time; see :mod:`hbll_seq.layers.prepared`.

    Args:
        block: a RecurrentBlock.
    """

    def __init__(self, block: nn.Module):
        cell = block.cell
        self.norm = Norm(block.norm_cell)
        self.project = Matrix(cell.weight_ih, self.norm.scale, cell.bias_ih)
        self.out, self.mlp = Matrix(block.cell_out.weight), MLP(block)


class RecurrentDecoder(Decoder):
    """See :class:`hbll_seq.layers.base.Decoder`. A state is never changed in place, so that late ones cost nothing to keep.

    Args:
        block: a RecurrentBlock.
        start, rollback: see :meth:`hbll_seq.layers.base.Cell.decoder`.
    """

    def __init__(self, block: nn.Module, start: Tensor | None, rollback: int = ROLLBACK):
        super().__init__(rollback, start)
        self.block = block
        self._states: list[Tensor] = []  # [B, C] after each of the last positions
        fits = can_prepare(block, [type(block), type(block.cell)])
        self._prepared = prepared(block, PreparedRecurrence) if fits else None

    def step(self, x: Tensor) -> Tensor:
        """See :meth:`Decoder.step`."""
        parts = self._prepared
        if parts is None or x.shape[0] > MANY_ROWS or self.length < self._last_start:
            return self.read(x.unsqueeze(1)).squeeze(1)
        before = self._states[-1] if self._states else x.new_zeros(x.shape)
        state = self.block.cell.transition(before, parts.project(parts.norm(x)))
        self._note([state])
        return parts.mlp(parts.out.add_to(x, state))

    def read(self, x: Tensor) -> Tensor:
        """See :meth:`Decoder.read`."""
        batch, n_new, width = x.shape
        if self._prepared is not None and batch * n_new <= MANY_ROWS and n_new > 1 and self.length >= self._last_start:
            return self._read_few(x)
        block, padding = self.block, None
        if self.length < self._last_start:
            padding = (self.start - self.length).clamp(min=0)
        before = RecurrentState(self._states[-1] if self._states else None, padding)
        states, _ = block.cell(block.norm_cell(x), before)
        self._note(states.unbind(1))
        return block._add_branches(x, block.cell_out(states))

    def _read_few(self, x: Tensor) -> Tensor:
        parts, rows = self._prepared, x.reshape(-1, x.shape[-1])
        projected = parts.project(parts.norm(rows)).view(*x.shape[:2], -1)
        state, states = self._states[-1] if self._states else x.new_zeros(x[:, 0].shape), []
        for p in projected.unbind(1):
            state = self.block.cell.transition(state, p)
            states.append(state)
        self._note(states)
        return parts.mlp(parts.out.add_to(rows, torch.stack(states, dim=1).flatten(0, 1))).view(x.shape)

    def _note(self, states: list[Tensor] | tuple[Tensor, ...]) -> None:
        self.length += len(states)
        self._states.extend(states[-self.rollback - 1 :])
        if len(self._states) > 2 * self.rollback + 2:
            del self._states[: -self.rollback - 1]

    def _truncate(self, length: int) -> None:
        del self._states[len(self._states) - (self.length - length) :]

    def keep(self, rows: Tensor) -> None:
        """See :meth:`Decoder.keep`."""
        self._states = [state.index_select(0, rows) for state in self._states]
        super().keep(rows)
