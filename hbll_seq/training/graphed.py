"""A training step as CUDA graphs: forward and backward are recorded once and then replayed, without waiting for Python.

A graph holds what one run of the step put on the device. Weights and inputs are read where they lie, so that it goes on with
new ones; what Python decided is fixed. Of the objectives here that is the draw of the depth mix: each draw has its own graph.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from hbll_seq.objectives.base import Objective, ObjectiveOutput
from hbll_seq.utils.console import say
from hbll_seq.utils.exhausted import memory_is_full
from hbll_seq.utils.reading import shorten

T = TypeVar("T")
WARMUP = 3  # steps before a captured one
#: graphs of a run at most: each keeps gradients of its own, as large as the weights
MOST_GRAPHS = 32
#: relative differences of losses, and of gradients by their norm, up to which two steps are one. An untrained model's
#: losses of two batches lie close to each other; gradients are summed up in an order that varies.
TOLERANCES = {"float32": {"loss_difference": 1e-4, "gradient_difference": 1e-3},
              "bfloat16": {"loss_difference": 2e-3, "gradient_difference": 5e-2}}  # fmt: skip
_REMEDY = "leave --cuda-graph out (--resume --no-cuda-graph goes on from the last checkpoint)"


class CaptureFailed(RuntimeError):
    """A capture that broke off: torch's allocator and generators may be left in the middle of it."""


class Step:
    """Forward and backward of an objective, always on the same input tensors.

    Args:
        objective: called with ``inputs`` and ``options``.
        inputs: tensors on the device; what is written into them later is what a step reads.
        options: by name.
    """

    def __init__(self, objective: Callable[..., ObjectiveOutput], inputs: Sequence[Tensor], **options: Any):
        self.objective, self.inputs, self.options = objective, tuple(inputs), options

    def __call__(self) -> Any:
        """The output, detached and without states; gradients are left in ``.grad``."""
        output = self.objective(*self.inputs, **self.options)
        output.loss.backward()
        return output._replace(loss=output.loss.detach(), node_losses=output.node_losses.detach(), states={})

    def read(self, batch: Sequence[Tensor]) -> None:
        """Copies a batch into the input tensors."""
        for own, given in zip(self.inputs, batch):
            own.copy_(given)

    def forget(self) -> None:
        """Sets gradients to None: the next backward makes new ones, and adds to nothing."""
        for p in self.objective.parameters():
            p.grad = None

    def gradients(self) -> list[Tensor | None]:
        """Of all parameters, None of one that has none."""
        return [p.grad for p in self.objective.parameters()]


# ------------------------------------------------------------------------------------------------------------ a capture


def capture(step: Callable[[], T], began: Callable[[], None] = lambda: None, pool: Any = None) -> Callable[[], T]:
    """A step as one CUDA graph; the call that replays it returns what the step returned, in the same memory each time.

    It reads the step's inputs wherever they are overwritten, and writes the gradients that ``.grad`` holds then: the same
    memory at each replay, and nothing is added up. Warm-up and capture are on one side stream.

    Args:
        step: a :class:`Step`, or what has its ``forget``.
        began: called before the capture itself.
        pool: of memory, shared with other graphs: then a replay may overwrite what theirs have left.

    Raises:
        RuntimeError: an operation waits for the device; found before the capture.
        CaptureFailed: the capture failed.
    """
    stream, before = side_stream(), torch.cuda.current_stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        for _ in range(WARMUP):
            step.forget()
            step()
        with waiting_refused():
            step.forget()
            step()
    before.wait_stream(stream)
    step.forget()  # so that backward makes the gradients, in the graph's own memory
    began()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            output = step()
    except Exception as error:
        raise CaptureFailed("the capture failed") from error
    finally:
        torch.cuda.set_stream(before)  # which a failed capture leaves undone

    def replay() -> T:
        graph.replay()
        return output

    return replay


