"""The objective that a run's settings name, and the paths that the run evaluates."""

from __future__ import annotations

from typing import Any

from hbll_seq.evaluation.perplexity import default_paths
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.objectives.backprop import BackpropObjective
from hbll_seq.objectives.base import Objective
from hbll_seq.objectives.local import LocalObjective
from hbll_seq.objectives.options import DepthMix, Sweeps, Tree
from hbll_seq.training.settings import TrainingSettings

# Once the objectives take their options as objects, this is all that remains of the adapter below:
#
#     common = dict(depths=settings.depths(), recompute=settings.recompute, seed=settings.seed, rank=rank,
#                   micro_batches=settings.grad_accum)
#     if settings.objective == "backprop":
#         return BackpropObjective(model, settings.path_blocks, **common)
#     return LocalObjective(model, settings.inference(), path=settings.path_blocks, time=settings.time(), **common)


def make_objective(settings: TrainingSettings, model: HBLLForCausalLM, rank: int) -> Objective:
    """The objective around ``model``, for the process of this rank.

    Raises:
        ValueError: the model cannot be trained so.
    """
    common = {"seed": settings.seed, "rank": rank, "micro_batches": settings.grad_accum,
              "graphs": "recomputed" if settings.recompute else "kept"}
    paths = {"path": settings.path_blocks, **_of_depths(settings.depths())}
    if settings.objective == "backprop":
        return BackpropObjective(model, **paths, **common)
    inference, time = settings.inference(), _of_time(settings.time())
    if isinstance(inference, Tree):
        return LocalObjective(model, "tree", **_of_tree(inference), **time, **common)
    return LocalObjective(model, "sweeps", **_of_sweeps(inference), **time, **paths, **common)


def _of_depths(depths: DepthMix) -> dict[str, Any]:
    return {"mix": depths.name, "mix_weight": depths.total_weight}


def _of_tree(tree: Tree) -> dict[str, Any]:
    names = ("sigma", "n_samples", "state_weight", "clean_inputs", "free_energy")
    return {name: getattr(tree, name) for name in names}


def _of_sweeps(sweeps: Sweeps) -> dict[str, Any]:
    old = {"low_rank": "secant"}
    name = sweeps.linearization.name
    return {"sweeps": sweeps.forward, "corrections": sweeps.backward, "linearization": old.get(name, name),
            "init": sweeps.init, "chunk": sweeps.chunk_size}


def _of_time(time: Sweeps) -> dict[str, Any]:
    return {"time_sweeps": time.forward, "time_corrections": time.backward, "time_chunk": time.chunk_size,
            "time_linearization": time.linearization.name}


def evaluated_paths(settings: TrainingSettings, model: HBLLForCausalLM) -> dict[str, tuple[int, ...]]:
    """The paths that the run evaluates, by name: those of every depth, or the one that alone is trained."""
    if settings.objective != "tree" and settings.depths().name == "none":
        path = model.resolve_path(path=settings.path_blocks)
        return {f"depth {len(path)}": path}
    return default_paths(model)
