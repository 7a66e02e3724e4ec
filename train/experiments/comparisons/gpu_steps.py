"""One training step as ``gpu.py`` measures it: plain, or captured in a CUDA graph and held against the plain one."""

from __future__ import annotations

import contextlib
import gc
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from comparisons.gpu_cells import Form
from hbll_seq.training import graphed
from hbll_seq.training.graphed import WARMUP, capture, differences, first_cause, told_apart
from hbll_seq.utils.reading import shorten

MIB = 2**20
LEAST = 3  # timed repeats at least, however long they take


class DoesNotFit(ValueError):
    """A form that cannot be measured here; its text is the reason."""


@dataclass
class Subject:
    """What a step is made of.

    Attributes:
        model: shared by the forms of a shape; no form changes its weights.
        inputs: of the objective, tensors on the device.
        others: another batch of the same shapes.
    """

    model: nn.Module
    inputs: tuple[Tensor, ...]
    others: tuple[Tensor, ...]


class Step(graphed.Step):
    """The same with the precision of a cell, on inputs of its own.

    Args:
        objective: called with ``inputs``.
        subject: whose ``inputs`` are copied, so that :meth:`read` may overwrite them.
        precision: ``"bf16"`` is autocast.
    """

    def __init__(self, objective: nn.Module, subject: Subject, precision: str):
        super().__init__(objective, [t.clone() for t in subject.inputs])
        self.subject, self.precision = subject, {"bf16": "bfloat16"}.get(precision, precision)

    def __call__(self) -> Tensor:
        """The loss, detached; gradients are left in ``.grad``."""
        bf16 = self.precision == "bfloat16"
        with torch.autocast(self.inputs[0].device.type, torch.bfloat16, enabled=bf16):
            output = self.objective(*self.inputs)
        output.loss.backward()
        return output.loss.detach()


class Memory:
    """The peak of ``torch.cuda.max_memory_allocated`` in MiB, without what the measurement itself holds; None on a CPU."""

    def __init__(self, device: torch.device):
        self.is_cuda, self.before, self.held = device.type == "cuda", 0, 0
        if self.is_cuda:
            self.before = torch.cuda.memory_allocated()

    def start(self) -> None:
        """From here on the peak counts."""
        if self.is_cuda:
            self.held = torch.cuda.memory_allocated() - self.before
            torch.cuda.reset_peak_memory_stats()

    def result(self) -> dict[str, float | None]:
        """``peak_mib``: with weights and inputs; ``step_mib``: above what lay there before the step."""
        if not self.is_cuda:
            return {"peak_mib": None, "step_mib": None}
        peak = torch.cuda.max_memory_allocated() - self.held
        return {"peak_mib": round(peak / MIB, 2), "step_mib": round((peak - self.before) / MIB, 2)}


def times_of(call: Callable[[], object], device: torch.device, repeats: int, seconds: float) -> dict[str, object]:
    """Times of single calls, each from an idle device to an idle device: by CUDA events, on a CPU by the clock.

    Args:
        call: what is timed.
        device: where it runs.
        repeats: calls at most.
        seconds: no further call begins after so many, once there are ``LEAST``.

    Returns:
        ``median_ms``, ``spread_ms`` (the shortest and the longest) and ``repeats``.
    """
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < repeats:
        if len(times) >= LEAST and time.perf_counter() - begun > seconds:
            break
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        else:
            start_s = time.perf_counter()
            call()
            times.append((time.perf_counter() - start_s) * 1e3)
    return {"median_ms": median(times), "spread_ms": [min(times), max(times)], "repeats": len(times)}


# ---------------------------------------------------------------------------------------------------- a training step


