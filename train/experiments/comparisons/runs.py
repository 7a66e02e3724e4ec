"""One run of a comparison: a method trained once on a task, and what the file of results stores of it.

All runs of a seed start from the same weights: the model is drawn before what a method adds to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from comparisons.depth_methods import DepthMethod
from comparisons.fit import Alignment, Fitted, fit
from comparisons.image_task import ImageTask
from comparisons.methods import Method
from comparisons.tasks import Classes, LanguageTask
from comparisons.time_methods import TimeMethod
from comparisons.turns import Training
from hbll_seq.layers.cells import make_cell
from hbll_seq.models.recurrent import RecurrentLM
from hbll_seq.models.sequence_classification import HBLLClassifierConfig, HBLLForSequenceClassification
from hbll_seq.objectives.backprop import BackpropObjective
from hbll_seq.objectives.base import Objective
from hbll_seq.objectives.recurrent import RecurrentBackpropObjective
from hbll_seq.training.optimizer import make_optimizer
from hbll_seq.training.schedule import learning_rate
from hbll_seq.training.settings import TrainingSettings
from hbll_seq.utils.tensors import first_not_finite, module_tensors


def a_device() -> str:
    """Where runs are made."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def stored_run(method: Method, lr: float, seed: int, fitted: Fitted, **figures: Any) -> dict[str, Any]:
    return {"method": method.name, "description": method.description, "lr": lr, "seed": seed,
            "seconds": round(fitted.seconds, 2), "step_seconds": round(fitted.step_seconds, 6), "curve": fitted.curve,
            "alignment": fitted.alignment, "evaluations": fitted.evaluations, **figures}  # fmt: skip


def title(method: Method, lr: float, seed: int) -> str:
    return f"{method.name} lr={lr:g} seed={seed}"


# ------------------------------------------------------------------------------------------------------------ over depth


@dataclass(frozen=True)
class DepthShape:
    """The model and the length of every run of a comparison over depth. ``cell`` is the kind of its blocks, or one for each,
    as in "gru,transformer,gru"."""

    n_level: int
    n_embd: int
    n_head: int
    batch_size: int
    steps: int
    warmup_steps: int
    eval_batches: int
    eval_every: int
    alignment_every: int
    cell: str = "transformer"


def depth_training(
    method: DepthMethod, lr: float, seed: int, task: LanguageTask | ImageTask, shape: DepthShape
) -> tuple[Training, TrainingSettings]:
    """What :func:`train_depth` trains, with its settings."""
    method, device = replace(method, n_level=shape.n_level, cell=shape.cell), a_device()
    torch.manual_seed(seed)
    model = task.model(method, shape.n_level, n_embd=shape.n_embd, n_head=shape.n_head).to(device)
    objective = method.objective(model, seed).to(device)
    settings = TrainingSettings(max_steps=shape.steps, lr=lr, warmup_steps=shape.warmup_steps)

    def batch(step: int):
        inputs, labels = task.batch(step, shape.batch_size, seed)
        return inputs.to(device), None if labels is None else labels.to(device)

    carry = "states" if task.carry_state else None
    return Training(model, objective, make_optimizer(objective, settings), batch, settings.clip, carry), settings


