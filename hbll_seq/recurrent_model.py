"""A recurrent network between an embedding and a readout: what the hierarchy over time trains and what is deployed.

Shapes: B batch, T steps, I symbol width, H hidden width, V outputs. Inside, time is the first dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hbll_seq.cells.recurrent import RecurrentCell, RecurrentState
from hbll_seq.cross_entropy import linear_cross_entropy
from hbll_seq.posterior import IGNORE_INDEX, TARGET_FAMILIES

READOUTS = ("every", "last")


class RecurrentModel(nn.Module):
    """``s_t = cell(s_{t-1}, embed(x_t))``, and a head that reads the states.

    Args:
        cell: the deployed transition f_0.
        head: module from a state [..., H] to the parameters of ``p(y | s)``, such as logits.
        embed: module from raw inputs [T, B, ...] to symbols [T, B, I]; None where they are symbols already.
        readout: ``"every"``: each step has a target; ``"last"``: one per sequence, whose loss is half that of the last
            state and half the mean over all (METHOD 2.4).
        target_family: see :class:`hbll_seq.depth.DepthHierarchy`.

    Raises:
        ValueError: readout or family is unknown.
    """

    def __init__(
        self,
        cell: RecurrentCell,
        head: nn.Module,
        embed: nn.Module | None = None,
        *,
        readout: str = "every",
        target_family: str = "categorical",
    ):
        super().__init__()
        for name, value, allowed in (("readout", readout, READOUTS), ("target_family", target_family, TARGET_FAMILIES)):
            if value not in allowed:
                raise ValueError(f"{name}={value!r}: allowed are {', '.join(allowed)}")
        self.cell, self.head = cell, head
        self.embed = embed if embed is not None else nn.Identity()
        self.readout, self.target_family = readout, TARGET_FAMILIES[target_family]()

    def prepare(self, inputs: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the cell reads [B, T, ...] and the targets; a language model shifts here."""
        if labels is None:
            raise ValueError("labels=None: this model needs labels to be scored on; pass them")
        return inputs, labels

    def symbols(self, x: Tensor) -> Tensor:
        """``x`` [B, T, ...] -> embedded, time first: [T, B, I]."""
        return self.embed(x.transpose(0, 1))

    def nats(self, states: Tensor, targets: Tensor) -> Tensor:
        """Mean of ``-log p(y | s)`` over what is scored: s_1 .. s_T [T, B, H], targets [B, T, ...] or, "last", [B, ...]."""
        if self.readout == "every":
            return self._mean_nats(states, targets.transpose(0, 1))
        everywhere = targets.expand(len(states), *targets.shape)
        return 0.5 * (self._mean_nats(states[-1], targets) + self._mean_nats(states, everywhere))

    def _mean_nats(self, states: Tensor, targets: Tensor) -> Tensor:
        n_scored = self.target_family.n_scored(states.shape[:-1].numel(), targets)
        return 0.5 * self.target_family.discrepancy(self.head(states), targets.contiguous()).sum() / n_scored

    def initial_state(self, batch_size: int) -> Tensor:
        """h_0 = 0, [B, H]."""
        return next(self.cell.parameters()).new_zeros((batch_size, self.cell.hidden_size))

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The deployed network: raw inputs [B, T, ...], h_0 [B, H] -> head of all states [B, T, V], last state [B, H]."""
        y, last = self.cell(self.symbols(inputs).transpose(0, 1), RecurrentState(state))
        return self.head(y), last.hidden


class RecurrentLM(RecurrentModel):
    """A language model: token embedding, one recurrent cell, linear readout.

    Args:
        vocab_size: V.
        cell: its ``input_size`` is the embedding's width.
    """

    def __init__(self, vocab_size: int, cell: RecurrentCell):
        super().__init__(cell, nn.Linear(cell.hidden_size, vocab_size), nn.Embedding(vocab_size, cell.input_size))

    def prepare(self, inputs: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Token windows [B, T + 1] -> what is read [B, T] and the token that follows each position [B, T]."""
        labels = inputs if labels is None else labels
        if inputs.dim() != 2 or inputs.shape[1] < 2 or labels.shape != inputs.shape:
            raise ValueError(
                f"inputs {tuple(inputs.shape)} with labels {tuple(labels.shape)}: both must be [batch, T + 1] with T of "
                "at least 1; the model shifts them itself"
            )
        return inputs[:, :-1], labels[:, 1:]

    def _mean_nats(self, states: Tensor, targets: Tensor) -> Tensor:
        n_scored = self.target_family.n_scored(0, targets)
        # the bias as one more feature, so that logits exist only in chunks
        hidden = torch.cat((states.flatten(0, -2), states.new_ones((targets.numel(), 1))), dim=1)
        weight = torch.cat((self.head.weight, self.head.bias[:, None]), dim=1)
        return linear_cross_entropy(hidden, weight, targets.flatten(), IGNORE_INDEX) / n_scored
