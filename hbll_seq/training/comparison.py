"""Parts of a comparison of training methods: what is learned, the sides, one run, and the file of results.

Every run of a comparison sees the same batches in the same order and starts from the same weights (of its seed).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hbll_seq.atomic import atomic_write
from hbll_seq.config import HBLLConfig
from hbll_seq.data import TokenWindows
from hbll_seq.depth import DepthChain, DepthHierarchy
from hbll_seq.evaluation import default_paths, evaluate_paths
from hbll_seq.local_objective import LocalObjective
from hbll_seq.mix import OF_PREFIXES
from hbll_seq.model import HBLLForCausalLM
from hbll_seq.objective import BackpropObjective, Objective
from hbll_seq.span import measure_span, small_hierarchy
from hbll_seq.tasks import Task, count_correct
from hbll_seq.training.settings import TrainingSettings, block_cells
from hbll_seq.training.trainer import learning_rate, make_optimizer

# ------------------------------------------------------------------------------------------------------------ problems


class Problem(ABC):
    """What is learned: batches of training, and the figures of a model by path."""

    vocab_size: int
    block_size: int
    #: name of the figure in a row
    metric: str
    #: identifies the data
    fingerprint: str
    #: whether each row of a batch goes on where it ended the step before: recurrent blocks then start from their last states
    carry_state: bool = False

    @abstractmethod
    def batch(self, step: int, batch_size: int, seed: int) -> tuple[Tensor, Tensor | None]:
        """Tokens and labels [B, T + 1] (None: the tokens themselves)."""

    @abstractmethod
    def evaluate(self, model: HBLLForCausalLM, split: str, paths: Mapping[str, Sequence[int]], n_batches: int) -> list[dict]:
        """One row per path with ``name``, ``path``, ``depth``, ``loss`` and the figure named by ``metric``."""


class TextProblem(Problem):
    """Next-token prediction; the figure is perplexity per token.

    Args:
        windows: by split.
        vocab_size: of the tokenizer.
        carry_state: rows read their own stretch of the text, window after window, in training as in the evaluation of what
            is deployed, with recurrent states carried on. False shuffles the windows and starts each from zero.
    """

    metric = "perplexity"

    def __init__(self, windows: dict[str, TokenWindows], vocab_size: int, carry_state: bool = False):
        self.windows, self.vocab_size, self.block_size = windows, vocab_size, windows["train"].block_size
        self.carry_state = carry_state
        self.fingerprint = windows["train"].stream.fingerprint

    def batch(self, step: int, batch_size: int, seed: int) -> tuple[Tensor, None]:
        """See :meth:`Problem.batch`."""
        if self.carry_state:
            return self.windows["train"].contiguous_batch(step, range(batch_size), batch_size, seed), None
        return self.windows["train"].batch(step, batch_size, seed), None

    def evaluate(self, model: HBLLForCausalLM, split: str, paths: Mapping[str, Sequence[int]], n_batches: int) -> list[dict]:
        """See :meth:`Problem.evaluate`; the first batches of 16 windows, which lie in 16 stretches with states carried."""
        return evaluate_paths(model, self.windows[split], paths, max_batches=n_batches, carry_state=self.carry_state)


class TaskProblem(Problem):
    """A synthetic task; the figure is the accuracy in percent of the scored positions."""

    metric = "accuracy"

    def __init__(self, task: Task):
        self.task, self.vocab_size, self.block_size = task, task.vocab_size, task.block_size
        self.fingerprint = f"{task.name} {sorted((k, v) for k, v in vars(task).items() if isinstance(v, int))}"

    def batch(self, step: int, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
        """See :meth:`Problem.batch`."""
        return self.task.batch(step, batch_size, seed)

    @torch.no_grad()
    def evaluate(self, model: HBLLForCausalLM, split: str, paths: Mapping[str, Sequence[int]], n_batches: int) -> list[dict]:
        """See :meth:`Problem.evaluate`; batches of 32 windows."""
        device = next(model.parameters()).device
        totals = {name: [0.0, 0, 0] for name in paths}
        was_training = model.training
        model.eval()
        for step in range(n_batches):
            tokens, labels = (t.to(device) for t in self.task.batch(step, 32, 0, split))
            for name, path in paths.items():
                logits = model.run(tokens[:, :-1], path)
                nats = 0.5 * model.target_family.discrepancy(logits, labels[:, 1:]).double().sum().item()
                for i, value in enumerate((nats, *count_correct(logits, labels))):
                    totals[name][i] += value
        model.train(was_training)
        return [
            {"name": name, "path": list(path), "depth": len(path), "loss": nats / n, "accuracy": 100 * right / n}
            for (name, path), (nats, right, n) in zip(paths.items(), totals.values())
        ]


# --------------------------------------------------------------------------------------------------------------- sides

_TYPES = {"sweeps": int, "corrections": int, "chunk": int, "secant_rank": int, "depth": int, "readout_rank": int,
          "time_sweeps": int, "time_corrections": int, "time_chunk": int, "state_weight": float,
          "mix_weight": float}  # fmt: skip
#: how recurrent blocks are evaluated along time
_TIME = {"time_sweeps", "time_corrections", "time_linearization", "time_chunk"}
_MIXED = {"mix", "mix_weight", "graphs", "paths", "readout_rank", "readouts"}
#: options that belong to the model's configuration, by its name there
_OF_CONFIG = {"paths": "default_paths", "readout_rank": "readout_rank", "readouts": "readout_by"}
#: what can be said of each kind of side; another option would be ignored, and two names mean one method
_OPTIONS = {
    "backprop": {"depth", *_MIXED},
    "tree": {"state_weight", "graphs", *_TIME},
    "sweeps": {"sweeps", "corrections", "chunk", "init", "linearization", "secant_rank", *_TIME, *_MIXED},
    "multigrid": {"sweeps", "corrections", *_MIXED},
}


def parse_options(name: str, kind: str, text: str, types: Mapping[str, type]) -> list[tuple[str, Any]]:
    """The options of a side, from "key=value,key=value".

    Args:
        name: of the side, for messages.
        kind: what the options belong to.
        text: what stands after the colon.
        types: of every option that there is, by key.

    Raises:
        ValueError: an option is unknown, or its value no number where it must be one.
    """
    options = []
    for item in filter(None, text.split(",")):
        key, _, value = item.partition("=")
        if key not in types:
            known = ", ".join(sorted(types))
            raise ValueError(f"side {name!r}: {kind} has no option {key!r}; it has {known}")
        try:
            options.append((key, types[key](value)))
        except ValueError:
            raise ValueError(f"side {name!r}: {key}={value!r} must be a number") from None
    return options


@dataclass(frozen=True)
class Side:
    """A way of training: ``name`` as it was asked for, the inference (or "backprop"), options of its objective, and
    ``config``, what it changes of the model's configuration."""

    name: str
    inference: str
    options: tuple[tuple[str, Any], ...]
    config: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def parse(cls, name: str, mix: str) -> Side:
        """From "inference:key=value,key=value", or the short names "backprop-3", "mix" and "backprop-mix".

        Raises:
            ValueError: unknown inference or option, or a value of the wrong type.
        """
        # These belong with the paths and readouts made for them, and K and M that were found enough for them (the preset
        # small has the same); the other mixes with those that they were measured with
        mixed, dial = f"mix={mix}", ""
        if mix in OF_PREFIXES:
            mixed, dial = mixed + ",paths=prefix,readout_rank=16", "sweeps=2,corrections=3,"
        short = {"mix": f"sweeps:{dial}{mixed}", "backprop-mix": f"backprop:{mixed}"}.get(name, name)
        if short.startswith("backprop-"):
            short = "backprop:depth=" + short.removeprefix("backprop-")
        inference, _, rest = short.partition(":")
        if inference not in _OPTIONS:
            raise ValueError(f"side {name!r}: allowed are backprop-N, mix, backprop-mix, {', '.join(_OPTIONS)}")
        options = parse_options(name, inference, rest, {key: _TYPES.get(key, str) for key in _OPTIONS[inference]})
        config = tuple((_OF_CONFIG[key], value) for key, value in options if key in _OF_CONFIG)
        HBLLConfig(**dict(config))  # refuses a value that is out of range
        return cls(name, inference, tuple((k, v) for k, v in options if k not in _OF_CONFIG), config)

    def _to_count_on(self, n_level: int) -> DepthHierarchy:
        return small_hierarchy(n_level, width=64,
                               default_paths=dict(self.config).get("default_paths", "spine"))  # fmt: skip

    @property
    def one_depth(self) -> int | None:
        """The depth of a backprop model that is trained for one depth only."""
        return dict(self.options).get("depth")

    def objective(self, model, seed: int) -> Objective:
        """This side's objective around a model.

        Raises:
            ValueError: an option does not fit the model.
        """
        options = dict(self.options)
        if self.inference == "backprop":
            depth = options.pop("depth", None)
            path = None if depth is None else model.resolve_path(depth=depth)
            return BackpropObjective(model, path, seed=seed, **options)
        return LocalObjective(model, self.inference, seed=seed, **options)

    def main_path(self, model, seed: int) -> Objective:
        """The same objective without its mix."""
        options = tuple((key, value) for key, value in self.options if not key.startswith("mix"))
        return Side(self.name, self.inference, options).objective(model, seed)

    def method(self, n_level: int, cell: str = "transformer") -> str:
        """What the side does, with every default written out: runs of another method are not this side's.

        Args:
            n_level: of the model.
            cell: its kinds of blocks, see :class:`Shape`.
        """
        objective = self.objective(self._to_count_on(n_level), seed=0)
        names = ["mix"]
        if objective.mix != "none":
            names += ["mix_weight"]
        if self.inference in ("sweeps", "multigrid"):
            names += ["sweeps", "corrections", "linearization", "init"]
        if self.inference == "tree":
            names += ["state_weight"]
        described = {name: getattr(objective, name) for name in names}
        if self.inference == "sweeps" and objective.chunk > 1:  # the first stored runs were described without it
            described["chunk"] = objective.chunk
        if self.inference == "sweeps" and objective.secants is not None:
            described["secant_rank"] = objective.secants.rank
        if self.inference in ("sweeps", "tree") and any(_recurrent(n_level, cell)):
            described |= {f"time_{name}": value for name, value in objective.time._asdict().items()}
        config = HBLLConfig(**dict(self.config))
        described |= {name: getattr(config, name) for name in sorted(_OF_CONFIG.values())}
        if config.readout_by == "jump":  # the only one there was when the first stored runs were described
            del described["readout_by"]
        return f"{self.inference} {described}"

    def check(self, n_level: int, cell: str = "transformer", carry_state: bool = False) -> None:
        """Raises ValueError where an option does not fit a model of so many levels and these blocks, or the states carried
        from window to window."""
        if not any(_recurrent(n_level, cell)):
            unused = [key for key, _ in self.options if key in _TIME]
            if unused:
                raise ValueError(f"side {self.name!r}: {', '.join(unused)} with cell={cell!r}: only recurrent blocks are "
                                 "evaluated along time; leave it out")  # fmt: skip
            self.objective(self._to_count_on(n_level), seed=0)
            return
        if carry_state and self.inference == "tree":
            raise ValueError(f"side {self.name!r} with carry_state=True: its jumps read no path whose state could be "
                             "carried; leave the side out, or carry no state")  # fmt: skip
        config = HBLLConfig(vocab_size=2, n_level=n_level, n_embd=64, cell=block_cells(cell), **dict(self.config))
        self.objective(HBLLForCausalLM(config), seed=0)

    def paths(self, model: HBLLForCausalLM) -> dict[str, tuple[int, ...]]:
        """The paths that this side trains, by name: one, or the default path of every depth up to 7 and 2**k - 1."""
        if self.one_depth is not None:
            return {f"depth {self.one_depth}": model.resolve_path(depth=self.one_depth)}
        if self.inference != "tree" and dict(self.options).get("mix", "none") == "none":
            return {f"depth {model.tree.n_nodes}": model.resolve_path()}
        return default_paths(model)

    def work(self, n_level: int, n_steps: int = 16, cell: str = "transformer") -> float:
        """Block evaluations of a training step (forward or input-only product 1, full backward 2), mean over some steps.
        How many sweeps over time a recurrent block makes of one is not counted."""
        objective = self.objective(self._to_count_on(n_level), seed=0)
        recurrent, chain_of_step = _recurrent(n_level, cell), objective.chain

        def chain(*args: Any) -> DepthChain:
            made = chain_of_step(*args)
            made.remembers = lambda index: recurrent[made.number(index) - 1]
            return made

        objective.chain = chain  # the small hierarchy stands in for recurrent blocks, which sweeps ask more of
        x, y = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)
        varies = dict(self.options).get("mix", "none") != "none" or getattr(objective, "secants", None) is not None
        counts = [measure_span(objective, x, y, step=step).block_work for step in range(n_steps if varies else 1)]
        return sum(counts) / len(counts)


