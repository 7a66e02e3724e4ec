"""Elman's recurrent cell."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hbll_seq.layers.gate_arithmetic import add_, by_tiles, is_large, tanh_
from hbll_seq.layers.recurrent import Jacobian, RecurrentCell
from hbll_seq.utils.values import check_choice


class ElmanCell(RecurrentCell):
    """``s_t = phi(W_ih x_t + b_ih + W_hh s_{t-1} + b_hh)`` (Elman 1990); tanh: equations of torch.nn.RNN.

    Args:
        input_size, hidden_size: see :class:`RecurrentCell`.
        nonlinearity: ``"tanh"`` or ``"sigmoid"``.

    Raises:
        ValueError: the nonlinearity is another one.
    """

    def __init__(self, input_size: int, hidden_size: int, nonlinearity: str = "tanh"):
        check_choice("nonlinearity", nonlinearity, ("tanh", "sigmoid"))
        super().__init__(input_size, hidden_size)
        self.nonlinearity = nonlinearity

    def transition(self, state: Tensor, projected: Tensor) -> Tensor:
        """See :meth:`RecurrentCell.transition`."""
        if is_large(projected) and not torch.is_grad_enabled():
            return by_tiles(self.transition, state, projected)
        before = add_(F.linear(state, self.weight_hh, self.bias_hh).to(state.dtype), projected)
        return tanh_(before) if self.nonlinearity == "tanh" else before.sigmoid_()

    def differentiate(self, state: Tensor, projected: Tensor) -> tuple[Tensor, Jacobian]:
        """See :meth:`RecurrentCell.differentiate`: phi' of tanh is 1 - s^2, of sigmoid s (1 - s)."""
        output = self.transition(state, projected)
        s = output.detach()
        slope = 1 - s * s if self.nonlinearity == "tanh" else s - s * s
        return output, Jacobian(None, slope, self.weight_hh.detach())
