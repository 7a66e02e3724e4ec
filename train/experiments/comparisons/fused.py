"""torch's fused recurrent layers as a baseline of speed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from comparisons.time_methods import TimeMethod
from hbll_seq.layers.elman import ElmanCell
from hbll_seq.layers.gru import GRUCell
from hbll_seq.models.recurrent import RecurrentModel
from hbll_seq.objectives.recurrent import RecurrentObjective, RecurrentOutput


class FusedObjective(RecurrentObjective):
    """Backprop through torch's fused layer with the weights of the model's cell, which it copies.

    Args:
        model: its cell is a GRU, or an Elman cell with tanh.

    Raises:
        ValueError: the cell is another one.
    """

    def __init__(self, model: RecurrentModel):
        super().__init__(model)
        cell = model.cell
        if type(cell) is not GRUCell and not (type(cell) is ElmanCell and cell.nonlinearity == "tanh"):
            raise ValueError("method 'fused': torch has layers for the cells gru and elman alone; leave it out")
        self.layer = (nn.GRU if type(cell) is GRUCell else nn.RNN)(cell.input_size, cell.hidden_size)
        with torch.no_grad():
            for name, parameter in cell.named_parameters():
                getattr(self.layer, f"{name}_l0").copy_(parameter)

    def _losses(self, x: Tensor, targets: Tensor, s0: Tensor) -> RecurrentOutput:
        states, last = self.layer(self.model.symbols(x), s0[None])
        loss = self.model.nats(states, targets)
        return RecurrentOutput(loss, loss.unsqueeze(0), {"ce": loss.detach()}, last[0].detach())


class FusedMethod(TimeMethod):
    """Backpropagation through torch's fused layer."""

    def objective(self, model: RecurrentModel, seed: int = 0) -> FusedObjective:
        """See :meth:`Method.objective`."""
        return FusedObjective(model)
