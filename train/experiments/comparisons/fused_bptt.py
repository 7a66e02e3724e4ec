"""Training by backpropagation through torch's fused layer: the same gradients as "bptt", by the loop that torch has."""

from __future__ import annotations

from comparisons.fused import FusedMethod, FusedObjective
from hbll_seq.models.recurrent import RecurrentModel

#: its name on the command line
FUSED = "fused"
CELLS = ("gru", "elman")


class FusedBPTTObjective(FusedObjective):
    """:class:`FusedObjective` whose layer and the model's cell are one set of weights, so that the cell learns what the layer
    does and can be deployed.

    Args:
        model: its cell is a GRU, or an Elman cell with tanh.
    """

    def __init__(self, model: RecurrentModel):
        super().__init__(model)
        for name in [name for name, _ in model.cell.named_parameters()]:
            setattr(model.cell, name, getattr(self.layer, f"{name}_l0"))


class FusedBPTT(FusedMethod):
    """The method "fused" of ``compare_rnn.py``."""

    def objective(self, model: RecurrentModel, seed: int = 0) -> FusedBPTTObjective:
        """See :meth:`Method.objective`.

        Raises:
            ValueError: torch has no layer of this kind of cell.
        """
        if self.cell not in CELLS:
            raise ValueError(f"method {self.name!r} with cell={self.cell!r}: torch has fused layers of {', '.join(CELLS)}; "
                             "leave the method out, or choose one of these")  # fmt: skip
        return FusedBPTTObjective(model)
