"""A recurrent cell and a linear head that classify whole sequences: what the hierarchy over time deploys.

See docs/method.md 1.5.

Shapes: B batch, L values of a sequence, T steps (N where all values are read), I values a step, H hidden width,
V classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hbll_seq.layers.cells import CELL_KINDS, make_cell
from hbll_seq.models.config import ModelConfig, check_size
from hbll_seq.models.hub import HubMixin
from hbll_seq.models.model_card import CardText
from hbll_seq.models.recurrent import RecurrentModel
from hbll_seq.utils.checks import as_classes, check_inputs
from hbll_seq.utils.padding import as_lengths, check_side, last_of, to_right
from hbll_seq.utils.reading import quote
from hbll_seq.utils.seeds import mix_seeds
from hbll_seq.utils.values import as_whole, check_choice

#: the largest number of values, steps, classes and units: beyond any sensible classifier, and made in a second or two.
MAX_SIZE = 1 << 20


@dataclass(frozen=True)
class HBLLClassifierConfig(ModelConfig):
    """Shape of a recurrent classifier, and how it reads a sequence.

    Attributes:
        n_inputs: values L of a sequence, such as the pixels of an image.
        n_steps: N, steps in which they are read, ``ceil(L / N)`` values each.
        n_classes: V.
        cell: kind of cell, one of ``CELL_KINDS``.
        hidden_size: H.
        permutation_seed: the values are read in the order :func:`fixed_order` makes of this number; None: as they come.

    Raises:
        ValueError: a value is out of range; the message says which, what is allowed and what to do.
    """

    model_type: ClassVar[str] = "hbll-classifier"

    n_inputs: int = 784
    n_steps: int = 16
    n_classes: int = 10
    cell: str = "gru"
    hidden_size: int = 128
    permutation_seed: int | None = None

    @property
    def step_size(self) -> int:
        """Values I of a step, ``ceil(n_inputs / n_steps)``."""
        return -(-self.n_inputs // self.n_steps)

    def __post_init__(self):
        for name in ("n_inputs", "n_steps", "n_classes", "hidden_size"):
            check_size(name, getattr(self, name), 1, MAX_SIZE)
        if self.n_steps > self.n_inputs:
            raise ValueError(
                f"n_steps={self.n_steps} of n_inputs={self.n_inputs}: a step reads one value or more, so choose at most "
                f"{self.n_inputs} steps"
            )
        if self.n_classes < 2:
            raise ValueError(f"n_classes={self.n_classes}: must be at least 2, or there is nothing to tell apart")
        check_choice("cell", self.cell, CELL_KINDS)
        seed = self.permutation_seed
        if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 1 << 64):
            raise ValueError(
                f"permutation_seed={quote(seed)}: must be a whole number of at least 0, or None to read the values as they "
                "come; and below 2**64"
            )


def fixed_order(n: int, seed: int | None) -> list[int]:
    """A permutation of 0 .. n - 1; None is the identity.

    It depends on the seed alone, on any machine and with any version of torch, so that a saved seed is a saved permutation.
    """
    return list(range(n)) if seed is None else sorted(range(n), key=lambda i: mix_seeds(seed, i))


class HBLLForSequenceClassification(HubMixin, RecurrentModel):
    """One recurrent cell over the steps of a sequence, and a linear head on its last state.

    Train it with :class:`hbll_seq.RecurrentLocalObjective`. Half the loss is that of the last state, and half is the mean
    over all states (docs/method.md 2.4). A tree that training needs is not part of the model.

    Args:
        config: shape of the model.
    """

    config_class = HBLLClassifierConfig

    def __init__(self, config: HBLLClassifierConfig):
        cell = make_cell(config.cell, config.step_size, config.hidden_size)
        super().__init__(cell, nn.Linear(config.hidden_size, config.n_classes), readout="last")
        self.config = config
        # not in the file of weights: config.json determines it
        self.register_buffer("order", torch.tensor(fixed_order(config.n_inputs, config.permutation_seed)), persistent=False)

    def chunks(self, inputs: Tensor, lengths: Tensor | Sequence[int] | None = None, padding_side: str = "right") -> Tensor:
        """Values [B, L] -> what the cell reads, [B, N, I]: the values in the model's order, cut into steps.

        Where ``N * I`` is more than L, zeros stand before the first value (docs/method.md 1.5). Chunks [B, T, I] are
        returned as they are.

        Args:
            inputs: values or chunks.
            lengths: [B] how many chunks of each row are real, which are returned first, with zeros behind; None: all.
            padding_side: where the others are in ``inputs``, ``"right"`` (behind) or ``"left"``.

        Raises:
            ValueError: inputs of another shape, not of floating point or on another device, or lengths that do not fit.
        """
        check_inputs("inputs", inputs, self)
        check_side(padding_side, lengths)
        config, shape = self.config, tuple(inputs.shape)
        is_flat = inputs.dim() == 2 and shape[1] == config.n_inputs
        if not is_flat and (inputs.dim() != 3 or shape[1] < 1 or shape[2] != config.step_size):
            raise ValueError(
                f"inputs of shape {shape}: must be [batch, {config.n_inputs}] values, or [batch, steps, {config.step_size}] "
                "chunks of them; flatten or cut them, or make a model of another n_inputs or n_steps"
            )
        if not inputs.is_floating_point():
            raise ValueError(f"inputs of {inputs.dtype}: must be of floating point, as pixels of 0 to 1: x.float() / 255")
        inputs = inputs.to(self.head.weight.dtype)
        if lengths is not None and is_flat:
            raise ValueError(f"lengths with inputs of shape {shape}: they count chunks [batch, steps, {config.step_size}]")
        if not is_flat:
            return inputs if lengths is None else to_right(inputs, as_lengths(lengths, *shape[:2]), padding_side)
        padding = config.n_steps * config.step_size - config.n_inputs
        return F.pad(inputs[:, self.order], (padding, 0)).unflatten(1, (config.n_steps, config.step_size))

    def prepare(
        self,
        inputs: Tensor,
        labels: Tensor | None,
        lengths: Tensor | Sequence[int] | None = None,
        padding_side: str = "right",
    ) -> tuple[Tensor, Tensor]:
        """What an objective reads: chunks [B, T, I] and the class of every sequence [B].

        Args:
            inputs, lengths, padding_side: see :meth:`chunks`.
            labels: [B] of int64, in 0 .. V - 1, or -100 where a sequence is not to be scored.

        Raises:
            ValueError: there are no labels, or they or the inputs do not fit.
        """
        chunks = self.chunks(inputs, lengths, padding_side)
        if labels is None:
            raise ValueError("labels=None: this model needs the class of every sequence to be scored on; pass them")
        return chunks, as_classes(labels, self.config.n_classes, chunks.shape[:1])

    def forward(self, inputs: Tensor, lengths: Tensor | Sequence[int] | None = None, padding_side: str = "right") -> Tensor:
        """The deployed network, step by step: inputs (see :meth:`chunks`) -> logits [B, V] of each row's last state."""
        chunks = self.chunks(inputs, lengths, padding_side)
        states, _ = self.cell(chunks)
        if lengths is None:
            return self.head(states[:, -1])
        return self.head(last_of(states.transpose(0, 1), as_lengths(lengths, *chunks.shape[:2])))

    @torch.no_grad()
    def predict(
        self,
        inputs: Tensor,
        batch_size: int = 1000,
        lengths: Tensor | Sequence[int] | None = None,
        padding_side: str = "right",
    ) -> Tensor:
        """The most likely class of every sequence, [B] of int64, evaluated in batches; see :meth:`chunks`.

        Raises:
            ValueError: the inputs cannot be read, or the batch size is below 1.
        """
        batch_size = as_whole("batch_size", batch_size, 1)
        check_inputs("inputs", inputs, self)
        check_side(padding_side, lengths)
        if lengths is None:
            return torch.cat([self(batch).argmax(-1) for batch in inputs.split(batch_size)])
        parts = as_lengths(lengths, *inputs.shape[:2]).split(batch_size)
        return torch.cat([self(x, n, padding_side).argmax(-1) for x, n in zip(inputs.split(batch_size), parts)])

    def card_text(self) -> CardText:
        """See :meth:`HubMixin.card_text`."""
        config, n_parameters = self.config, sum(p.numel() for p in self.parameters())
        about = (
            f"A classifier of sequences of {config.n_inputs} values with {n_parameters:,} parameters: one recurrent cell "
            f"({config.cell}) that\nreads them in {config.n_steps} steps of {config.step_size}, and a linear head on its "
            "last state. It is the deployed cell of a hierarchy over time."
        )
        usage = f"import torch\n\nprint(model.predict(torch.rand(2, {config.n_inputs})))  # your own values, [batch, values]"
        return CardText(None, "HBLL sequence classifier", about, usage)

    def extra_repr(self) -> str:
        """The configuration, for ``print(model)``."""
        return f"{self.config}"
