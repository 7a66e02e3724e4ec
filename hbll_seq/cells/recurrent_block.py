"""A recurrent layer as a block of the hierarchy over depth: the time x depth grid.

Shapes: B batch, T tokens, C width of the stream and of the cell, G gates.
"""

from __future__ import annotations

from torch import Tensor, nn

from hbll_seq.cells.recurrent import RecurrentState, make_cell
from hbll_seq.cells.residual import ResidualBlock, make_norm
from hbll_seq.config import HBLLConfig


class RecurrentBlock(ResidualBlock):
    """``x + out(cell(norm(x)))``, then ``+ mlp(norm(.))``: the Transformer block with a recurrence in place of attention.

    Its memory is one vector [B, C], however long the text. ``forward`` walks the recurrence transition by transition:
    differentiated it is backpropagation through time. Training by messages evaluates the same recurrence through
    :meth:`enter` and :meth:`leave` (``time_layer.py``).

    Args:
        config: ``mlp_ratio=0`` leaves the MLP branch out.
        kind: of the cell, see :func:`hbll_seq.cells.recurrent.make_cell`.
    """

    def __init__(self, config: HBLLConfig, kind: str):
        super().__init__()
        self.norm_cell = make_norm(config)
        self.cell = make_cell(kind, config.n_embd, config.n_embd)
        self.cell_out = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self._add_mlp(config)
        self._start([self.mlp_in] if self.has_mlp else [], [self.cell_out, *([self.mlp_out] if self.has_mlp else [])])

    def initial_state(self, start: Tensor | None = None) -> RecurrentState:
        """See :meth:`Cell.initial_state`."""
        return self.cell.initial_state(start)

    def forward(self, x: Tensor, state: RecurrentState | None = None) -> tuple[Tensor, RecurrentState]:
        """See :meth:`Cell.forward`."""
        hidden, state = self.cell(self.norm_cell(x), state)
        return self._add_branches(x, self.cell_out(hidden)), state

    def enter(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the recurrence reads of ``x`` [B, T, C], time first [T, B, G * C], and the state zero [B, C] in its dtype."""
        normed = self.norm_cell(x)
        return self.cell.project(normed.transpose(0, 1)), normed.new_zeros((len(x), self.cell.hidden_size))

    def leave(self, x: Tensor, states: Tensor) -> Tensor:
        """The block's output [B, T, C] of its input ``x`` and the recurrence's states s_1 .. s_T, time first [T, B, C]."""
        return self._add_branches(x, self.cell_out(states.transpose(0, 1)))
