"""Which runs can have their steps replayed as CUDA graphs (``--cuda-graph``)."""

from __future__ import annotations

from typing import Any

import torch

from hbll_seq.utils.reading import quote


def check_cuda_graph(settings: Any, decided: dict[str, Any]) -> None:
    """Raises ValueError for a step that a graph would repeat as it was captured, or cannot hold.

    Args:
        settings: a :class:`hbll_seq.training.settings.TrainingSettings`.
        decided: what became of those of its values that were left open.
    """

    def refuse(name: str, why: str, remedy: str) -> None:
        value = decided.get(name, getattr(settings, name))
        raise ValueError(f"cuda_graph=True with {name}={quote(value)}: {why}; {remedy}, or leave --cuda-graph out")

    if settings.dropout > 0:
        refuse("dropout", "every replay would drop the same units", "use --dropout 0")
    if settings.objective == "tree" and settings.sigma > 0:
        refuse("sigma", "every replay would add the same noise to the tree's states", "use --sigma 0")
    if settings.objective == "sweeps" and decided.get("linearization", settings.linearization) == "low_rank":
        refuse("linearization", "learned maps change with every step, in ways that Python decides",
               "use --linearization identity")
    if settings.control != "none":
        refuse("control", "K and M change from step to step", "use --control none")
    if settings.carry_state:
        refuse("carry_state", "each step reads the states of the one before", "use --no-carry-state")
    if settings.grad_accum > 1:
        refuse("grad_accum", "a replay overwrites the gradients of the micro batch before",
               "use --grad-accum 1 with a larger --batch-size")
    if settings.block_parallel > 1:
        refuse("block_parallel", "what ranks send each other is not captured", "use --block-parallel 1")


def check_graph_device(device: torch.device, n_processes: int) -> None:
    """Raises ValueError where a run with graphs finds no CUDA device, or is one of several processes."""
    if device.type != "cuda":
        raise ValueError(f"cuda_graph=True on device {device.type!r}: it needs a CUDA device; leave --cuda-graph out (a run "
                         "that had it goes on by --resume --no-cuda-graph)")
    if n_processes > 1:
        raise ValueError(f"cuda_graph=True with {n_processes} processes: what they send each other is not captured; launch "
                         "one process, or leave --cuda-graph out")
