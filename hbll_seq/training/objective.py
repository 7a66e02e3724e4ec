"""The objective that a run's settings name, and the paths that the run evaluates."""

from __future__ import annotations

from hbll_seq.distributed.ranks import ALONE, Ranks
from hbll_seq.evaluation.perplexity import default_paths
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.objectives.backprop import BackpropObjective
from hbll_seq.objectives.base import Objective
from hbll_seq.objectives.depth_mix import paths_of_mix
from hbll_seq.objectives.local import LocalObjective
from hbll_seq.training.settings import TrainingSettings


def make_objective(
    settings: TrainingSettings, model: HBLLForCausalLM, rank: int, ranks: Ranks = ALONE
) -> Objective:
    """The objective around ``model``.

    Args:
        settings: of the run.
        model: with all its blocks.
        rank: number of the replica, which has a batch and noise of its own.
        ranks: where this process stands among those that hold the model's blocks.

    Raises:
        ValueError: the model cannot be trained so.
    """
    seeds = {"seed": settings.seed, "rank": rank, "micro_batches": settings.grad_accum}
    depths = None if settings.objective == "tree" else settings.depths()
    if settings.objective == "backprop":
        return BackpropObjective(model, settings.path_blocks, depths=depths, recompute=settings.recompute, **seeds)
    spread = {"ranks": ranks, "ahead": settings.ahead} if ranks.n_ranks > 1 else {}
    return LocalObjective(
        model, settings.inference(), path=settings.path_blocks, depths=depths, time=settings.time(),
        recompute=settings.recompute, **seeds, **spread,
    )  # fmt: skip


def evaluated_paths(settings: TrainingSettings, model: HBLLForCausalLM) -> dict[str, tuple[int, ...]]:
    """The paths that the run evaluates, by name: those of every depth, or where a mix trains fewer, those that it trains."""
    if settings.objective != "tree":
        trained = paths_of_mix(settings.depths().name, model.tree, model.resolve_path(path=settings.path_blocks))
        if isinstance(trained, tuple):
            return {f"depth {len(path)}": path for path in sorted(trained, key=len)}
    return default_paths(model)
