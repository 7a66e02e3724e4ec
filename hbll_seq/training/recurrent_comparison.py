"""Parts of a comparison of ways to train a recurrent network: what is learned, the sides, and one run.

As in ``comparison.py`` every run sees the same batches in the same order and starts from the same weights (of its seed).
All sides train the same deployed network, and that is what is evaluated, one token after the other.

Shapes: B rows of a batch, T steps of a window.
"""

from __future__ import annotations

import inspect
import math
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hbll_seq.cells.recurrent import make_cell
from hbll_seq.posterior import IGNORE_INDEX
from hbll_seq.recurrent_model import RecurrentLM
from hbll_seq.recurrent_objective import RecurrentBackpropObjective, RecurrentLocalObjective, RecurrentObjective
from hbll_seq.recurrent_tree import RecurrentTree
from hbll_seq.seeds import mix_seeds
from hbll_seq.tasks import SPLITS
from hbll_seq.training.settings import TrainingSettings
from hbll_seq.training.trainer import learning_rate, make_optimizer

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
        for name, value in (("delay", delay), ("length", length), ("n_symbols", n_symbols - 1)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1 (n_symbols: 2)")
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


# --------------------------------------------------------------------------------------------------------------- sides

_LOCAL = inspect.signature(RecurrentLocalObjective).parameters
#: options of a tree: what it shares, and how many symbols its windows hold
_TREE = {"tree": str, "max_symbols": int}


@dataclass(frozen=True)
class RecurrentSide:
    """A way of training a recurrent network: ``name`` as it was asked for, ``kind``, and its objective's options.

    Kinds: ``bptt``, backpropagation through time; ``one-step``, exact states and no credit through time; ``sweeps``,
    messages along time with the options of :class:`RecurrentLocalObjective`, and ``tree=none`` or ``tree=capped`` for a
    tree that makes the first estimate; ``paper``, HBLL-RNN as published, ``sweeps`` being its consistency stage's K.
    """

    name: str
    kind: str
    options: tuple[tuple[str, Any], ...]

    @classmethod
    def parse(cls, name: str) -> RecurrentSide:
        """From "kind:key=value,key=value".

        Raises:
            ValueError: unknown kind or option, or a value of the wrong type.
        """
        kind, _, rest = name.partition(":")
        types = {key: type(p.default) for key, p in _LOCAL.items() if isinstance(p.default, (int, float, str))} | _TREE
        allowed = {"bptt": (), "one-step": (), "sweeps": set(types) - {"inference"},
                   "paper": {"sweeps", "arc_weight", "consistency_weight", *_TREE}}  # fmt: skip
        if kind not in allowed:
            raise ValueError(f"side {name!r}: allowed are {', '.join(allowed)}, with options as in sweeps:sweeps=2,chunk=8")
        options = []
        for item in filter(None, rest.split(",")):
            key, _, value = item.partition("=")
            if key not in allowed[kind]:
                known = ", ".join(sorted(allowed[kind])) or "none"
                raise ValueError(f"side {name!r}: {kind} has no option {key!r}; it has {known}")
            try:
                options.append((key, types[key](value)))
            except ValueError:
                raise ValueError(f"side {name!r}: {key}={value!r} must be a {types[key].__name__}") from None
        return cls(name, kind, tuple(options))

    def objective(self, model: RecurrentLM, kind: str, block_size: int) -> RecurrentObjective:
        """This side's objective around a model of cells of ``kind``.

        Raises:
            ValueError: an option is out of range.
        """
        if self.kind in ("bptt", "one-step"):
            return RecurrentBackpropObjective(model, one_step=self.kind == "one-step")
        options = dict(self.options)
        max_symbols, share = options.pop("max_symbols", 8), options.pop("tree", None)
        tree = None
        if share is not None or self.kind == "paper":
            n_level = max(1, (block_size - 1).bit_length())
            max_symbols = max_symbols if self.kind == "sweeps" else None
            tree = RecurrentTree(lambda i, h: make_cell(kind, i, h), model.cell.input_size, model.cell.hidden_size, n_level,
                                 max_symbols=max_symbols, share=share or "none")  # fmt: skip
        inference = "tree" if self.kind == "paper" else "sweeps"
        return RecurrentLocalObjective(model, inference, tree=tree, **options)

    def method(self) -> str:
        """What the side does, with every default written out: runs of another method are not this side's."""
        defaults = {}
        if self.kind in ("sweeps", "paper"):
            defaults = {k: p.default for k, p in _LOCAL.items() if k not in ("model", "inference", "tree")}
        return f"{self.kind} {sorted({**defaults, **dict(self.options)}.items())}"


# ---------------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class RecurrentShape:
    """The network and the length of every run of a comparison."""

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


def train_recurrent(
    side: RecurrentSide, lr: float, seed: int, problem: RecurrentProblem, shape: RecurrentShape
) -> dict[str, Any]:
    """Trains one side once and evaluates the deployed network; a run of the results file."""
    torch.manual_seed(seed)
    model = RecurrentLM(problem.vocab_size, make_cell(shape.cell, shape.n_embd, shape.hidden))
    objective = side.objective(model, shape.cell, problem.block_size)
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
                probes.append([step + 1, *_fidelity(objective, exact, own, tokens, labels, state)])
            start = time.perf_counter()
            output = objective(tokens, labels, step=step, state=state)
            optimizer.zero_grad()
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
            optimizer.step()
            seconds += time.perf_counter() - start
            state = output.state if problem.is_continuous else None
            if step % 20 == 19 or step == shape.steps - 1:
                curve.append([step + 1, round(output.metrics["ce"].item(), 5)])
                bar.set_postfix(ce=f"{curve[-1][1]:.3f}")
            if (step + 1) % shape.eval_every == 0 and step + 1 < shape.steps:
                row = problem.evaluate(model, "validation", max(1, shape.eval_batches // 4))
                evaluations.append([step + 1, round(row[problem.metric], 5)])
    rows = {s: [{"depth": 1, **problem.evaluate(model, s, shape.eval_batches)}] for s in ("validation", "test")}
    return {"side": side.name, "method": side.method(), "lr": lr, "seed": seed, "seconds": round(seconds, 1),
            "curve": curve, "probes": probes, "evaluations": evaluations, **rows}  # fmt: skip


def _fidelity(objective, exact, parameters: list[Tensor], tokens, labels, state) -> list[float]:
    """Cosine of the objective's gradient to BPTT's, ratio of their norms, and the sweeps' residual."""
    gradients, residual = [], 0.0
    for each in (objective, exact):
        output = each(tokens, labels, state=state)
        found = torch.autograd.grad(output.loss, parameters)
        gradients.append(torch.cat([g.flatten() for g in found]).double())
        residual = residual or output.metrics.get("residual", torch.zeros(())).item()
    ours, reference = gradients
    cosine = torch.dot(ours, reference) / (ours.norm() * reference.norm()).clamp(min=1e-30)
    return [round(float(v), 5) for v in (cosine, ours.norm() / reference.norm().clamp(min=1e-30), residual)]
