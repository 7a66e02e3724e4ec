"""Parts of a comparison of training methods: what is learned, and one run.

Every run of a comparison sees the same batches in the same order and starts from the same weights (of its seed).
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hbll_seq.config import HBLLConfig
from hbll_seq.data import TokenWindows
from hbll_seq.evaluation import evaluate_paths
from hbll_seq.model import HBLLForCausalLM
from hbll_seq.objective import BackpropObjective
from hbll_seq.tasks import Task, count_correct
from hbll_seq.training.settings import TrainingSettings, block_cells
from hbll_seq.training.sides import Side
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
