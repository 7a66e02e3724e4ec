"""Fidelity when needed: numbers of iterations that follow what is measured in training (docs/method.md 2.6).

Few iterations are enough as long as what they leave out is small, and that changes in a run. Every so many steps a *probe*
compares the step's gradient with the exact one of the same batch. It tells by how much they differ and which side is to
blame, the states (K) or the adjoints (M); that side gets one iteration more. MGRIT training of transformers has an indicator
that switches from approximate to exact passes once (arXiv 2601.09026); here each side goes as far as it has to.

Between probes the residual of the last forward iteration is watched, which costs nothing: a jump calls for a probe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from hbll_seq.engine.iterations import Iterations
from hbll_seq.utils.modules import KeepsPrecision
from hbll_seq.utils.options import check_options, option

#: a probe is calm where the gradient misses by no more than this part of the tolerance; after so many of them in a row the
#: controller tries one iteration less, and takes it where it misses by no more than half of the tolerance
CALM, CALM_PROBES, LOWERED = 0.25, 3, 0.5
#: a residual that has grown by this factor since the last probe calls for another, once this part of ``every`` is over
JUMP, SOONEST = 2.0, 0.2
_FORWARD, _BACKWARD = range(2)

#: parts of a gradient, in an order that is the same for all that are compared; None is zero
Gradient = Sequence[Tensor | None]
Options = TypeVar("Options")


@dataclass(frozen=True)
class Adaptive:
    """K and M start at what the sweeps say and follow probes: see :class:`FidelityControl`.

    Attributes:
        tolerance: by how much the cosine of the gradient and the exact one may miss 1.
        most: neither K nor M is raised beyond it; None goes on to exact iterations.
        every: training steps between two probes; the first step has one.

    Raises:
        ValueError: a value is out of range.
    """

    name: ClassVar[str] = "adaptive"
    tolerance: float = option(
        0.02, "adaptive: an iteration is added where the gradient's cosine with the exact one misses 1 by more",
        above=0, below=1,
    )  # fmt: skip
    most: int | None = option(None, "adaptive: most iterations each way; none goes on to exact ones", low=0, high=1_000_000)
    every: int = option(50, "adaptive: training steps between two comparisons with the exact gradient", low=1, high=1_000_000)

    def __post_init__(self):
        check_options(self)


#: every control by its name
CONTROLS: dict[str, type[Adaptive]] = {Adaptive.name: Adaptive}


class FidelityControl(KeepsPrecision):
    """The numbers of iterations of an objective's sweeps, as they are now, and what changes them.

    A training step is bracketed by :meth:`begin_step` and :meth:`end_step`. Where the first one says so, a probe comes in
    between. With E = 1 - cosine of the step's gradient and the exact one:

    - E above ``tolerance``: one side is raised by one. If both can be, it is the one that alone misses more: K as it is with
      exact adjoints, or exact states with M as it is.
    - E within ``CALM`` of it at ``CALM_PROBES`` probes in a row: the side that would lose less is lowered by one, not below
      the start, if E stays within ``LOWERED`` of the tolerance then.

    What a probe decides holds from the next optimizer step on, so that all micro batches of one have the same K and M. All
    that is measured is averaged over the processes of ``torch.distributed``, so that all decide alike. What is not finite
    decides nothing. All that is known is in buffers: a resumed run repeats the unbroken one.

    Args:
        options: tolerance, limits and period.
        iterations: K and M to start with, and c.
        micro_batches: training forwards of an optimizer step.
        over_time: whether the chain is one of steps in time.
    """

    def __init__(self, options: Adaptive, iterations: Iterations, micro_batches: int = 1, over_time: bool = False):
        super().__init__()
        self.over_time = over_time
        self.options, self.micro_batches, self.size = options, micro_batches, iterations.chunk_size
        self.start = iterations.forward, iterations.backward
        self.register_buffer("iterations", torch.tensor(self.start))  # K, M of this optimizer step
        self.register_buffer("chosen", torch.tensor(self.start))  # of the next one
        # micro batches, optimizer steps since the last probe, calm probes in a row, whether a residual has jumped
        self.register_buffer("counts", torch.zeros(4, dtype=torch.int64))
        # cosine at the last probe, residual in the step behind it
        self.register_buffer("figures", torch.tensor([1.0, 0.0]))

    def applied(self, options: Options) -> Options:
        """Sweeps with the K and M of now."""
        forward, backward = self.iterations.tolist()
        return replace(options, forward=forward, backward=backward)

    def begin_step(self) -> bool:
        """Begins a training forward: whether it shall have a probe."""
        n_forwards, since, _, jumped = self.counts.tolist()
        if n_forwards % self.micro_batches:
            return False
        self.iterations.copy_(self.chosen)
        every = self.options.every
        return n_forwards == 0 or since >= every or (jumped > 0 and since >= SOONEST * every)

    def probe(self, n_steps: int, present: Gradient, exact: Gradient, at: Callable[[int, int], Gradient]) -> None:
        """Compares gradients and chooses K and M of the next optimizer step.

        Args:
            n_steps: transitions of the chain; of processes whose sequences differ in length, their mean counts.
            present: of this step.
            exact: of the same batch.
            at: of the same batch with other K and M.
        """
        numbers, tolerance = self.iterations.tolist(), self.options.tolerance
        most = math.inf if self.options.most is None else self.options.most
        n_steps = math.ceil(mean_over_processes(torch.tensor([float(n_steps)], device=self.counts.device))[0])
        ends = exact_iterations(self.size, n_steps, self.over_time)
        calm = int(self.counts[2])

        def error(*numbers: int) -> float:
            return 1.0 - self._cosine(at(*numbers), exact)

        cosine = self._cosine(present, exact)
        missing = 1.0 - cosine
        if missing > tolerance:
            calm = 0
            open_sides = [side for side in (_FORWARD, _BACKWARD) if numbers[side] < min(ends[side], most)]
            if len(open_sides) == 2:
                of_states, of_adjoints = error(numbers[0], ends[1]), error(ends[0], numbers[1])
                open_sides = [_BACKWARD if of_adjoints > of_states else _FORWARD]
            for side in open_sides:
                numbers[side] += 1
        elif missing <= CALM * tolerance:
            calm += 1
            if calm >= CALM_PROBES:
                calm, numbers = 0, self._lowered(numbers, error)
        else:
            calm = 0
        self.chosen.copy_(torch.tensor(numbers))
        self.counts[1:] = torch.tensor([0, calm, 0])
        if math.isfinite(cosine):
            self.figures[0] = cosine

    def _lowered(self, numbers: list[int], error: Callable[..., float]) -> list[int]:
        """One iteration less on the side that loses less by it, if any can do without."""
        fewer = [[n - (i == side) for i, n in enumerate(numbers)] for side in (_FORWARD, _BACKWARD)
                 if numbers[side] > self.start[side]]  # fmt: skip
        errors = [error(*each) for each in fewer]
        best = min(range(len(fewer)), key=errors.__getitem__, default=None)
        return numbers if best is None or not errors[best] <= LOWERED * self.options.tolerance else fewer[best]

    def end_step(self, residual: Tensor) -> None:
        """Ends a training forward.

        Args:
            residual: of its last forward iteration, a scalar.
        """
        n_forwards, since, *others = self.counts.tolist()
        if n_forwards % self.micro_batches == 0:
            residual = float(mean_over_processes(residual.detach().to(torch.float32).reshape(1))[0])
            if since == 1:  # the first one with what the probe has chosen
                self.figures[1] = residual
            elif since > 1 and residual > JUMP * float(self.figures[1]):
                others[1] = 1
            since += 1
        self.counts.copy_(torch.tensor([n_forwards + 1, since, *others]))

    def metrics(self) -> dict[str, Tensor]:
        """``forward`` and ``backward``, K and M of this step, and ``cosine``, of the last probe's gradient and the exact one;
        1 before the first."""
        forward, backward = self.iterations.to(torch.float32).unbind()
        return {"forward": forward, "backward": backward, "cosine": self.figures[0].to(torch.float32)}

    @staticmethod
    def _cosine(found: Gradient, exact: Gradient) -> float:
        return float(mean_over_processes(cosine_of(found, exact).reshape(1))[0])


def exact_iterations(chunk_size: int, n_steps: int, over_time: bool = False) -> tuple[int, int]:
    """K and M with which a chain of N transitions is solved exactly (docs/method.md 2.2). Over time no walk follows the M."""
    size, n_segments = Iterations(0, chunk_size=chunk_size).segments(n_steps)
    return n_segments - 1, n_segments - (not over_time or size == 1)


def cosine_of(found: Gradient, exact: Gradient) -> Tensor:
    """Cosine of two gradients, a scalar; 1 where both are zero, as those of a batch without targets are."""
    pairs = [(g, h) for g, h in zip(found, exact, strict=True) if g is not None or h is not None]
    if not pairs:
        return torch.ones(())
    dot, found_square, exact_square = torch.stack([_products(g, h) for g, h in pairs]).sum(0).unbind()
    both_zero = (found_square == 0) & (exact_square == 0)
    cosine = dot / (found_square.sqrt() * exact_square.sqrt()).clamp(min=1e-30)
    return torch.where(both_zero, torch.ones_like(cosine), cosine)


def _products(g: Tensor | None, h: Tensor | None) -> Tensor:
    g, h = torch.zeros_like(h) if g is None else g, torch.zeros_like(g) if h is None else h
    g, h = (t.flatten().to(torch.promote_types(t.dtype, torch.float32)) for t in (g, h))
    return torch.stack((g.dot(h), g.dot(g), h.dot(h)))


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of a tensor over all processes, the same on each; of one process, the tensor."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return values
    values = values.clone()
    distributed.all_reduce(values)
    return values / distributed.get_world_size()
