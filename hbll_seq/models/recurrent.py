"""A recurrent network between an embedding and a readout: the model that is trained over time, and deployed.

Shapes: B batch, T steps, I symbol width, H hidden width, V outputs. Inside, time is the first dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hbll_seq.layers.cross_entropy import linear_cross_entropy
from hbll_seq.layers.recurrent import RecurrentCell, RecurrentState
from hbll_seq.tree.posterior import TARGET_FAMILIES, Categorical
from hbll_seq.utils.checks import IGNORE_INDEX, as_token_ids, check_inputs, check_state, shifted_labels
from hbll_seq.utils.modules import plain_module
from hbll_seq.utils.padding import as_lengths, check_side, is_real, last_of, to_right
from hbll_seq.utils.values import as_whole, check_choice

READOUTS = ("every", "last")


def check_cell(cell: object) -> None:
    """Raises ValueError unless ``cell`` is a :class:`RecurrentCell`, compiled or not."""
    if not isinstance(cell, nn.Module) or not isinstance(plain_module(cell), RecurrentCell):
        raise ValueError(
            f"cell={type(cell).__name__} object: must be a RecurrentCell, such as make_cell('gru', 64, 128); torch's own "
            "cells do not give the Jacobian, so derive a class from RecurrentCell for a cell of your own"
        )


class RecurrentModel(nn.Module):
    """``s_t = cell(s_{t-1}, embed(x_t))``, and a head that reads the states.

    Args:
        cell: the deployed transition f_0.
        head: module from a state [..., H] to the parameters of ``p(y | s)``, such as logits.
        embed: module from raw inputs [T, B, ...] to symbols [T, B, I]; None where they are symbols already.
        readout: ``"every"``: each step has a target; ``"last"``: one per sequence, whose loss is half that of the last
            state and half the mean over all (docs/method.md 2.4).
        target_family: see :class:`hbll_seq.models.hierarchy.DepthHierarchy`.

    Raises:
        ValueError: the cell is no RecurrentCell, or readout or family is unknown.
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
        check_cell(cell)
        check_choice("readout", readout, READOUTS)
        check_choice("target_family", target_family, TARGET_FAMILIES)
        self.cell, self.head = cell, head
        self.embed = embed if embed is not None else nn.Identity()
        self.readout, self.target_family = readout, TARGET_FAMILIES[target_family]()

    def check(self, inputs: Tensor, name: str = "inputs") -> Tensor:
        """``inputs`` as :meth:`symbols` reads them, [B, T, ...].

        Raises:
            ValueError: they are empty, or on another device than the model.
        """
        check_inputs(name, inputs, self)
        if inputs.dim() < 2:
            raise ValueError(f"{name} of shape {tuple(inputs.shape)}: must be [batch, steps, ...]")
        return inputs

    def prepare(
        self,
        inputs: Tensor,
        labels: Tensor | None,
        lengths: Tensor | Sequence[int] | None = None,
        padding_side: str = "right",
    ) -> tuple[Tensor, Tensor]:
        """What the cell reads [B, T, ...] and the targets; a language model shifts here.

        Args:
            inputs: [B, T, ...].
            labels: [B, T, ...], or [B, ...] with one readout a sequence.
            lengths: [B] how many steps of each row are real, best on the CPU; None: all. The others may hold anything: what
                is returned has the real steps first and zeros behind them.
            padding_side: where the padding is, ``"right"`` (behind) or ``"left"``.

        Raises:
            ValueError: there are no labels, or something does not fit.
        """
        check_side(padding_side, lengths)
        if lengths is not None and isinstance(inputs, Tensor) and inputs.dim() > 1:
            lengths = as_lengths(lengths, *inputs.shape[:2])
            inputs = to_right(inputs, lengths, padding_side)
        inputs = self.check(inputs)
        if labels is None:
            raise ValueError("labels=None: this model needs labels to be scored on; pass them")
        if self.readout == "every" and labels.shape[:2] != inputs.shape[:2] or len(labels) != len(inputs):
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} with inputs of shape {tuple(inputs.shape)}: must have "
                "as many rows, and as many steps where each has a target"
            )
        if lengths is not None and self.readout == "every":
            labels = to_right(labels, lengths, padding_side)
        return inputs, labels

    def symbols(self, x: Tensor) -> Tensor:
        """``x`` [B, T, ...] -> embedded, time first: [T, B, I]."""
        return self.embed(x.transpose(0, 1))

    def nats(self, states: Tensor, targets: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Mean of ``-log p(y | s)`` over what is scored; 0 where nothing is.

        Args:
            states: s_1 .. s_T [T, B, H].
            targets: [B, T, ...] or, "last", [B, ...].
            lengths: [B], steps of each row that count, from the first one on; None: all. "every" is the mean over all steps
                that count, "last" over sequences, of which each is the mean over its own steps and its last one.
        """
        if self.readout == "every":
            targets = targets.transpose(0, 1)
            return self._mean_nats(states, targets) if lengths is None else self._mean_of_real(states, targets, lengths)
        everywhere = targets.expand(len(states), *targets.shape)
        if lengths is None:
            return 0.5 * (self._mean_nats(states[-1], targets) + self._mean_nats(states, everywhere))
        of_steps = self._nats_of_real(states, everywhere, is_real(lengths, len(states), states.device))
        of_sequences = of_steps.sum(0) / lengths.to(states.device)
        mean = of_sequences.sum() / self.target_family.n_scored(len(of_sequences), targets)
        return 0.5 * (self._mean_nats(last_of(states, lengths), targets) + mean)

    def nats_of_part(
        self, states: Tensor, targets: Tensor, first: int, n_steps: int, lengths: Tensor | None = None
    ) -> Tensor:
        """What some steps have in :meth:`nats` of a sequence: over parts that make up the sequence it is their sum.

        Args:
            states: s_{first + 1} .. s_{first + n} [n, B, H].
            targets, lengths: see :meth:`nats`; of the whole sequence.
            first: steps before this part.
            n_steps: T, of the whole sequence.
        """
        n_here = len(states)
        real = None if lengths is None else is_real(lengths, n_steps, states.device)
        if self.readout == "every":
            whole = targets.transpose(0, 1)
            if real is not None and not isinstance(self.target_family, Categorical):
                of_steps = self._nats_of_real(states, whole[first : first + n_here], real[first : first + n_here])
                return of_steps.sum() / real.sum()
            whole = whole if real is None else whole.masked_fill(~real, IGNORE_INDEX)
            return self._share_of_nats(states, whole[first : first + n_here], whole, n_steps)
        everywhere = targets.expand(n_here, *targets.shape)
        if lengths is None:
            mean = self._share_of_nats(states, everywhere, targets.expand(n_steps, *targets.shape), n_steps)
            return 0.5 * (mean + self._mean_nats(states[-1], targets)) if first + n_here == n_steps else 0.5 * mean
        lengths = lengths.to(states.device)
        of_sequences = self._nats_of_real(states, everywhere, real[first : first + n_here]).sum(0) / lengths
        mean = of_sequences.sum() / self.target_family.n_scored(len(of_sequences), targets)
        ending = ((lengths > first) & (lengths <= first + n_here)).nonzero().squeeze(1)
        if not len(ending):
            return 0.5 * mean
        last = states[lengths[ending] - 1 - first, ending]
        scored = 0.5 * self.target_family.energy(self.head(last), targets[ending].contiguous()).sum()
        return 0.5 * (scored / self.target_family.n_scored(len(targets), targets) + mean)

    def _share_of_nats(self, states: Tensor, targets: Tensor, whole: Tensor, n_steps: int) -> Tensor:
        """The nats of [n, B, H] by the number of targets in the whole sequence [T, B, ...], T being ``n_steps``."""
        n_rows = states.shape[1]
        n_here = self.target_family.n_scored(len(states) * n_rows, targets)
        # in this order, since a quotient of two numbers of targets is in single precision
        return self._mean_nats(states, targets) * n_here / self.target_family.n_scored(n_steps * n_rows, whole)

    def _mean_nats(self, states: Tensor, targets: Tensor) -> Tensor:
        n_scored = self.target_family.n_scored(states.shape[:-1].numel(), targets)
        return 0.5 * self.target_family.energy(self.head(states), targets.contiguous()).sum() / n_scored

    def _mean_of_real(self, states: Tensor, targets: Tensor, lengths: Tensor) -> Tensor:
        real = is_real(lengths, len(states), states.device)
        if isinstance(self.target_family, Categorical):
            return self._mean_nats(states, targets.masked_fill(~real, IGNORE_INDEX))
        return self._nats_of_real(states, targets, real).sum() / real.sum()

    def _nats_of_real(self, states: Tensor, targets: Tensor, real: Tensor) -> Tensor:
        """Of each step that counts, 0 of the others: [T, B]."""
        return (0.5 * self.target_family.energy(self.head(states), targets.contiguous())).masked_fill(~real, 0.0)

    def initial_state(self, batch_size: int) -> Tensor:
        """h_0 = 0, [B, H]."""
        return next(self.cell.parameters()).new_zeros((batch_size, self.cell.hidden_size))

    def check_state(self, state: Tensor, batch_size: int) -> None:
        """Raises ValueError unless ``state`` is [B, H], finite and like the model's parameters."""
        check_state("state", state, (batch_size, self.cell.hidden_size), next(self.cell.parameters()))

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The deployed network: raw inputs [B, T, ...], h_0 [B, H] -> head of all states [B, T, V], last state [B, H].

        Raises:
            ValueError: the inputs are empty or on another device, or the state does not fit them.
        """
        inputs = self.check(inputs)
        if state is not None:
            self.check_state(state, len(inputs))
        y, last = self.cell(self.symbols(inputs).transpose(0, 1), RecurrentState(state))
        return self.head(y), last.hidden


class RecurrentLM(RecurrentModel):
    """A language model: token embedding, one recurrent cell, linear readout.

    Args:
        vocab_size: V.
        cell: its ``input_size`` is the embedding's width.

    Raises:
        ValueError: the size is not a whole number of at least 1, or the cell is no RecurrentCell.
    """

    def __init__(self, vocab_size: int, cell: RecurrentCell):
        vocab_size = as_whole("vocab_size", vocab_size, 1)
        check_cell(cell)
        super().__init__(cell, nn.Linear(cell.hidden_size, vocab_size), nn.Embedding(vocab_size, cell.input_size))

    def check(self, inputs: Tensor, name: str = "inputs") -> Tensor:
        """Token ids [B, T]. Raises ValueError for anything else, and for ids outside the vocabulary."""
        return as_token_ids(name, inputs, self.embed.num_embeddings, self)

    def prepare(
        self,
        inputs: Tensor,
        labels: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        padding_side: str = "right",
    ) -> tuple[Tensor, Tensor]:
        """Token windows [B, T + 1] -> what is read [B, T] and the token that follows each position [B, T].

        ``labels`` defaults to ``inputs``; -100 where a token is not scored. ``lengths`` counts the tokens of each window, two
        or more; see :meth:`RecurrentModel.prepare`.
        """
        check_side(padding_side, lengths)
        if lengths is not None and isinstance(inputs, Tensor) and inputs.dim() == 2:
            lengths = as_lengths(lengths, *inputs.shape, least=2)
            if labels is not None and labels.shape == inputs.shape:
                labels = to_right(labels, lengths, padding_side, IGNORE_INDEX)
            inputs = to_right(inputs, lengths, padding_side)
        inputs = self.check(inputs)
        labels = shifted_labels(inputs, labels, self.embed.num_embeddings)
        return inputs[:, :-1], labels[:, 1:]

    def _mean_nats(self, states: Tensor, targets: Tensor) -> Tensor:
        n_scored = self.target_family.n_scored(0, targets)
        # the bias as one more feature, so that logits exist only in chunks
        hidden = torch.cat((states.flatten(0, -2), states.new_ones((targets.numel(), 1))), dim=1)
        weight = torch.cat((self.head.weight, self.head.bias[:, None]), dim=1)
        return linear_cross_entropy(hidden, weight, targets.flatten(), IGNORE_INDEX) / n_scored