@contextlib.contextmanager
def waiting_refused() -> Iterator[None]:
    """Inside it, an operation that waits for the device is an error, as in a capture; but one that breaks nothing."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@functools.cache
def side_stream() -> torch.cuda.Stream:
    """One for all captures: the workspace of matrix products is made once for each stream."""
    return torch.cuda.Stream()


def first_cause(error: BaseException) -> BaseException:
    """Of torch's errors that follow one another, such as that of a capture's end after what broke it, the first."""
    before: BaseException | None = error
    while (before := before.__cause__ or before.__context__) is not None:
        if isinstance(before, RuntimeError):
            error = before
    return error


def differences(
    loss: Tensor, gradients: Sequence[Tensor | None], expected: Tensor, of_plain: Sequence[Tensor | None]
) -> dict[str, float]:
    """Relative differences of the loss, and of all gradients as one vector; infinite where others have one."""
    pairs = [(g, p) for g, p in zip(gradients, of_plain, strict=True) if g is not None or p is not None]
    apart = size = 0.0
    for g, p in pairs:
        if g is None or p is None:
            apart = float("inf")
        else:
            apart += (g.float() - p.float()).square().sum().item()
            size += p.float().square().sum().item()
    of_loss = abs(loss.item() - expected.item()) / max(abs(expected.item()), 1e-30)
    return {"loss_difference": of_loss, "gradient_difference": (apart / max(size, 1e-30)) ** 0.5}


def told_apart(found: dict[str, float], precision: str) -> str:
    """The differences in words where one is not allowed, NaN included; nothing where two steps are one."""
    allowed = TOLERANCES[precision]
    told = [f"{key.replace('_', ' ')} {value:.2g} (allowed {allowed[key]:g})" for key, value in found.items()]
    return "" if all(value <= allowed[key] for key, value in found.items()) else f"relative {', '.join(told)}"


# ------------------------------------------------------------------------------------------------------ a training step


class _Graph(NamedTuple):
    """``replay``: returns the output; ``gradients``: of all parameters, where a replay writes them; None of one without."""

    replay: Callable[[], ObjectiveOutput]
    gradients: list[Tensor | None]


class GraphedStep:
    """Forward and backward of an objective for batches of one shape, by CUDA graphs.

    What :func:`hbll_seq.training.graph_settings.check_cuda_graph` refuses would be wrong here: dropout, noise and learned
    maps change with every step, and a graph repeats those of its capture.

    A graph reads another batch before it is trusted, and is compared there with the plain step. The graphs share their
    memory: outputs and gradients are to be used before the next call. Where a parameter or a buffer has been moved, cast,
    replaced, frozen or trained again since the call before, all graphs are dropped and made anew; one that was written in
    place is read as it is. Modules and parameters that are added later are not noticed.

    Args:
        objective: on a CUDA device, prepared; its autocast must keep no cache.
        precision: its name among ``TOLERANCES``.

    Attributes:
        graphs: by draw.
    """

    def __init__(self, objective: Objective, precision: str):
        self.objective, self.precision = objective, precision
        self._begin()
        self._told = False

    def _begin(self) -> None:
        """Without graphs, for the weights as they are."""
        self.parameters = list(self.objective.parameters())
        self.graphs: dict[Hashable, _Graph] = {}
        self._inputs: Tensor | None = None  # of all graphs, outside of their memory
        self._pool = None  # which ends with the last of its graphs
        tensors = ((of, name) for module in self.objective.modules() for of in (module._parameters, module._buffers)
                   for name in of)  # fmt: skip
        self._places = list(tensors)  # to find them takes longer than to ask each
        self._weights = self._now()

    def _now(self) -> list[tuple]:
        """What graphs have fixed of the weights and buffers."""
        found = (of.get(name) for of, name in self._places)
        return [(id(t), t.data_ptr(), t.dtype, t.requires_grad) for t in found if t is not None]

    def __call__(self, batch: Tensor, step: int) -> ObjectiveOutput:
        """The output, detached and without states; gradients are in ``.grad``, None of parameters that the draw leaves out.

        Args:
            batch: [B, T + 1], on any device.
            step: its draw of the depth mix is made.

        Raises:
            ValueError: a batch of another shape, a step that cannot be captured, or a graph that computes another one.
        """
        if self._now() != self._weights:
            self._begin()
        if self._inputs is None:
            self._inputs = batch.to(self.parameters[0].device, copy=True)
        if batch.shape != self._inputs.shape:
            raise ValueError(f"batch of shape {tuple(batch.shape)}: the graphs read {tuple(self._inputs.shape)}; give "
                             "batches of one shape, or leave --cuda-graph out")
        work, draw = Step(self.objective, [self._inputs], step=step), self.draw(step)
        work.read([batch])
        if draw not in self.graphs:
            return self._first(draw, work)
        graph = self.graphs[draw]
        output = graph.replay()
        for parameter, gradient in zip(self.parameters, graph.gradients):
            parameter.grad = gradient
        return output

    def draw(self, step: int) -> Hashable:
        """All that Python decides in a step: paths, and exits with their weights, in their order."""
        return tuple((network.path, *network.exits.items()) for network in self.objective.sub_networks(step))

    def _first(self, draw: Hashable, work: Step) -> ObjectiveOutput:
        """A step whose draw has no graph: the plain one, beside which a graph is made where there is room."""
        work.forget()
        output, gradients = work(), work.gradients()
        if len(self.graphs) >= MOST_GRAPHS:
            if not self._told:
                say(f"cuda_graph: the depth mix draws more than {MOST_GRAPHS} sets of paths; steps of further ones are plain")
            self._told = True
        elif _is_finite(output.loss, gradients):  # else the run ends with this step
            self.graphs[draw] = self._made(work, output.loss, gradients)
        for parameter, gradient in zip(self.parameters, gradients):
            parameter.grad = gradient
        return output

    def _made(self, work: Step, loss: Tensor, gradients: list[Tensor | None]) -> _Graph:
        """A graph, captured on another batch than the present one, whose plain step has this loss and these gradients."""
        (batch,) = (own.clone() for own in work.inputs)
        work.read([batch.flip(1)])
        try:
            if self._pool is None:
                self._pool = new_pool()
            graph = _Graph(capture(work, pool=self._pool), work.gradients())
        except RuntimeError as error:
            cause = first_cause(error)
            if memory_is_full(cause):
                raise cause from None
            raise ValueError(f"cuda_graph=True: this step cannot be captured ({shorten(cause, 200)}); {_REMEDY}") from error
        work.read([batch])
        if told := told_apart(differences(graph.replay().loss, graph.gradients, loss, gradients), self.precision):
            raise ValueError(f"cuda_graph=True: the graph computes another step than the plain one: {told}; {_REMEDY}")
        return graph


def new_pool() -> Any:
    """Memory that graphs share."""
    return torch.cuda.graph_pool_handle()


def _is_finite(loss: Tensor, gradients: Sequence[Tensor | None]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in (loss, *gradients) if tensor is not None)
