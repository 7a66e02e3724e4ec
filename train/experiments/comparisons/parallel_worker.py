"""What a process of ``bench_parallel.py`` or ``bench_sequence.py`` does for a method: losses and gradient norms beside the
baseline's, counts, bytes, and times by turns."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, distributed
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves

from bench_depth import LiveStorages
from comparisons.group import leave
from comparisons.parallel_training import Case, Replica, Training, local
from comparisons.wire import Link, Sent, Wire

BOARD = "arrivals"  # the file of a link's times


@dataclass(frozen=True)
class Plan:
    """How a method is measured: ``steps`` of a turn, ``repeats`` turns, ``check_steps`` first ones whose losses are kept;
    ``link``: turns over this link too."""

    steps: int = 10
    repeats: int = 3
    check_steps: int = 5
    link: Link | None = None


def work(rank: int, n_ranks: int, folder: Path, name: str, case: Case, plan: Plan) -> None:
    """All that is measured of a method, written twice: without and with what activation checkpointing makes of its memory,
    which some cannot do, and recurrent models do not have."""
    wire = Wire(rank, n_ranks, plan.link, folder / BOARD)
    training = case.training(name, n_ranks, hooked=plan.link is not None)
    baseline = case.baseline() if rank == 0 else None
    found = {"total": training.total, "losses": [], "norms": [], "baseline_losses": [], "baseline_norms": []}
    for step in range(plan.check_steps):
        found["losses"].append(training.step(step).item())
        found["norms"].append(training.norm)
        if baseline is not None:
            found["baseline_losses"].append(baseline.step(step).item())
            found["baseline_norms"].append(baseline.norm)
    found["idle_segments"] = training.idle_segments()
    found |= counted(training, Wire(rank, n_ranks), plan.check_steps)
    found["activation_bytes"] = memory_of_step(training, plan.check_steps, gradients=False)
    found["step_bytes"] = memory_of_step(training, plan.check_steps, gradients=True)
    found["parameter_bytes"], found["state_bytes"] = training.held_bytes()
    found |= seconds_by_turns(training, baseline, wire, plan)
    leave(folder, rank, found)
    if not case.can_recompute:
        return
    del training, baseline
    gc.collect()
    training = case.training(name, n_ranks, recompute=True)
    training.step(0)
    found["recomputed_bytes"] = memory_of_step(training, 1, gradients=False)
    found["recomputed_step_bytes"] = memory_of_step(training, 1, gradients=True)
    leave(folder, rank, found)


def counted(training: Training, wire: Wire, step: int) -> dict:
    """What a step sends; of DistributedDataParallel, whose reducer is not seen, what it says of its buckets."""
    with wire.watched() as sent:
        training.step(step)
    if isinstance(training, Replica) and training.is_ddp:
        buckets = training.reduced_bytes()
        sent = Sent(len(buckets), 0, sum(2 * (wire.n_ranks - 1) / wire.n_ranks * n for n in buckets))
    return asdict(sent)


def memory_of_step(training: Training, step: int, *, gradients: bool) -> int:
    """Peak bytes of forward and backward, beyond what was there before, as ``bench_depth.py`` counts them. A pipeline's
    buffers to receive into count too.

    ``gradients``: whether the parameters' gradients are part of it (``.grad`` is None before), or there before.
    """
    parameters = [p for group in training.optimizer.param_groups for p in group["params"]]
    for p in parameters:
        if gradients:
            p.grad = None
        elif p.grad is None:
            p.grad = torch.zeros_like(p)
        else:
            p.grad.zero_()
    buffers = training.buffers()
    fixed = sum(b.numel() * b.element_size() for b in buffers)
    if gradients and isinstance(training, Replica) and training.is_ddp:  # its buckets, which hold them, are always there
        fixed += sum(p.numel() * p.element_size() for p in parameters)
    if training.case.device != "cpu":  # the allocator's count
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() - fixed
        training.differentiate(step)
        return torch.cuda.max_memory_allocated() - before
    there = [*map(local, parameters), *(local(p.grad) for p in parameters if p.grad is not None), *buffers]
    with _resizes_seen(), _Live(there) as live:
        training.differentiate(step)
    return live.peak + fixed


class _Live(LiveStorages):
    """Of sharded tensors it counts the part that is here."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(local(leaf).untyped_storage())
        return out

    def resized(self, storage: torch.UntypedStorage) -> None:
        """A storage has another size, without an operation that would tell."""
        if storage._cdata in self.sizes:
            self._count(storage)


@contextlib.contextmanager
def _resizes_seen() -> Iterator[None]:
    """FSDP frees and allocates what it gathers by resizing storages, which no operation tells of."""
    resize = torch.UntypedStorage.resize_

    def told(storage, size):
        done = resize(storage, size)
        for mode in _get_current_dispatch_mode_stack():
            if isinstance(mode, _Live):
                mode.resized(storage)
        return done

    torch.UntypedStorage.resize_ = told
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize


def seconds_by_turns(training: Training, baseline: Training | None, wire: Wire, plan: Plan) -> dict[str, list[float]]:
    """Wall seconds of a step in every turn: of backprop on the first rank while the others wait, of the method, and of the
    method over the link; and processor seconds of this rank in backprop's steps and in the method's. Only the first rank's
    wall seconds count.
    """
    names = ("baseline_seconds", "baseline_processor_seconds", "seconds", "linked_seconds", "processor_seconds")
    found: dict[str, list[float]] = {name: [] for name in names}
    wait = torch.cuda.synchronize if training.case.device != "cpu" else lambda: None

    def turn(trained: Training | None) -> tuple[float, float]:
        wait()
        distributed.barrier()
        begun, processor = time.perf_counter(), time.process_time()
        for step in range(plan.steps if trained is not None else 0):
            trained.step(step)
        wait()
        processor = time.process_time() - processor
        if trained is training:
            distributed.barrier()
        return (time.perf_counter() - begun) / plan.steps, processor / plan.steps

    for _ in range(plan.repeats):
        seconds, processor = turn(baseline)
        found["baseline_seconds"].append(seconds)
        found["baseline_processor_seconds"].append(processor)
        seconds, processor = turn(training)
        found["seconds"].append(seconds)
        found["processor_seconds"].append(processor)
        if plan.link is not None:
            with wire.watched():
                found["linked_seconds"].append(turn(training)[0])
    return found
