"""A learned stand-in for the Jacobian of a chunk of time: one matrix for all chunks and sequences, from secants.

Two sweeps walk a chunk from two estimates of its first state. What the state that a walk comes to changed by, against the
change of the one that it began with, is a secant of the c transitions between, which takes no further call of the cell. One
H x H matrix, fitted to many of them over chunks, sequences and training steps, then carries what a sweep has changed at the
end of a chunk through all later ones: the coarse half of parareal (Lions, Maday, Turinici 2001), learned and linear. A
recurrent network keeps what it has read in much the same directions whatever it reads, so that for a GRU one matrix explains
most of what c transitions do to a change, where the product of the diagonals explains little (README, "What we tried").

The same for messages, of the transposed Jacobians, from two walks of their products.

Shapes: n chunks, B batch, H hidden width; states are rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hbll_seq.engine.linearization.base import Linearization
from hbll_seq.engine.linearization.regression import RunningFits, full_precision, ridge_factor
from hbll_seq.engine.scan import shared_scan

#: squarings of a map from whose size its spectral radius is taken.
SQUARINGS = 8


@dataclass(frozen=True)
class SharedMatrix(Linearization):
    """One learned matrix for all segments of time (a learned coarse propagator, as in parareal)."""

    name: ClassVar[str] = "shared_matrix"


class TimeSecants(RunningFits):
    """Running regressions of what walks come to on where they begin, and of the same for messages: 3 H^2 numbers a map.

    Every sweep has a map of its own: the first one carries changes from no state at all to a rough one, over which a cell
    that saturates has another slope than over those that later sweeps make. So has every correction but the last, which
    carries nothing. A sweep's map learns from how far its walks began from those of the last sweep, the best estimate; a
    correction's, whose walks are linear, from those of the next.

    Their averages forget sooner than those over depth: early in training a cell changes fast, and sweeps that carry changes
    through what it did fifty steps ago diverge.

    Args:
        width: H.
        sweeps, corrections: K and M; further ones would share the last map, and so they do when a state of fewer is loaded.
        decay: see :class:`RunningFits`.
        every: the same; by default 2, and more for H above 128, so that fits, of H^3 each, do not come to dominate a step.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self, width: int, sweeps: int = 1, corrections: int = 2, *, decay: float = 0.95, every: int | None = None
    ):  # fmt: skip
        for name, value, least in (("width", width, 1), ("sweeps", sweeps, 1), ("corrections", corrections, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r}: must be a whole number of at least {least}")
        super().__init__(decay, max(2, width // 64) if every is None else every)
        for way, n_maps in (("forward", sweeps), ("backward", max(1, corrections - 1))):
            for name in ("change", "response", "map"):
                self.register_buffer(f"{way}_{name}", torch.zeros(n_maps, width, width))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes a state of other numbers of sweeps and corrections too, which may grow with training."""
        for name, buffer in self.named_buffers(recurse=False):
            stored = state_dict.get(prefix + name)
            if buffer.dim() and stored is not None and stored.shape[1:] == buffer.shape[1:] and len(stored):
                missing = stored[-1:].expand(max(0, len(buffer) - len(stored)), *stored.shape[1:])
                state_dict[prefix + name] = torch.cat((stored[: len(buffer)], missing))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _of(self, name: str, way: str, number: int) -> Tensor:
        buffer = getattr(self, f"{way}_{name}")
        return buffer[min(number, len(buffer) - 1)]

    def compose(self, walked: Tensor, begun: Tensor, way: str, number: int) -> Tensor:
        """What walks come to, [n, B, H], once each begins where the one before it comes to.

        Args:
            walked: [n, B, H], what they came to from ``begun``.
            begun: [n, B, H]; the first of them is not moved.
            way: ``"forward"``, or ``"backward"`` for messages, where the last of them is walked first.
            number: of the sweep or correction, from 0.
        """
        is_backward = way == "backward"
        matrix = self._of("map", way, number)
        work = torch.promote_types(walked.dtype, matrix.dtype)
        with full_precision(walked):
            matrix, begun = matrix.to(work), begun.to(work)
            b = walked.to(work) - begun @ matrix
            return shared_scan(b, matrix, begun[-1 if is_backward else 0], reverse=is_backward).to(walked.dtype)

    @torch.no_grad()
    def observe(self, way: str, number: int, change: Tensor, response: Tensor) -> None:
        """Walks respond to ``change`` [n, B, H] of where they begin, which that sweep or correction has made, with
        ``response`` [n, B, H]."""
        if len(change):
            moments = (self._of(name, way, number) for name in ("change", "response"))
            self._average(change.float().flatten(0, 1), response.float().flatten(0, 1), *moments)

    def _fit(self, way: str) -> None:
        change, response, matrix = (getattr(self, f"{way}_{name}") for name in ("change", "response", "map"))
        factor, sound = ridge_factor(change.double())
        fitted = bounded(torch.cholesky_solve(response.double(), factor))
        matrix.copy_(torch.where(sound, fitted, matrix))


def bounded(matrix: Tensor) -> Tensor:
    """The matrices [..., H, H], scaled to a spectral radius of 1 where it is larger: a scan of many does not grow forever.
    What it makes of a matrix that is not normal may grow for a while."""
    power, log_norm = matrix, 0.0
    for _ in range(SQUARINGS):  # ||A^k||^(1/k) tends to the radius from above (Gelfand)
        norm = torch.linalg.matrix_norm(power, keepdim=True).clamp(min=1e-30)
        power, log_norm = power / norm, 2 * (log_norm + norm.log())
        power = power @ power
    log_norm = log_norm + torch.linalg.matrix_norm(power, keepdim=True).clamp(min=1e-30).log()
    return matrix / (log_norm / 2**SQUARINGS).exp().clamp(min=1.0)
