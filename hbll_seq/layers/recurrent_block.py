"""A recurrent layer as a block of the hierarchy over depth: the time x depth grid.

Shapes: B batch, T tokens, C width of the stream and of the cell, G gates.
"""

from __future__ import annotations

from torch import Tensor, nn

from hbll_seq.layers.base import ROLLBACK, Decoder
from hbll_seq.layers.cells import make_cell
from hbll_seq.layers.prepared import is_plain
from hbll_seq.layers.recurrent import RecurrentState
from hbll_seq.layers.recurrent_decoder import RecurrentDecoder
from hbll_seq.layers.residual import ResidualBlock, make_norm


class RecurrentBlock(ResidualBlock):
    """``x + out(cell(norm(x)))``, then ``+ mlp(norm(.))``: the Transformer block with a recurrence in place of attention.

    Its memory is one vector [B, C], however long the text is. ``forward`` walks the recurrence step by step; to
    differentiate it is backpropagation through time. ``chains/layer.py`` evaluates the same recurrence in parallel, between
    :meth:`enter` and :meth:`leave`.

    Args:
        width: C, of the stream and of the cell.
        kind: of the cell, see :func:`hbll_seq.layers.cells.make_cell`.
        mlp_ratio: hidden width of the MLP in units of C, see :func:`residual.hidden_width`; 0 leaves the branch out.
        norm: one of ``residual.NORMS``.
        dropout: probability of dropping a unit of a branch in training.
        mlp: one of ``residual.MLPS``.
    """

    def __init__(
        self, width: int, kind: str, *, mlp_ratio: int = 4, norm: str = "rmsnorm", dropout: float = 0.0, mlp: str = "gelu"
    ):
        super().__init__()
        self.norm_cell = make_norm(norm, width)
        self.cell = make_cell(kind, width, width)
        self.cell_out = nn.Linear(width, width, bias=False)
        self._add_mlp(width, mlp_ratio, norm, dropout, mlp)
        self._start([], [self.cell_out])

    def initial_state(self, start: Tensor | None = None) -> RecurrentState:
        """See :meth:`Cell.initial_state`."""
        return self.cell.initial_state(start)

    def decoder(self, start: Tensor | None = None, *, rollback: int = ROLLBACK) -> Decoder:
        """See :meth:`Cell.decoder`."""
        if not is_plain(self, [RecurrentBlock], deep=False):  # a subclass or a hook expects its own forward to be called
            return super().decoder(start, rollback=rollback)
        return RecurrentDecoder(self, start, rollback)

    def forward(self, x: Tensor, state: RecurrentState | None = None) -> tuple[Tensor, RecurrentState]:
        """See :meth:`Cell.forward`."""
        hidden, state = self.cell(self.norm_cell(x), state)
        return self._add_branches(x, self.cell_out(hidden)), state

    def enter(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` [B, T, C] -> what the recurrence reads, time first [T, B, G * C], and a zero state [B, C] of its dtype."""
        normed = self.norm_cell(x)
        return self.cell.project(normed.transpose(0, 1)), normed.new_zeros((len(x), self.cell.hidden_size))

    def leave(self, x: Tensor, states: Tensor) -> Tensor:
        """Input ``x`` [B, T, C] and the states s_1 .. s_T, time first [T, B, C] -> the block's output [B, T, C]."""
        return self._add_branches(x, self.cell_out(states.transpose(0, 1)))
