"""Jacobian approximations: what carries a change of a state from segment to segment between two passes.

A pass walks all segments of a chain side by side: the walk of segment r begins at an estimate of the state there and ends in
f_r of it. The linearization A_r then approximates the Jacobian of the whole segment (docs/method.md 2.2):

    new_r = ended_r + A_r (new_{r-1} - begun_r)

This composition is the only place where segments learn of each other. With segments of one transition it is that of single
transitions. Adjoints are composed the same way from the last segment to the first, with transposed Jacobians.

Shapes: R segments, N transitions; states are [...].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from hbll_seq.engine.placement import HERE, Placement
from hbll_seq.engine.scan import affine_scan


class Walk(NamedTuple):
    """Segments walked side by side.

    begun, ended: [R, ...], of each walk; of adjoints the last one is walked first.
    first: number of the first of these segments.
    index: number of the iteration.
    is_adjoint: whether cotangents are walked.
    product: [R, ...], of the Jacobians' diagonals along each walk, where they were asked for.
    pure: [R], of adjoints: whether nothing but the adjoint that it began with came into a walk; None: into any.
    """

    begun: Tensor
    ended: Tensor
    first: int = 0
    index: int = 0
    is_adjoint: bool = False
    product: Tensor | None = None
    pure: Tensor | None = None

    @property
    def head(self) -> Tensor:
        """Where the walk begins that no other one leads to."""
        return self.begun[-1 if self.is_adjoint else 0]


class Composer(ABC):
    """What the engine asks of a Jacobian approximation."""

    #: whether walks bring the diagonals of the Jacobians
    needs_diagonal = False
    #: whether it says what a change at the beginning of a segment does to the states inside
    carries_inside = False
    #: whether a segment learns of its neighbour alone: :meth:`compose` and :meth:`guess` take each row as it is
    is_rowwise = False

    @abstractmethod
    def compose(self, walk: Walk) -> Tensor:
        """What the walks end in, [R, ...], once each begins where the one before it ends. The first one (of adjoints the
        last) has begun right."""

    def carry(self, change: Tensor, product: Tensor | None) -> Tensor:
        """What a change [R, ...] of the states at the beginnings of segments does to a state inside each; ``product`` is that
        of the diagonals up to there."""
        return change

    def guess(self, upstream: Tensor, diagonal: Tensor | None, chunk_size: int) -> Tensor:
        """First estimate of the adjoints [N, ...] from the upstream gradients [N, ...]."""
        return upstream.clone()

    def told(self, upstream: Tensor, diagonal: Tensor | None) -> Tensor:
        """Of the upstream gradients of segments [S, c, ...] what :meth:`guess_ends` has to know, [S, k, ...], first of all
        those at their ends; ``diagonal`` is of the same transitions."""
        return upstream[:, -1:]

    def guess_ends(self, told: Tensor) -> Tensor:
        """:meth:`guess` at the ends of all segments alone [S, ...], from what was told of each."""
        return told[:, 0].clone()

    @property
    def wants_last(self) -> bool:
        """Whether this step's last iteration walks the last segment too, whose end no iteration needs, to learn from it."""
        return False

    def sample(self, walk: Walk) -> Walk:
        """As much of a walk as :meth:`observe` will want. What it holds is not written to later on."""
        return walk

    def observe(self, walks: Sequence[Walk], placement: Placement = HERE) -> None:
        """Learns from the samples of a solution's walks, in their order. The last forward one is the differentiated one, of
        all segments; ``ended`` of adjoints is without the upstream gradients there. Where segments are spread, the walks are
        of those that are here, and all places learn the same."""


@dataclass(frozen=True)
class Linearization:
    """What approximates the Jacobians between passes: a choice, with its options. One that is learned has maps that compose
    in its place.

    Attributes:
        name: the word for it on a command line.
    """

    name: ClassVar[str]


@dataclass(frozen=True)
class Zero(Linearization, Composer):
    """A = 0 (Jacobi): a pass wins one exact state for each transition or segment."""

    name: ClassVar[str] = "zero"
    is_rowwise = True

    def compose(self, walk: Walk) -> Tensor:
        """See :meth:`Composer.compose`."""
        return walk.ended


@dataclass(frozen=True)
class Identity(Linearization, Composer):
    """A = 1 (Picard): for residual blocks, whose Jacobians are near it."""

    name: ClassVar[str] = "identity"
    carries_inside = True

    def compose(self, walk: Walk) -> Tensor:
        """See :meth:`Composer.compose`."""
        return affine_scan(walk.ended - walk.begun, 1.0, walk.head, reverse=walk.is_adjoint)

    def guess(self, upstream: Tensor, diagonal: Tensor | None, chunk_size: int) -> Tensor:
        """See :meth:`Composer.guess`."""
        return affine_scan(upstream, 1.0, reverse=True)

    def told(self, upstream: Tensor, diagonal: Tensor | None) -> Tensor:
        """See :meth:`Composer.told`; the sums of all of each segment, too."""
        return torch.stack((upstream[:, -1], upstream.sum(1)), 1)

    def guess_ends(self, told: Tensor) -> Tensor:
        """See :meth:`Composer.guess_ends`."""
        ends, totals = told.unbind(1)
        later = affine_scan(totals, 1.0, reverse=True)
        return torch.cat((ends[:-1] + later[1:], ends[-1:]))


@dataclass(frozen=True)
class Diagonal(Linearization, Composer):
    """The transitions' own diagonals (quasi-DEER): for gated recurrent cells, which tell them."""

    name: ClassVar[str] = "diagonal"
    needs_diagonal = carries_inside = True

    def compose(self, walk: Walk) -> Tensor:
        """See :meth:`Composer.compose`."""
        b = torch.addcmul(walk.ended, walk.product, walk.begun, value=-1.0)
        return affine_scan(b, walk.product, walk.head, reverse=walk.is_adjoint)

    def carry(self, change: Tensor, product: Tensor | None) -> Tensor:
        """See :meth:`Composer.carry`."""
        return product * change

    def guess(self, upstream: Tensor, diagonal: Tensor | None, chunk_size: int) -> Tensor:
        """See :meth:`Composer.guess`."""
        if len(upstream) == 1:
            return upstream.clone()
        earlier = affine_scan(upstream[:-1], diagonal[1 : len(upstream)], upstream[-1], reverse=True)
        return torch.cat((earlier, upstream[-1:]))

    def told(self, upstream: Tensor, diagonal: Tensor | None) -> Tensor:
        """See :meth:`Composer.told`; what the others of each segment give to the end before it, and what its own end does."""
        first, inner = diagonal[:, 0], torch.zeros_like(upstream[:, 0])
        if upstream.shape[1] > 1:
            inner = first * affine_scan(upstream[:, :-1].transpose(0, 1), _behind(diagonal), reverse=True)[0]
        return torch.stack((upstream[:, -1], inner, diagonal.prod(1)), 1)

    def guess_ends(self, told: Tensor) -> Tensor:
        """See :meth:`Composer.guess_ends`."""
        ends, inner, product = told.unbind(1)
        if len(ends) == 1:
            return ends.clone()
        earlier = affine_scan(ends[:-1] + inner[1:], product[1:], ends[-1], reverse=True)
        return torch.cat((earlier, ends[-1:]))


def _behind(diagonal: Tensor) -> Tensor:
    """Of diagonals [S, c, ...] what carries an adjoint to each position but the last of its segment from the next one, time
    first; nothing comes to the last of them."""
    return torch.cat((diagonal[:, 1:-1], torch.zeros_like(diagonal[:, :1])), 1).transpose(0, 1)
