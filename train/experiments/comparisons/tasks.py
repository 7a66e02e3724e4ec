"""What the methods of a comparison learn: batches, and the figures of a model.

Every run of a comparison sees the same batches in the same order.

Shapes: B rows of a batch, T steps of a window.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from comparisons.depth_methods import DepthMethod
from comparisons.words import current_setting
from hbll_seq.chains.time_tree import RecurrentTree
from hbll_seq.data.tasks import SPLITS, count_correct
from hbll_seq.data.tasks import Task as Synthetic
from hbll_seq.data.windows import TokenWindows
from hbll_seq.evaluation.perplexity import evaluate_paths
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.recurrent import RecurrentLM
from hbll_seq.models.sequence_classification import HBLLForSequenceClassification
from hbll_seq.objectives.recurrent import RecurrentBackpropObjective
from hbll_seq.tree.posterior import IGNORE_INDEX
from hbll_seq.utils.seeds import mix_seeds


class Task(ABC):
    """What is learned.

    metric: name of the figure in a row.
    fingerprint: identifies the data.
    carry_state: whether each row of a batch goes on where it ended the step before: recurrent networks then start from
        their last states.
    """

    metric: str
    fingerprint: str
    carry_state: bool = False

    @abstractmethod
    def batch(self, step: int, batch_size: int, seed: int) -> tuple[Tensor, Tensor | None]:
        """Inputs and labels of a training step, a pure function of the arguments. Of a language model both are tokens
        [B, T + 1], and without labels the tokens themselves are scored."""

    @abstractmethod
    def evaluate(self, model: nn.Module, split: str, n_batches: int, **options: Any) -> list[dict] | dict:
        """Figures of a deployed network: by path rows with ``name``, ``path``, ``depth``, ``loss`` and the metric, or the
        figures of a single one by name."""


class LanguageTask(Task):
    """A task on tokens.

    vocab_size: ids are below it.
    context_length: T.
    """

    vocab_size: int
    context_length: int

    def model(self, method: DepthMethod, n_level: int, **sizes: Any) -> HBLLForCausalLM:
        """A new model over depth of a method for this task; sizes: of its configuration."""
        method = replace(method, n_level=n_level)
        return HBLLForCausalLM(method.model_config(self.vocab_size, context_length=self.context_length, **sizes))


# ------------------------------------------------------------------------------------------------------------ over depth


class Text(LanguageTask):
    """Next-token prediction; the figure is perplexity per token.

    Args:
        windows: by split.
        vocab_size: of the tokenizer.
        carry_state: rows read their own stretch of the text, window after window, in training as in the evaluation of what
            is deployed, with recurrent states carried on. False shuffles the windows and starts each from zero.
    """

    metric = "perplexity"

    def __init__(self, windows: dict[str, TokenWindows], vocab_size: int, carry_state: bool = False):
        self.windows, self.vocab_size, self.context_length = windows, vocab_size, windows["train"].context_length
        self.carry_state = carry_state
        self.fingerprint = windows["train"].stream.fingerprint

    def batch(self, step: int, batch_size: int, seed: int) -> tuple[Tensor, None]:
        """See :meth:`Task.batch`."""
        if self.carry_state:
            return self.windows["train"].contiguous_batch(step, range(batch_size), batch_size, seed), None
        return self.windows["train"].batch(step, batch_size, seed), None

    def evaluate(
        self, model: HBLLForCausalLM, split: str, n_batches: int, *, paths: Mapping[str, Sequence[int]]
    ) -> list[dict]:
        """A row per path; of the first batches of 16 windows, which lie in 16 stretches where states are carried."""
        return evaluate_paths(model, self.windows[split], paths, max_batches=n_batches, carry_state=self.carry_state)


class SyntheticTask(LanguageTask):
    """A synthetic task; the figure is the accuracy in percent of the scored positions."""

    metric = "accuracy"

    def __init__(self, task: Synthetic):
        self.task, self.vocab_size, self.context_length = task, task.vocab_size, task.context_length
        parameters = f"{task.name} {sorted((k, v) for k, v in vars(task).items() if isinstance(v, int))}"
        self.fingerprint = current_setting({"text": parameters})["text"]

    def batch(self, step: int, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
        """See :meth:`Task.batch`."""
        return self.task.batch(step, batch_size, seed)

    @torch.no_grad()
    def evaluate(
        self, model: HBLLForCausalLM, split: str, n_batches: int, *, paths: Mapping[str, Sequence[int]]
    ) -> list[dict]:
        """A row per path; of batches of 32 windows."""
        device = next(model.parameters()).device
        totals = {name: [0.0, 0, 0] for name in paths}
        was_training = model.training
        model.eval()
        for step in range(n_batches):
            tokens, labels = (t.to(device) for t in self.task.batch(step, 32, 0, split))
            for name, path in paths.items():
                logits = model.run(tokens[:, :-1], path)
                nats = 0.5 * model.target_family.energy(logits, labels[:, 1:]).double().sum().item()
                for i, value in enumerate((nats, *count_correct(logits, labels))):
                    totals[name][i] += value
        model.train(was_training)
        return [
            {"name": name, "path": list(path), "depth": len(path), "loss": nats / n, "accuracy": 100 * right / n}
            for (name, path), (nats, right, n) in zip(paths.items(), totals.values())
        ]


# ------------------------------------------------------------------------------------------------------------- over time


class Stream(LanguageTask):
    """Next-token prediction on one long stream; the figure is bits per token. The state is carried across windows.

    Args:
        streams: split -> ids, 1-D.
        vocab_size: V.
        context_length: T.
        fingerprint: identifies the text and how it was cut into tokens.
    """

    metric, carry_state = "bits", True

    def __init__(self, streams: dict[str, np.ndarray], vocab_size: int, context_length: int, fingerprint: str):
        self.streams, self.vocab_size, self.context_length = streams, vocab_size, context_length
        self.fingerprint = fingerprint

    def batch(self, step: int, batch_size: int, seed: int) -> tuple[Tensor, None]:
        """See :meth:`Task.batch`: row b reads the b-th part of the text from a place that the seed chooses."""
        offset = int(np.random.default_rng(mix_seeds(seed, 0, 0)).integers(len(self.streams["train"])))
        return self._windows("train", step, batch_size, offset), None

    def _windows(self, split: str, step: int, batch_size: int, offset: int = 0) -> Tensor:
        stream = self.streams[split]
        first = offset + step * self.context_length + np.arange(batch_size)[:, None] * (len(stream) // batch_size)
        ids = stream.take(first + np.arange(self.context_length + 1), mode="wrap")
        return torch.from_numpy(ids.astype(np.int64))

    @torch.no_grad()
    def evaluate(self, model: RecurrentLM, split: str, n_batches: int) -> list[dict]:
        """One row, of 64 stretches of the split, ``n_batches`` windows of each.

        Raises:
            ValueError: the split is too short.
        """
        nats, state = 0.0, model.initial_state(64)
        n_batches = min(n_batches, len(self.streams[split]) // 64 // self.context_length)
        if n_batches < 1:
            raise ValueError(f"the {split} split has {len(self.streams[split])} tokens: 64 windows of {self.context_length} "
                             "are the least that can be evaluated; choose a smaller context length")  # fmt: skip
        objective = RecurrentBackpropObjective(model)
        for step in range(n_batches):
            output = objective(self._windows(split, step, 64), state=state)
            nats, state = nats + output.loss.item(), output.state
        return [{"depth": 1, "loss": nats / n_batches, "bits": nats / n_batches / math.log(2)}]


class Copying(LanguageTask):
    """Remember a few symbols over a delay (Hochreiter and Schmidhuber 1997; Arjovsky et al. 2016, arXiv 1511.06464).

    A window is ``length`` symbols, ``delay`` blanks, a sign, and the symbols again, of which only these are scored; the
    figure is their accuracy in percent. Each window starts from the zero state.

    Args:
        delay: blanks between.
        length: symbols to remember.
        n_symbols: their number of kinds.

    Raises:
        ValueError: an argument is out of range.
    """

    metric = "accuracy"

    def __init__(self, delay: int, length: int = 3, n_symbols: int = 8):
        for name, value, least in (("delay", delay, 1), ("length", length, 1), ("n_symbols", n_symbols, 2)):
            if value < least:
                raise ValueError(f"{name}={value}: must be at least {least}")
        self.delay, self.length, self.n_symbols = delay, length, n_symbols
        self.vocab_size, self.context_length = n_symbols + 2, delay + 2 * length
        self.fingerprint = f"copy {n_symbols} {length} {delay}"

    def batch(self, step: int, batch_size: int, seed: int, split: str = "train") -> tuple[Tensor, Tensor]:
        """See :meth:`Task.batch`."""
        rng = np.random.default_rng(mix_seeds(seed, SPLITS.index(split), step))
        symbols = torch.from_numpy(rng.integers(self.n_symbols, size=(batch_size, self.length)))
        blank = torch.full((batch_size, self.delay), self.n_symbols)
        sign = torch.full((batch_size, 1), self.n_symbols + 1)
        tokens = torch.cat((symbols, blank, sign, symbols), dim=1)
        labels = torch.full_like(tokens, IGNORE_INDEX)
        labels[:, -self.length :] = symbols
        tokens[:, -self.length : -1] = self.n_symbols  # the answers are not to be read
        return tokens, labels

    @torch.no_grad()
    def evaluate(self, model: RecurrentLM, split: str, n_batches: int) -> list[dict]:
        """One row, of batches of 64 windows."""
        nats, right, n = 0.0, 0, 0
        for step in range(n_batches):
            tokens, labels = self.batch(step, 64, 0, split)
            logits = model(tokens[:, :-1])[0][:, -self.length :]
            answers = labels[:, -self.length :]
            nats += nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten(), reduction="sum").item()
            right += int((logits.argmax(-1) == answers).sum())
            n += answers.numel()
        return [{"depth": 1, "loss": nats / n, "accuracy": 100 * right / n}]


# --------------------------------------------------------------------------------------------------------------- classes


class Classes(Task):
    """Whole sequences and their classes; the figure is the accuracy in percent.

    Args:
        data: ``"train"``, ``"test"`` and where there is one ``"validation"``: values [n, L] and classes [n].
        fingerprint: identifies them.
    """

    metric = "accuracy"

    def __init__(self, data: Mapping[str, tuple[Tensor, Tensor]], fingerprint: str = ""):
        self.data, self.fingerprint = dict(data), fingerprint
        self._epoch: tuple[tuple[int, int], Tensor] | None = None

    def to(self, device: str) -> Classes:
        """The same data on a device."""
        return type(self)({s: (values.to(device), labels.to(device)) for s, (values, labels) in self.data.items()})

    def batch(self, step: int, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
        """See :meth:`Task.batch`; of the sequences that :meth:`indices` names."""
        values, labels = self.data["train"]
        index = self.indices(step, batch_size, seed).to(values.device)
        return values[index], labels[index]

    def indices(self, step: int, batch_size: int, seed: int) -> Tensor:
        """The sequences of a step. The order of an epoch is a function of (seed, epoch); the sequences that do not fill a
        batch at its end are left out."""
        n = len(self.data["train"][1])
        epoch, place = divmod(step, n // batch_size)
        if self._epoch is None or self._epoch[0] != (seed, epoch):
            order = torch.randperm(n, generator=torch.Generator().manual_seed(mix_seeds(seed, epoch)))
            self._epoch = (seed, epoch), order
        return self._epoch[1][place * batch_size :][:batch_size]

    @torch.no_grad()
    def evaluate(
        self, model: HBLLForSequenceClassification, split: str, n_batches: int | None = None, *,
        tree: RecurrentTree | None = None, batch_size: int = 1000,
    ) -> dict[str, float]:  # fmt: skip
        """Percentage of all sequences that are classified right, by what reads them.

        Returns:
            ``"deployed"``: f_0 as an ordinary recurrent network; with a tree also ``"tree"``, its output along
            0 -> N/2 -> 3N/4 -> .. -> N, and ``"top"``, f_D alone, a feed-forward net on the whole input (docs/method.md 1.5).
        """
        values, labels = self.data[split]
        predicted: dict[str, list[Tensor]] = {"deployed": []}
        for batch in values.split(batch_size)[:n_batches]:
            predicted["deployed"].append(model.predict(batch, batch_size))
            if tree is not None:
                symbols, h0 = model.symbols(model.chunks(batch)), model.initial_state(len(batch))
                for name, read in (("tree", tree.readout_path), ("top", tree.jump)):
                    predicted.setdefault(name, []).append(model.head(read(model.cell, symbols, h0)).argmax(-1))
        found = {name: torch.cat(parts) for name, parts in predicted.items()}
        return {name: round(100.0 * (p == labels[: len(p)]).double().mean().item(), 4) for name, p in found.items()}
