"""Learned approximations of the Jacobians of residual blocks: the identity plus a low-rank map (Broyden-like).

Two iterations evaluate a block at two estimates of its input. What its output changed by, less the input's own change, is a
secant of its residual branch, and costs nothing to observe. A linear map fitted to many secants approximates the branch's
Jacobian between later iterations: a quasi-Newton method whose Jacobians are regressions over tokens and steps (Broyden's
idea, with one map for all positions). A few directions carry nearly all that such a map can say, so it has low rank r. A
chain of maps ``A_n = I + U_n V_n`` is composed by one cumulative sum, one small linear solve that all positions share, and
another sum: no more span than the identity's.

Shapes: N transitions, C width, r rank; states are rows, ``[..., C]``, so a map is ``x + (x @ left) @ right``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from hbll_seq.engine.linearization.base import Composer, Linearization, Walk
from hbll_seq.engine.linearization.regression import RunningFit, full_precision, ridge_factor
from hbll_seq.engine.placement import HERE, Placement
from hbll_seq.engine.scan import affine_scan
from hbll_seq.utils.options import check_options, option

#: rank of the learned maps; a higher one explains hardly more (docs/lab-log.md).
DEFAULT_RANK = 8
#: one position in so many of a step is observed; prime to most window lengths, so that rows differ.
STRIDE = 5
#: steps of subspace iteration in a fit, which starts from the last fit's directions.
ITERATIONS = 2


@dataclass(frozen=True)
class LowRank(Linearization):
    """The identity plus a learned map of low rank for each transition (Broyden-like), over depth.

    Attributes:
        rank: of the maps; None is ``DEFAULT_RANK``, or the width where that is less.
    """

    name: ClassVar[str] = "low_rank"
    rank: int | None = option(None, "rank of the learned maps", low=1)

    def __post_init__(self):
        check_options(self)


class LowRankMaps(NamedTuple):
    """The maps ``x -> x + (x @ left_n) @ right_n`` of N transitions: left [N, C, r], right [N, r, C]."""

    left: Tensor
    right: Tensor

    def branch(self, n: int, x: Tensor) -> Tensor:
        """``(x @ left_n) @ right_n``, what the n-th map adds to ``x`` [..., C]."""
        work = torch.promote_types(x.dtype, torch.float32)
        with full_precision(x):
            return ((x.to(work) @ self.left[n].to(work)) @ self.right[n].to(work)).to(x.dtype)


def low_rank_scan(b: Tensor, maps: LowRankMaps, initial: Tensor, *, reverse: bool = False) -> Tensor:
    """All s_n of ``s_n = A_n s_{n-1} + b_n`` with s_0 = ``initial``, and A_n the n-th map.

    With c_n the cumulative sums of b, ``v_n = s_{n-1} left_n = c_{n-1} left_n + sum_{m < n} v_m right_m left_n``: a linear
    system of N r unknowns whose matrix is the same at all positions and triangular.

    Args:
        b: [N, ..., C].
        maps: one per transition.
        initial: [..., C].
        reverse: from the end, ``s_n = A_n s_{n+1} + b_n``.

    Returns:
        [N, ..., C] in the dtype of ``b``.
    """
    if reverse:
        return low_rank_scan(b.flip(0), LowRankMaps(maps.left.flip(0), maps.right.flip(0)), initial).flip(0)
    with full_precision(b):
        return _scan_maps(b, maps, initial)


def _scan_maps(b: Tensor, maps: LowRankMaps, initial: Tensor) -> Tensor:
    left, right = (t.to(torch.promote_types(b.dtype, torch.float32)) for t in maps)
    n_steps, width, rank = left.shape
    sums = torch.cat((initial[None].to(left.dtype), b.to(left.dtype))).cumsum_(0)  # c_0 .. c_N
    seen = torch.einsum("n...c,ncr->...nr", sums[:-1], left).flatten(-2)  # c_{n-1} left_n
    coupling = torch.einsum("mrc,ncs->mrns", right, left)
    later = torch.arange(n_steps, device=b.device)
    coupling = coupling * (later[:, None, None, None] < later[None, None, :, None])
    coupling = coupling.reshape(n_steps * rank, n_steps * rank)
    identity = torch.eye(n_steps * rank, dtype=left.dtype, device=b.device)
    solved = torch.linalg.solve_triangular(identity - coupling, identity, upper=True)
    v = (seen @ solved).unflatten(-1, (n_steps, rank))
    added = torch.einsum("...nr,nrc->n...c", v, right).cumsum_(0)
    return added.add_(sums[1:]).to(b.dtype)


class LowRankFit(RunningFit):
    """The maps of :class:`LowRank`: running regressions of every block's branch on the change of its input, and of the
    transposed branch on adjoints.

    Buffers hold 4 C^2 numbers a block.

    Args:
        n_blocks: blocks, numbered from 1.
        width: C.
        rank: r; None is ``DEFAULT_RANK``, or C where that is less.
        decay, every: see :class:`RunningFit`.

    Raises:
        ValueError: the rank does not lie in 1 .. width, or another argument is out of range.
    """

    def __init__(self, n_blocks: int, width: int, rank: int | None = None, *, decay: float = 0.98, every: int = 10):
        super().__init__(decay, every)
        rank = min(DEFAULT_RANK, width) if rank is None else rank
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= width:
            raise ValueError(f"rank={rank!r}: must be a whole number from 1 to the width of the states, {width}")
        self.rank = rank
        for way in ("forward", "backward"):
            self.register_buffer(f"{way}_change", torch.zeros(n_blocks, width, width))
            self.register_buffer(f"{way}_response", torch.zeros(n_blocks, width, width))
            self.register_buffer(f"{way}_left", torch.zeros(n_blocks, width, rank))
            self.register_buffer(f"{way}_right", torch.eye(width)[:rank].repeat(n_blocks, 1, 1))

    def of(self, numbers: Sequence[int]) -> LowRankComposer:
        """What composes a chain whose segments have the maps of these numbers, from 1."""
        return LowRankComposer(self, numbers)

    @torch.no_grad()
    def learn(self, number: int, way: str, change: Tensor, response: Tensor, is_sound: Tensor | None = None) -> None:
        """A segment's branch responds to ``change`` [n, C] with ``response`` [n, C]; ``way`` is ``"forward"``, or
        ``"backward"`` of adjoints. What is not sound teaches nothing."""
        moments = (getattr(self, f"{way}_{name}")[number - 1] for name in ("change", "response"))
        self._average(change, response, *moments, is_sound=is_sound)

    @property
    def wants_last(self) -> bool:
        """Whether this step walks the last segment once more, whose end no iteration needs: one step in ``every``."""
        return self.steps_done() % self.every == 0

    def _fit(self, way: str) -> None:
        change, response = (getattr(self, f"{way}_{name}").double() for name in ("change", "response"))
        left, right = (getattr(self, f"{way}_{name}") for name in ("left", "right"))
        factor, sound = ridge_factor(change)
        # Reduced-rank regression: the whole map W = (X^T X)^-1 X^T Y, kept within the r directions of the response that it
        # explains most of. These are the leading eigenvectors of W^T X^T X W, found by iteration from the last fit's.
        kept = right.double().mT
        for _ in range(ITERATIONS):
            kept = torch.linalg.qr(response.mT @ torch.cholesky_solve(response @ kept, factor))[0]
        left.copy_(torch.where(sound, torch.cholesky_solve(response @ kept, factor), left))
        right.copy_(torch.where(sound, kept.mT, right))


class LowRankComposer(Composer):
    """The maps of the segments of one chain.

    Args:
        fit: that learns them.
        numbers: of each segment's map there, from 1.
    """

    carries_inside = True

    def __init__(self, fit: LowRankFit, numbers: Sequence[int]):
        self.fit, self.numbers = fit, list(numbers)

    def maps(self, way: str, first: int = 0, n_segments: int | None = None) -> LowRankMaps:
        """Those of some segments, ``way`` being ``"forward"`` or ``"backward"`` (of the transposed Jacobians)."""
        numbers = self.numbers[first : None if n_segments is None else first + n_segments]
        rows = torch.tensor([n - 1 for n in numbers], device=self.fit.n_steps.device)
        return LowRankMaps(getattr(self.fit, f"{way}_left")[rows], getattr(self.fit, f"{way}_right")[rows])

    def compose(self, walk: Walk) -> Tensor:
        """See :meth:`Composer.compose`; states are [..., C]."""
        maps = self.maps("backward" if walk.is_adjoint else "forward", walk.first, len(walk.begun))
        branches = torch.stack([maps.branch(n, s) for n, s in enumerate(walk.begun)])
        return low_rank_scan(walk.ended - walk.begun - branches, maps, walk.head, reverse=walk.is_adjoint)

    def guess(self, upstream: Tensor, diagonal: Tensor | None, chunk_size: int) -> Tensor:
        """See :meth:`Composer.guess`; inside a segment as with the identity."""
        adjoints = affine_scan(upstream, 1.0, reverse=True)
        ends = [*range(chunk_size - 1, len(upstream) - 1, chunk_size), len(upstream) - 1]
        if len(ends) > 1:
            added = torch.stack([upstream[end:following].sum(0) for end, following in zip(ends, ends[1:])])
            adjoints[ends[:-1]] = low_rank_scan(added, self.maps("backward", 1), upstream[-1], reverse=True)
        return adjoints

    @property
    def wants_last(self) -> bool:
        """See :attr:`LowRankFit.wants_last`."""
        return self.fit.wants_last

    def sample(self, walk: Walk) -> Walk:
        """Some positions of each state, [R, n, C] in float32: a copy."""
        begun, ended = (s.flatten(1, -2)[:, ::STRIDE].to(torch.float32, copy=True) for s in (walk.begun, walk.ended))
        return walk._replace(begun=begun, ended=ended)

    def observe(self, walks: Sequence[Walk], placement: Placement = HERE) -> None:
        """See :meth:`Composer.observe`: of each segment the latest walk, against the differentiated one. Walks of adjoints,
        which are linear, tell by themselves."""
        is_adjoint = walks[0].is_adjoint
        latest = {walk.first + i: (walk, i) for walk in (walks if is_adjoint else walks[:-1]) for i in range(len(walk.begun))}
        for segment, (walk, i) in latest.items():
            begun, ended = walk.begun[i], walk.ended[i]
            if not is_adjoint:
                begun, ended = walks[-1].begun[segment] - begun, walks[-1].ended[segment] - ended
            is_sound = None if walk.pure is None else walk.pure[i]
            self.fit.learn(self.numbers[segment], "backward" if is_adjoint else "forward", begun, ended - begun, is_sound)
