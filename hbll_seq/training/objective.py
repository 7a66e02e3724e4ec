"""The objective that a run's settings name, and the paths that the run evaluates."""

from __future__ import annotations

from hbll_seq.evaluation.perplexity import default_paths
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.objectives.backprop import BackpropObjective
from hbll_seq.objectives.base import Objective
from hbll_seq.objectives.local import LocalObjective
from hbll_seq.training.settings import TrainingSettings


def make_objective(settings: TrainingSettings, model: HBLLForCausalLM, rank: int) -> Objective:
    """The objective around ``model``, for the process of this rank.

    Raises:
        ValueError: the model cannot be trained so.
    """
    seeds = {"seed": settings.seed, "rank": rank, "micro_batches": settings.grad_accum}
    depths = None if settings.objective == "tree" else settings.depths()
    if settings.objective == "backprop":
        return BackpropObjective(model, settings.path_blocks, depths=depths, recompute=settings.recompute, **seeds)
    return LocalObjective(
        model, settings.inference(), path=settings.path_blocks, depths=depths, time=settings.time(),
        recompute=settings.recompute, **seeds,
    )  # fmt: skip


def evaluated_paths(settings: TrainingSettings, model: HBLLForCausalLM) -> dict[str, tuple[int, ...]]:
    """The paths that the run evaluates, by name: those of every depth, or the one that alone is trained."""
    if settings.objective != "tree" and settings.depths().name == "none":
        path = model.resolve_path(path=settings.path_blocks)
        return {f"depth {len(path)}": path}
    return default_paths(model)