def _recurrent(n_level: int, cell: str) -> list[bool]:
    """Of each block, whether it is recurrent. Raises ValueError for cells that such a model cannot have."""
    return [kind != "transformer" for kind in HBLLConfig(n_level=n_level, cell=block_cells(cell)).cells]


# ---------------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Shape:
    """The model and the length of every run of a comparison. ``cell`` is the kind of its blocks, or one for each, as in
    "gru,transformer,gru"."""

    n_level: int
    n_embd: int
    n_head: int
    batch_size: int
    steps: int
    warmup_steps: int
    eval_batches: int
    eval_every: int
    probe_every: int
    cell: str = "transformer"


def train(side: Side, lr: float, seed: int, problem: Problem, shape: Shape) -> dict[str, Any]:
    """Trains one side once and evaluates it; a run of the results file.

    Where the problem carries states, every side starts a window from those that it made itself of the window before, and
    so do both gradients of a probe.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    config = HBLLConfig(vocab_size=problem.vocab_size, n_level=shape.n_level, n_embd=shape.n_embd, n_head=shape.n_head,
                        block_size=problem.block_size, cell=block_cells(shape.cell), **dict(side.config))  # fmt: skip
    model = HBLLForCausalLM(config).to(device)
    objective, paths = side.objective(model, seed), side.paths(model)
    exact = BackpropObjective(model, objective.path, mix=objective.mix, mix_weight=objective.mix_weight, seed=seed)
    alone = side.main_path(model, seed), BackpropObjective(model, objective.path, seed=seed)
    alone[0].secants = getattr(objective, "secants", None)  # looked at with what the side has learned
    settings = TrainingSettings(max_steps=shape.steps, lr=lr, warmup_steps=shape.warmup_steps)
    optimizer = make_optimizer(objective, settings)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    curve, probes, evaluations, seconds = [], [], [], 0.0
    carried: dict[str, Any] = {"states": {}} if problem.carry_state else {}
    with tqdm(range(shape.steps), desc=f"{side.name} lr={lr:g} seed={seed}", mininterval=5) as bar:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, peak=lr, total=shape.steps, warmup=shape.warmup_steps,
                                            floor=settings.min_lr_ratio)  # fmt: skip
            tokens, labels = (t if t is None else t.to(device) for t in problem.batch(step, shape.batch_size, seed))
            if side.inference in ("sweeps", "multigrid") and (step + 1) % shape.probe_every == 0:
                probes.append([step + 1, *fidelity(objective, exact, parameters, tokens, labels, step, **carried)])
                if objective.mix != "none":  # the mix may be exact where its main path is not
                    probes[-1].append(fidelity(*alone, parameters, tokens, labels, step, **carried)[0])
            start = now(device)
            output = objective(tokens, labels, step=step, **carried)
            if problem.carry_state:
                carried = {"states": output.states}
            optimizer.zero_grad()
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
            optimizer.step()
            seconds += now(device) - start
            if step % 20 == 19 or step == shape.steps - 1:
                curve.append([step + 1, round(output.metrics["ce"].item(), 5)])
                bar.set_postfix(ce=f"{curve[-1][1]:.3f}")
            if (step + 1) % shape.eval_every == 0 and step + 1 < shape.steps:
                rows = problem.evaluate(model, "validation", paths, max(1, shape.eval_batches // 4))
                evaluations.append([step + 1, {row["name"]: round(row[problem.metric], 4) for row in rows}])
    rows = {s: problem.evaluate(model, s, paths, shape.eval_batches) for s in ("validation", "test")}
    return {"side": side.name, "method": side.method(shape.n_level, shape.cell), "lr": lr, "seed": seed,
            "seconds": round(seconds, 1), "work": side.work(shape.n_level, cell=shape.cell), "curve": curve,
            "probes": probes, "evaluations": evaluations, **rows}  # fmt: skip


def now(device: str) -> float:
    """Seconds, once the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()  # or only the queueing would be timed
    return time.perf_counter()