def train_depth(
    method: DepthMethod, lr: float, seed: int, task: LanguageTask | ImageTask, shape: DepthShape
) -> dict[str, Any]:
    """Trains a model of this shape by a method once, and evaluates the method's paths.

    Where the task carries states, every method starts a window from those that it made itself of the window before, and so
    do both gradients where they are compared.
    """
    training, settings = depth_training(method, lr, seed, task, shape)
    model, objective, optimizer = training.model, training.objective, training.optimizer
    method = replace(method, n_level=shape.n_level, cell=shape.cell)
    paths, work = method.paths(model), method.work()  # what fails there shall not fail hours later

    def evaluate() -> dict[str, float]:
        rows = task.evaluate(model, "validation", max(1, shape.eval_batches // 4), paths=paths)
        return {row["name"]: round(row[task.metric], 4) for row in rows}

    fitted = fit(
        objective, optimizer, training.batch, shape.steps,
        rate=partial(learning_rate, peak=lr, total=shape.steps, warmup=shape.warmup_steps, floor=settings.min_lr_ratio),
        clip=training.clip, carry=training.carry, evaluate=evaluate, evaluate_every=shape.eval_every,
        title=title(method, lr, seed),
        alignment=_alignment(method, objective, optimizer, seed, shape.alignment_every) if method.is_iterative else None,
    )  # fmt: skip
    rows = {split: task.evaluate(model, split, shape.eval_batches, paths=paths) for split in ("validation", "test")}
    return stored_run(method, lr, seed, fitted, work=work, **rows)


def _alignment(
    method: DepthMethod, objective: Objective, optimizer: torch.optim.Optimizer, seed: int, every: int
) -> Alignment:
    """What is compared with backprop through the same paths, and where there are several through the main one alone: the
    gradients of the model, without what an objective trains beside it."""
    model, path = objective.model, objective.path
    exact = BackpropObjective(model, path, depths=objective.depths, seed=seed)
    main_path = None
    if objective.depths.name != "none":
        main_path = method.main_path(model, seed, objective), BackpropObjective(model, path, seed=seed)
    of_model = {id(p) for p in model.parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"] if id(p) in of_model]
    return Alignment(every, parameters, (objective, exact), main_path)


# ------------------------------------------------------------------------------------------------------------- over time


@dataclass(frozen=True)
class TimeShape:
    """The network and the length of every run of a comparison over time; ``memory``: see
    :meth:`RecurrentCell.set_memory`."""

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
    alignment_every: int
    memory: float | None = None


def time_training(
    method: TimeMethod, lr: float, seed: int, task: LanguageTask, shape: TimeShape
) -> tuple[Training, TrainingSettings]:
    """What :func:`train_time` trains, with its settings."""
    method = replace(method, cell=shape.cell, n_steps=task.context_length, memory=shape.memory)
    torch.manual_seed(seed)
    model = RecurrentLM(task.vocab_size, make_cell(shape.cell, shape.n_embd, shape.hidden, shape.memory))
    objective = method.objective(model)
    settings = TrainingSettings(max_steps=shape.steps, lr=lr, warmup_steps=shape.warmup_steps, clip=shape.clip,
                                weight_decay=shape.weight_decay)  # fmt: skip
    carry = "state" if task.carry_state else None
    batch = lambda step: task.batch(step, shape.batch_size, seed)
    return Training(model, objective, make_optimizer(objective, settings), batch, settings.clip, carry), settings


def train_time(method: TimeMethod, lr: float, seed: int, task: LanguageTask, shape: TimeShape) -> dict[str, Any]:
    """Trains a network of this shape by a method once, and evaluates the deployed network."""
    training, settings = time_training(method, lr, seed, task, shape)
    model, objective = training.model, training.objective

    def evaluate() -> float:
        (row,) = task.evaluate(model, "validation", max(1, shape.eval_batches // 4))
        return round(row[task.metric], 5)

    pair = objective, RecurrentBackpropObjective(model)
    fitted = fit(
        objective, training.optimizer, training.batch, shape.steps,
        rate=partial(learning_rate, peak=lr, total=shape.steps, warmup=shape.warmup_steps, floor=settings.min_lr_ratio),
        clip=training.clip, carry=training.carry, evaluate=evaluate, evaluate_every=shape.eval_every,
        title=title(method, lr, seed),
        alignment=Alignment(shape.alignment_every, list(model.parameters()), pair) if method.is_iterative else None,
    )  # fmt: skip
    rows = {split: task.evaluate(model, split, shape.eval_batches) for split in ("validation", "test")}
    return stored_run(method, lr, seed, fitted, **rows)


# --------------------------------------------------------------------------------------------------------------- classes


@dataclass(frozen=True)
class Length:
    """Steps of every run of a comparison of classifiers, and how they are done (docs/method.md 2.4)."""

    batch_size: int
    steps: int
    warmup_steps: int = 50
    weight_decay: float = 1e-4
    clip: float = 5.0
    eval_every: int = 500
    alignment_every: int = 250

    def __post_init__(self):
        for name in ("batch_size", "steps", "eval_every", "alignment_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be a whole number of at least 1")
        for name in ("warmup_steps", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be a number of 0 or more")
        if not self.clip > 0:
            raise ValueError(f"clip={self.clip}: must be a number above 0; inf clips nothing")


def train_classifier(
    method: TimeMethod, lr: float, seed: int, config: HBLLClassifierConfig, task: Classes, length: Length
) -> tuple[HBLLForSequenceClassification, dict[str, Any]]:
    """Trains a classifier by a method once and evaluates it.

    Args:
        method, lr, seed, config: what is trained; the seed draws weights and batches.
        task: sequences and classes.
        length: of the run.

    Returns:
        The deployed model, and a run for the file of results: figures by split as :meth:`Classes.evaluate` makes them, the
        ``evaluations`` on the validation sequences, ``finite``: whether the weights still are.
    """
    method, device = replace(method, cell=config.cell, n_steps=config.n_steps), a_device()
    torch.manual_seed(seed)
    model = HBLLForSequenceClassification(config)  # drawn first: the same for every method
    objective, task = method.objective(model).to(device), task.to(device)
    pair = objective, RecurrentBackpropObjective(model)
    fitted = fit(
        objective, torch.optim.AdamW(list(objective.parameters()), lr=lr, weight_decay=length.weight_decay),
        lambda step: task.batch(step, length.batch_size, seed), length.steps,
        rate=partial(learning_rate, peak=lr, total=length.steps, warmup=length.warmup_steps, floor=0.0), clip=length.clip,
        evaluate=(lambda: task.evaluate(model, "validation")["deployed"]) if "validation" in task.data else None,
        evaluate_every=length.eval_every, title=title(method, lr, seed),
        alignment=Alignment(length.alignment_every, list(model.parameters()), pair) if method.is_iterative else None,
    )  # fmt: skip
    tree = objective.tree if method.kind == "tree" else None  # the tree of sweeps is not trained to classify
    figures = {split: task.evaluate(model, split, tree=tree) for split in ("validation", "test") if split in task.data}
    finite = first_not_finite(module_tensors(model)) is None
    return model.cpu().eval(), stored_run(method, lr, seed, fitted, finite=finite, **figures)