def measure_step(form: Form, subject: Subject, precision: str, repeats: int, seconds: float) -> dict[str, object]:
    """Time and memory of a form.

    Raises:
        DoesNotFit: it needs CUDA and the device has none, or a graph computes another step than the plain form.
        Exception: whatever the form raises.
    """
    device = subject.inputs[0].device
    if form.needs_cuda and device.type != "cuda":
        raise DoesNotFit("needs CUDA")
    begun = time.perf_counter()
    with _blocks_compiled(subject.model, form):
        step = Step(form.make(subject.model).to(device), subject, precision)
        try:
            if form.side == "optimizer":
                return _measure_optimizer(step, device, repeats, seconds)
            if form.graphed:
                return _measure_graph(step, device, repeats, seconds)
            for _ in range(WARMUP):
                step()
                step.forget()
                if not form.compiled and time.perf_counter() - begun > 2 * seconds:  # a long step is warm after one
                    break
            memory = Memory(device)
            memory.start()
            prepared = time.perf_counter() - begun
            times = times_of(lambda: (step.forget(), step()), device, repeats, seconds)
            return {**times, **memory.result(), "setup_s": prepared}
        finally:
            step.forget()


def _measure_optimizer(step: Step, device: torch.device, repeats: int, seconds: float) -> dict[str, object]:
    """A step of AdamW with the gradients there; of a rate of 0, so that the weights stay."""
    begun = time.perf_counter()
    step()
    parameters = [p for p in step.objective.parameters() if p.grad is not None]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=device.type == "cuda")
    optimizer.step()
    memory = Memory(device)
    memory.start()
    prepared = time.perf_counter() - begun
    return {**times_of(optimizer.step, device, repeats, seconds), **memory.result(), "setup_s": prepared}


@contextlib.contextmanager
def _blocks_compiled(model: nn.Module, form: Form) -> Iterator[None]:
    """Inside it, the model's blocks are compiled ones with the same weights, where the form wants that."""
    if not form.compiled:
        yield
        return
    before = list(model.blocks)
    for n, block in enumerate(before):
        model.blocks[n] = torch.compile(block, dynamic=False)
    # Local losses take products of one graph more than once; a compiled backward would by default overwrite what it saved.
    config = torch._functorch.config
    kept = {"donated_buffer": False} if form.side == "ours" and hasattr(config, "donated_buffer") else {}
    try:
        with config.patch(kept):
            yield
    finally:
        for n, block in enumerate(before):
            model.blocks[n] = block


# ------------------------------------------------------------------------------------------------------ a CUDA graph


def _measure_graph(step: Step, device: torch.device, repeats: int, seconds: float) -> dict[str, object]:
    """Captured on one batch, held against the plain step on another one, and timed."""
    begun = time.perf_counter()
    buffers = [(buffer, buffer.clone()) for buffer in step.objective.buffers()]  # what a step learns beside its weights
    step()
    step.forget()
    memory = Memory(device)
    step.read(step.subject.others)
    _restore(buffers)
    expected = step().clone()
    gradients = step.gradients()
    step.read(step.subject.inputs)
    step.forget()
    replay = capture(step, memory.start)
    peak = memory.result()
    step.read(step.subject.others)
    _restore(buffers)
    found = differences(replay().clone(), step.gradients(), expected, gradients)
    del gradients
    if told := told_apart(found, step.precision):
        raise DoesNotFit(f"the graph computes another step than the plain form: {told}")
    prepared = time.perf_counter() - begun
    return {**times_of(replay, device, repeats, seconds), **peak, **found, "setup_s": prepared}


def _restore(buffers: list[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for buffer, saved in buffers:
            buffer.copy_(saved)


# ------------------------------------------------------------------------------------------------------------ failures


def reason_of(error: BaseException) -> str:
    """A failure in one line, with the line of the library it comes from. Of torch's errors that follow one another, such as
    that of a capture's end after what broke it, the first."""
    if isinstance(error, DoesNotFit):
        return str(error)
    error = first_cause(error)
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/hbll_seq/" in f.filename.replace("\\", "/")]
    where = ""
    if frames:
        file = "hbll_seq/" + frames[-1].filename.replace("\\", "/").rpartition("/hbll_seq/")[2]
        where = f" (at {file}:{frames[-1].lineno}, {frames[-1].name})"
    return shorten(f"{type(error).__name__}: {text}", 300) + where


def clean_up(device: torch.device) -> bool:
    """Frees what a cell left on a GPU; whether the device still works."""
    if device.type != "cuda":
        return True
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.isfinite(torch.randn(8, 8, device=device) @ torch.randn(8, 8, device=device)).all().item()
    except RuntimeError:
        return False
