"""One training step as ``gpu.py`` measures it: plain, or captured in a CUDA graph and held against the plain one."""

from __future__ import annotations

import contextlib
import functools
import gc
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from comparisons.gpu_cells import Form
from hbll_seq.utils.reading import shorten

MIB = 2**20
WARMUP = 3  # steps before a timed or captured one
LEAST = 3  # timed repeats at least, however long they take
#: relative differences of losses, and of gradients by their norm, up to which two steps are one. An untrained model's
#: losses of two batches lie close to each other; gradients are summed up in an order that varies.
TOLERANCES = {"float32": {"loss_difference": 1e-4, "gradient_difference": 1e-3},
              "bf16": {"loss_difference": 2e-3, "gradient_difference": 5e-2}}  # fmt: skip


class DoesNotFit(ValueError):
    """A form that cannot be measured here; its text is the reason."""


class CaptureFailed(RuntimeError):
    """A capture that broke off: torch's allocator and generators may be left in the middle of it."""


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


class Step:
    """Forward and backward of an objective, always on the same input tensors.

    Args:
        objective: called with ``inputs``.
        subject: whose ``inputs`` are copied, so that :meth:`read` may overwrite them.
        precision: ``"bf16"`` is autocast.
    """

    def __init__(self, objective: nn.Module, subject: Subject, precision: str):
        self.objective, self.subject, self.precision = objective, subject, precision
        self.inputs = tuple(t.clone() for t in subject.inputs)

    def __call__(self) -> Tensor:
        """The loss, detached; gradients are left in ``.grad``."""
        bf16 = self.precision == "bf16"
        with torch.autocast(self.inputs[0].device.type, torch.bfloat16, enabled=bf16):
            output = self.objective(*self.inputs)
        output.loss.backward()
        return output.loss.detach()

    def read(self, batch: tuple[Tensor, ...]) -> None:
        """Copies a batch into the input tensors."""
        for own, given in zip(self.inputs, batch):
            own.copy_(given)

    def forget(self) -> None:
        """Sets gradients to None: the next backward makes new ones, and adds to nothing."""
        for p in self.objective.parameters():
            p.grad = None

    def gradients(self) -> list[Tensor]:
        """Of all parameters that have one."""
        return [p.grad for p in self.objective.parameters() if p.grad is not None]


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


def capture(step: Step, memory: Memory) -> Callable[[], Tensor]:
    """Forward and backward as one CUDA graph; the call that replays it returns the loss.

    It reads ``step.inputs`` wherever they are overwritten, and writes the gradients that ``.grad`` holds then: the same
    memory at each replay, and nothing is added up. Warm-up and capture are on one side stream; ``memory`` counts the capture.
    """
    stream, before = _side_stream(), torch.cuda.current_stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        for _ in range(WARMUP):
            step.forget()
            step()
        with _waiting_refused():
            step.forget()
            step()
    before.wait_stream(stream)
    step.forget()  # so that backward makes the gradients, in the graph's own memory
    memory.start()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            loss = step()
    except Exception as error:
        raise CaptureFailed("the capture failed") from error
    finally:
        torch.cuda.set_stream(before)  # which a failed capture leaves undone

    def replay() -> Tensor:
        graph.replay()
        return loss

    return replay


@contextlib.contextmanager
def _waiting_refused() -> Iterator[None]:
    """Inside it, an operation that waits for the device is an error, as in a capture; but one that breaks nothing."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    """One for all captures: the workspace of matrix products is made once for each stream."""
    return torch.cuda.Stream()


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
    replay = capture(step, memory)
    peak = memory.result()
    step.read(step.subject.others)
    _restore(buffers)
    differences = _compare(replay().clone(), step.gradients(), expected, gradients)
    del gradients
    allowed = TOLERANCES[step.precision]
    if not all(value <= allowed[key] for key, value in differences.items()):  # so that NaN is refused
        told = [f"{key.replace('_', ' ')} {value:.2g} (allowed {allowed[key]:g})" for key, value in differences.items()]
        raise DoesNotFit(f"the graph computes another step than the plain form: relative {', '.join(told)}")
    prepared = time.perf_counter() - begun
    return {**times_of(replay, device, repeats, seconds), **peak, **differences, "setup_s": prepared}


def _restore(buffers: list[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for buffer, saved in buffers:
            buffer.copy_(saved)


def _compare(loss: Tensor, gradients: list[Tensor], expected: Tensor, of_plain: list[Tensor]) -> dict[str, float]:
    """Relative differences of the loss, and of all gradients as one vector."""
    if len(gradients) != len(of_plain):
        raise DoesNotFit(f"the graph has gradients of {len(gradients)} parameters, the plain form of {len(of_plain)}")
    apart = sum((g.float() - p.float()).square().sum().item() for g, p in zip(gradients, of_plain))
    size = sum(p.float().square().sum().item() for p in of_plain)
    of_loss = abs(loss.item() - expected.item()) / max(abs(expected.item()), 1e-30)
    return {"loss_difference": of_loss, "gradient_difference": (apart / max(size, 1e-30)) ** 0.5}


# ------------------------------------------------------------------------------------------------------------ failures


def reason_of(error: BaseException) -> str:
    """A failure in one line, with the line of the library it comes from. Of torch's errors that follow one another, such as
    that of a capture's end after what broke it, the first."""
    if isinstance(error, DoesNotFit):
        return str(error)
    before: BaseException | None = error
    while (before := before.__cause__ or before.__context__) is not None:
        if isinstance(before, RuntimeError):
            error = before
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
