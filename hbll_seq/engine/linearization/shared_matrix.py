"""A learned approximation of the Jacobian of a chunk of time: one matrix for all chunks and sequences.

Two iterations walk a chunk from two estimates of its first state. The change of the state that a walk ends in, against the
change of the one that it begins with, is a secant of the c transitions between, and takes no further call of the cell. One
H x H matrix is fitted to many secants over chunks, sequences and training steps. It then carries what an iteration changed
at the end of a chunk through all later chunks: the coarse half of parareal (Lions, Maday, Turinici 2001), learned and
linear. A recurrent network keeps what it has read in much the same directions whatever it reads. So for a GRU one matrix
explains most of what c transitions do to a change, where the product of the diagonals explains little (docs/lab-log.md).

Adjoints have matrices of their own, fitted to walks of their products with the transposed Jacobians.

Shapes: n chunks, B batch, H hidden width; states are rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hbll_seq.engine.linearization.base import Composer, Linearization, Walk
from hbll_seq.engine.linearization.regression import RunningFit, full_precision, ridge_factor
from hbll_seq.engine.placement import HERE, Placement
from hbll_seq.engine.scan import powers_of, shared_scan

#: a map is squared so often to find its spectral radius.
SQUARINGS = 8
#: of a map so many powers are kept: a scan over that many segments is one product.
MOST_POWERS = 8


@dataclass(frozen=True)
class SharedMatrix(Linearization):
    """One learned matrix for all segments of time (a learned coarse propagator, as in parareal)."""

    name: ClassVar[str] = "shared_matrix"


class SharedMatrixFit(RunningFit, Composer):
    """The matrices of :class:`SharedMatrix`: running regressions of what walks end in on where they begin, and the same for
    adjoints. Buffers hold 3 H^2 numbers a matrix.

    Every forward iteration has a matrix of its own: the first one carries changes from no state at all to a rough one, over
    which a cell that saturates has another slope than over the changes of later iterations. So has every backward iteration
    but the last, which carries nothing. A forward iteration learns from how far its walks began from those of the last
    iteration, the best estimate; a backward iteration, whose walks are linear, from those of the next.

    The averages forget sooner than those over depth: early in training a cell changes fast, and iterations that carry changes
    through what it did fifty steps ago diverge.

    Args:
        width: H.
        forward, backward: K and M; further iterations would share the last matrix, and do so when a state of fewer is loaded.
        decay: see :class:`RunningFit`.
        every: the same; by default 2, and more for H above 128, so that fits, of H^3 each, do not come to dominate a step.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, width: int, forward: int = 1, backward: int = 2, *, decay: float = 0.95, every: int | None = None):
        for name, value, least in (("width", width, 1), ("forward", forward, 1), ("backward", backward, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r}: must be a whole number of at least {least}")
        super().__init__(decay, max(2, width // 64) if every is None else every)
        #: by way, row and dtype: the buffer that they were made of, its number of changes then, and the powers
        self._known_powers: dict[tuple[str, int, torch.dtype], tuple[Tensor, int, Tensor]] = {}
        for way, n_maps in (("forward", forward), ("backward", max(1, backward - 1))):
            for name in ("change", "response", "map"):
                self.register_buffer(f"{way}_{name}", torch.zeros(n_maps, width, width))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes a state of other numbers of iterations too, which may grow with training."""
        for name, buffer in self.named_buffers(recurse=False):
            stored = state_dict.get(prefix + name)
            if buffer.dim() and stored is not None and stored.shape[1:] == buffer.shape[1:] and len(stored):
                missing = stored[-1:].expand(max(0, len(buffer) - len(stored)), *stored.shape[1:])
                state_dict[prefix + name] = torch.cat((stored[: len(buffer)], missing))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_known_powers": {}}

    def _of(self, name: str, way: str, number: int) -> Tensor:
        buffer = getattr(self, f"{way}_{name}")
        return buffer[min(number, len(buffer) - 1)]

    def compose(self, walk: Walk) -> Tensor:
        """See :meth:`Composer.compose`; states are [B, H]."""
        begun, ended = (t.flip(0) if walk.is_adjoint else t for t in walk[:2])
        if len(ended) < 2:
            return walk.ended
        work = torch.promote_types(ended.dtype, self.forward_map.dtype)
        powers = self._powers("backward" if walk.is_adjoint else "forward", walk.index, len(ended) - 1, work)
        with full_precision(ended):
            # how far each walk ended from where the next one began, and what came of the jumps before
            jumps = ended[:-1].to(work) - begun[1:].to(work)
            new = torch.cat((ended[:1], (ended[1:].to(work) + shared_scan(jumps, powers)).to(ended.dtype)))
        return new.flip(0) if walk.is_adjoint else new

    def _powers(self, way: str, number: int, n_jumps: int, dtype: torch.dtype) -> Tensor:
        """As many powers of a map as a scan over so many jumps uses. They are known before a step begins."""
        maps, n_powers = getattr(self, f"{way}_map"), min(n_jumps, MOST_POWERS)
        key = way, min(number, len(maps) - 1), dtype
        of, version, powers = self._known_powers.get(key, (None, None, maps[0, :0]))
        if of is not maps or version != maps._version or len(powers) < n_powers:
            with full_precision(maps):
                powers = powers_of(maps[key[1]].to(dtype), n_powers)
            self._known_powers[key] = maps, maps._version, powers
        return powers[:n_powers]

    def observe(self, walks: Sequence[Walk], placement: Placement = HERE) -> None:
        """See :meth:`Composer.observe`: walks respond to a change of where they begin, which their iteration has made."""
        found = []
        for walk, later in zip(walks, walks[1:]) if walks[0].is_adjoint else ((walk, walks[-1]) for walk in walks[:-1]):
            rows = slice(walk.first - later.first, walk.first - later.first + len(walk.begun))
            begun, ended = later.begun[rows], later.ended[rows]
            if len(begun) or placement.is_spread:
                moments = [self._of(name, "backward" if walk.is_adjoint else "forward", walk.index)
                           for name in ("change", "response")]  # fmt: skip
                change, response = begun - walk.begun[: len(begun)], ended - walk.ended[: len(begun)]
                found.append((change.float().flatten(0, 1), response.float().flatten(0, 1), *moments))
        self._average_all(found, placement)

    def _fit(self, way: str) -> None:
        change, response, matrix = (getattr(self, f"{way}_{name}") for name in ("change", "response", "map"))
        factor, sound = ridge_factor(change.double())
        fitted = bounded(torch.cholesky_solve(response.double(), factor))
        matrix.copy_(torch.where(sound, fitted, matrix))


def bounded(matrix: Tensor) -> Tensor:
    """The matrices [..., H, H], scaled to a spectral radius of 1 where it is larger: then a scan of many does not grow for
    ever. Powers of a matrix that is not normal may still grow for a while."""
    power, log_norm = matrix, 0.0
    for _ in range(SQUARINGS):  # ||A^k||^(1/k) tends to the radius from above (Gelfand)
        norm = torch.linalg.matrix_norm(power, keepdim=True).clamp(min=1e-30)
        power, log_norm = power / norm, 2 * (log_norm + norm.log())
        power = power @ power
    log_norm = log_norm + torch.linalg.matrix_norm(power, keepdim=True).clamp(min=1e-30).log()
    return matrix / (log_norm / 2**SQUARINGS).exp().clamp(min=1.0)