def fidelity(
    objective: nn.Module, exact: nn.Module, parameters: list[Tensor], tokens, labels, step: int, **carried: Tensor
) -> list[float]:
    """Cosine of the objective's gradient to the exact one, ratio of their norms, and the sweeps' residual. ``carried`` is
    what else both take, such as the state of a recurrent network."""
    gradients, residuals, was_training = [], [], objective.training
    objective.eval()  # a look at a gradient is not a step: what an objective learns along the way stays as it is
    for each in (objective, exact):
        output = each(tokens, labels, step=step, **carried)
        found = torch.autograd.grad(output.loss, parameters)
        gradients.append(torch.cat([g.flatten() for g in found]).double())  # float32 sums of millions end above one
        residuals.append(output.metrics.get("residual", torch.zeros(())))
    objective.train(was_training)
    (ours, reference), residual = gradients, residuals[0]
    cosine = torch.dot(ours, reference) / (ours.norm() * reference.norm()).clamp(min=1e-30)
    return [round(float(v), 5) for v in (cosine, ours.norm() / reference.norm().clamp(min=1e-30), residual)]


# ------------------------------------------------------------------------------------------------------------- results


class Results:
    """The JSON file: the setting of the comparison, and one entry per finished run. Processes may share it."""

    def __init__(self, path: Path, setting: dict):
        self.path, self.setting = path, setting
        self.runs: list[dict] = []
        self._read()

    def _read(self) -> None:
        if not self.path.exists():
            return
        data = json.loads(self.path.read_text(encoding="utf-8"))
        names = dict.fromkeys([*self.setting, *data["setting"]])  # what came later is None, or left out where it is as before
        changed = [k for k in names if data["setting"].get(k) != self.setting.get(k)]
        if changed:
            raise ValueError(
                f"{self.path} holds a comparison with other settings ({', '.join(changed)}): its runs cannot be compared "
                "with these; give another --output"
            )
        self.runs = data["runs"]

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time between reading and replacing the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(self.path.parent, os.O_RDONLY)  # locked by itself: no lock file to be left behind
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def find(self, side: str, lr: float, seed: int, method: str | None = None) -> dict | None:
        """The finished run, if there is one, also one that another process has added.

        Args:
            side, lr, seed: what names a run.
            method: if given, see :meth:`Side.method`; a run that did something else under this name is not found.
        """
        self._read()
        named = (r for r in self.runs if (r["side"], r["lr"], r["seed"]) == (side, lr, seed))
        return next((r for r in named if method is None or r.get("method") == method), None)

    def add(self, run: dict) -> None:
        """Appends a run and replaces the file atomically; one line per run."""
        with self._locked():
            if self.find(run["side"], run["lr"], run["seed"], run.get("method")) is None:
                self.runs.append(run)
            lines = ",\n".join(json.dumps(r) for r in self.runs)
            text = f'{{"setting": {json.dumps(self.setting)},\n"runs": [\n{lines}\n]}}\n'
            atomic_write(self.path, text)


def tune(loss_at: Callable[[float], float], grid: Sequence[float]) -> float:
    """The learning rate of the lowest loss: on the grid, and past its edges by factors of two while the best lies there,
    but no further than three of them. A loss that is not finite is the worst."""

    def loss_or_inf(lr: float) -> float:
        loss = loss_at(lr)
        return loss if math.isfinite(loss) else math.inf

    tried = {lr: loss_or_inf(lr) for lr in grid}
    while len(grid) > 1:
        best = min(tried, key=tried.get)
        beyond = {min(tried): best / 2, max(tried): best * 2}.get(best)
        if beyond is None or len(tried) >= len(grid) + 3:
            return best
        tried[beyond] = loss_or_inf(beyond)
    return grid[0]  # a single rate is not tuned


def deepest(run: dict, split: str = "validation") -> dict:
    """The row of a run's deepest path."""
    return max(run[split], key=lambda row: row["depth"])
