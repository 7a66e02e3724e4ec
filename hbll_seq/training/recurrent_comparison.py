"""Parts of a comparison of ways to train a recurrent language model: what is learned, and one run.

As in ``comparison.py`` every run sees the same batches in the same order and starts from the same weights (of its seed).
All sides train the same deployed network, and that is what is evaluated, one token after the other.

Shapes: B rows of a batch, T steps of a window.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hbll_seq.data.tasks import SPLITS
from hbll_seq.layers.cells import make_cell
from hbll_seq.models.recurrent import RecurrentLM
from hbll_seq.objectives.recurrent import RecurrentBackpropObjective
from hbll_seq.training.comparison import fidelity, now
from hbll_seq.training.recurrent_sides import RecurrentSide
from hbll_seq.training.settings import TrainingSettings
from hbll_seq.training.trainer import learning_rate, make_optimizer
from hbll_seq.tree.posterior import IGNORE_INDEX
from hbll_seq.utils.seeds import mix_seeds

# ------------------------------------------------------------------------------------------------------------ problems


class RecurrentProblem(ABC):
    """What is learned: windows of training, and the figure of a deployed network."""

    vocab_size: int
    block_size: int
    #: name of the figure in a row
    metric: str
    #: whether a window goes on where the same row of the window before stopped
    is_continuous: bool
    #: identifies the data
    fingerprint: str

    @abstractmethod
    def batch(self, step: int, batch_size: int, seed: int) -> tuple[Tensor, Tensor | None]:
        """Tokens and labels [B, T + 1] (None: the tokens themselves)."""

    @abstractmethod
    def evaluate(self, model: RecurrentLM, split: str, n_batches: int) -> dict[str, float]:
        """``loss`` in nats per target and the figure named by ``metric``."""


class StreamProblem(RecurrentProblem):
    """Next-token prediction on one long stream; the figure is bits per token. The state is carried across windows.

    Args:
        streams: split -> ids, 1-D.
        vocab_size: V.
        block_size: T.
        fingerprint: identifies the text and how it was cut into tokens.
    """

    metric, is_continuous = "bits", True

    def __init__(self, streams: dict[str, np.ndarray], vocab_size: int, block_size: int, fingerprint: str):
        self.streams, self.vocab_size, self.block_size, self.fingerprint = streams, vocab_size, block_size, fingerprint

    def batch(self, step: int, batch_size: int, seed: int) -> tuple[Tensor, None]:
        """See :meth:`RecurrentProblem.batch`: row b reads the b-th part of the text from a place that the seed chooses."""
        offset = int(np.random.default_rng(mix_seeds(seed, 0, 0)).integers(len(self.streams["train"])))
        return self._windows("train", step, batch_size, offset), None

    def _windows(self, split: str, step: int, batch_size: int, offset: int = 0) -> Tensor:
        stream = self.streams[split]
        first = offset + step * self.block_size + np.arange(batch_size)[:, None] * (len(stream) // batch_size)
        ids = stream.take(first + np.arange(self.block_size + 1), mode="wrap")
        return torch.from_numpy(ids.astype(np.int64))

    @torch.no_grad()
    def evaluate(self, model: RecurrentLM, split: str, n_batches: int) -> dict[str, float]:
        """See :meth:`RecurrentProblem.evaluate`: 64 stretches of the split, ``n_batches`` windows of each."""
        nats, state = 0.0, model.initial_state(64)
        n_batches = min(n_batches, len(self.streams[split]) // 64 // self.block_size)
        if n_batches < 1:
            raise ValueError(f"the {split} split has {len(self.streams[split])} tokens: 64 windows of {self.block_size} "
                             "are the least that can be evaluated; choose a smaller block size")  # fmt: skip
        objective = RecurrentBackpropObjective(model)
        for step in range(n_batches):
            output = objective(self._windows(split, step, 64), state=state)
            nats, state = nats + output.loss.item(), output.state
        return {"loss": nats / n_batches, "bits": nats / n_batches / math.log(2)}


class CopyProblem(RecurrentProblem):
    """Remember a few symbols over a delay (Hochreiter and Schmidhuber 1997; Arjovsky et al. 2016, arXiv 1511.06464).

    A window is ``length`` symbols, ``delay`` blanks, a sign, and the symbols again, of which only these are scored; the
    figure is their accuracy in percent. Each window starts from the zero state.

    Args:
        delay: blanks between.
        length: symbols to remember.
        n_symbols: their number of kinds.
    """

    metric, is_continuous = "accuracy", False

    def __init__(self, delay: int, length: int = 3, n_symbols: int = 8):
        for name, value, least in (("delay", delay, 1), ("length", length, 1), ("n_symbols", n_symbols, 2)):
            if value < least:
                raise ValueError(f"{name}={value}: must be at least {least}")
        self.delay, self.length, self.n_symbols = delay, length, n_symbols
        self.vocab_size, self.block_size = n_symbols + 2, delay + 2 * length
        self.fingerprint = f"copy {n_symbols} {length} {delay}"

    def batch(self, step: int, batch_size: int, seed: int, split: str = "train") -> tuple[Tensor, Tensor]:
        """See :meth:`RecurrentProblem.batch`."""
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
    def evaluate(self, model: RecurrentLM, split: str, n_batches: int) -> dict[str, float]:
        """See :meth:`RecurrentProblem.evaluate`; batches of 64 windows."""
        nats, right, n = 0.0, 0, 0
        for step in range(n_batches):
            tokens, labels = self.batch(step, 64, 0, split)
            logits = model(tokens[:, :-1])[0][:, -self.length :]
            answers = labels[:, -self.length :]
            nats += torch.nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten(), reduction="sum").item()
            right += int((logits.argmax(-1) == answers).sum())
            n += answers.numel()
        return {"loss": nats / n, "accuracy": 100 * right / n}


# ---------------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class RecurrentShape:
    """The network and the length of every run of a comparison; ``memory``: see :meth:`RecurrentCell.set_memory`."""

    cell: str
    n_embd: int
    hidden: int
    batch_size: int
    steps: int
    warmup_steps: int
    clip: float
    weight_decay: float
    eval_batches: int
    eval_every: int
    probe_every: int
    memory: float | None = None


def train_recurrent(
    side: RecurrentSide, lr: float, seed: int, problem: RecurrentProblem, shape: RecurrentShape
) -> dict[str, Any]:
    """Trains one side once and evaluates the deployed network; a run of the results file."""
    torch.manual_seed(seed)
    model = RecurrentLM(problem.vocab_size, make_cell(shape.cell, shape.n_embd, shape.hidden, shape.memory))
    objective = side.objective(model, shape.cell, problem.block_size, shape.memory)
    exact = RecurrentBackpropObjective(model)
    settings = TrainingSettings(max_steps=shape.steps, lr=lr, warmup_steps=shape.warmup_steps, clip=shape.clip,
                                weight_decay=shape.weight_decay)  # fmt: skip
    optimizer = make_optimizer(objective, settings)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    own = list(model.parameters())
    curve, probes, evaluations, seconds, state = [], [], [], 0.0, None
    with tqdm(range(shape.steps), desc=f"{side.name} lr={lr:g} seed={seed}", mininterval=5) as bar:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, peak=lr, total=shape.steps, warmup=shape.warmup_steps,
                                            floor=settings.min_lr_ratio)  # fmt: skip
            tokens, labels = problem.batch(step, shape.batch_size, seed)
            if side.kind == "sweeps" and (step + 1) % shape.probe_every == 0:
                probes.append([step + 1, *fidelity(objective, exact, own, tokens, labels, step, state=state)])
            start = now("cpu")
            output = objective(tokens, labels, step=step, state=state)
            optimizer.zero_grad()
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
            optimizer.step()
            seconds += now("cpu") - start
            state = output.state if problem.is_continuous else None
            if step % 20 == 19 or step == shape.steps - 1:
                curve.append([step + 1, round(output.metrics["ce"].item(), 5)])
                bar.set_postfix(ce=f"{curve[-1][1]:.3f}")
            if (step + 1) % shape.eval_every == 0 and step + 1 < shape.steps:
                row = problem.evaluate(model, "validation", max(1, shape.eval_batches // 4))
                evaluations.append([step + 1, round(row[problem.metric], 5)])
    rows = {s: [{"depth": 1, **problem.evaluate(model, s, shape.eval_batches)}] for s in ("validation", "test")}
    return {"side": side.name, "method": side.method, "lr": lr, "seed": seed, "seconds": round(seconds, 1),
            "curve": curve, "probes": probes, "evaluations": evaluations, **rows}  # fmt: skip
