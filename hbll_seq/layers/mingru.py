"""The minimal gated unit, whose gates read the input alone."""

from __future__ import annotations

import torch
from torch import Tensor

from hbll_seq.engine.scan import affine_scan
from hbll_seq.layers.recurrent import Jacobian, RecurrentCell, RecurrentState


class MinGRUCell(RecurrentCell):
    """The minimal gated unit (Feng et al. 2024, arXiv 2410.01201): its gates do not read the state.

    ``z = sigmoid(W_z x + b_z)``, ``s' = (1 - z) s + z (W_n x + b_n)``. The Jacobian is diagonal and does not depend on the
    state, so that one forward iteration with the diagonal is exact, and so is the first scan backward.
    """

    n_gates = 2
    has_recurrent_weight = False

    def transition(self, state: Tensor, projected: Tensor) -> Tensor:
        """See :meth:`RecurrentCell.transition`."""
        z, candidate = projected.to(state.dtype).chunk(2, dim=-1)
        return torch.lerp(state, candidate, z.sigmoid())

    def differentiate(self, state: Tensor, projected: Tensor) -> tuple[Tensor, Jacobian]:
        """See :meth:`RecurrentCell.differentiate`: the diagonal is 1 - z."""
        z, candidate = projected.to(state.dtype).chunk(2, dim=-1)
        z = z.sigmoid()
        return torch.lerp(state, candidate, z), Jacobian(1 - z.detach())

    def _set_keeping_odds(self, odds: Tensor) -> None:
        self.bias_ih[: self.hidden_size] = -odds.log()  # z, which replaces the state where it is 1

    def forward(self, x: Tensor, state: RecurrentState | None = None) -> tuple[Tensor, RecurrentState]:
        """See :meth:`RecurrentCell.forward`; without gradients all states come from one scan."""
        if torch.is_grad_enabled():
            return super().forward(x, state)
        hidden, padding, mask = self._begin(x, state)
        z, candidate = self.project(x).transpose(0, 1).to(hidden.dtype).chunk(2, dim=-1)  # [T, B, H]
        z = z.sigmoid()
        if mask is not None:
            z = z.masked_fill(mask.T[..., None], 0.0)
        states = affine_scan(z * candidate, 1 - z, hidden)
        return states.transpose(0, 1), RecurrentState(states[-1], padding)
