"""Short sub-networks that share their beginning with the main path: each is a branch off it.

A branch is at most log2 N blocks long, so it is a chain of one segment, walked block by block, exactly; that adds at most
log2 N to the span each way. Branches do not depend on each other. No graph reaches from one block into another here either.
Where the main path's segments are spread over ranks, a branch goes from rank to rank in legs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hbll_seq.chains.depth import Prefix, prefixes
from hbll_seq.engine.placement import Placement
from hbll_seq.objectives.depth_mix import SubNetwork


class Branch(NamedTuple):
    """``before``: the blocks shared with the main path; ``path``: the further ones; ``exits``: see :class:`SubNetwork`."""

    before: tuple[int, ...]
    path: tuple[int, ...]
    exits: dict[int, float]

    @property
    def start(self) -> int:
        """Number of blocks shared with the main path."""
        return len(self.before)

    @property
    def whole(self) -> tuple[int, ...]:
        """All blocks from the chain's input on."""
        return self.before + self.path

    @property
    def prefixes(self) -> list[Prefix]:
        """The blocks walked up to and with each of its own."""
        return prefixes(self.whole)[self.start :]


def split_off(main: tuple[int, ...], networks: Sequence[SubNetwork], longest: int) -> tuple[list[Branch], list[SubNetwork]]:
    """Those that leave the main path for at most ``longest`` blocks as branches, and all others as they are."""
    branches, others = [], []
    for network in networks:
        start = 0
        while start < min(len(main), len(network.path)) and main[start] == network.path[start]:
            start += 1
        rest = network.path[start:]
        if len(rest) <= longest and set(network.exits) <= set(rest):
            branches.append(Branch(main[:start], rest, network.exits))
        else:
            others.append(network)
    return branches, others


class Leg(NamedTuple):
    """A part of a branch whose blocks are in one place.

    path, prefixes, exits: as of a :class:`Branch`, of its own blocks.
    segment: of the main path, to which its first block belongs; those of the others are in the same place.
    """

    path: tuple[int, ...]
    prefixes: list[Prefix]
    exits: dict[int, float]
    segment: int


def legs_of(branch: Branch, segment_of: Callable[[int], int], together: Callable[[int, int], bool]) -> list[Leg]:
    """A branch as the legs that it is walked in.

    Args:
        branch: cut where two blocks that follow one another are in different places.
        segment_of: of a block number the segment of the main path that it belongs to.
        together: whether two segments are in the same place.
    """
    legs: list[Leg] = []
    for n, prefix in zip(branch.path, branch.prefixes):
        segment, exits = segment_of(n), {n: branch.exits[n]} if n in branch.exits else {}
        if legs and together(legs[-1].segment, segment):
            before = legs.pop()
            legs.append(Leg((*before.path, n), [*before.prefixes, prefix], {**before.exits, **exits}, before.segment))
        else:
            legs.append(Leg((n,), [prefix], exits, segment))
    return legs


class MainPath(NamedTuple):
    """Where the main path's blocks are.

    path: their numbers.
    size, n_segments: blocks of a segment, and how many segments there are.
    own: the segments on this rank.
    placement: of the segments.
    """

    path: tuple[int, ...]
    size: int
    n_segments: int
    own: range
    placement: Placement

    @property
    def here(self) -> tuple[int, ...]:
        """The numbers of its blocks on this rank."""
        return self.path[self.own.start * self.size : self.own.stop * self.size]

    def segment_of(self, n: int) -> int:
        """The segment of a block; the first one's of a block beside the path."""
        return self.path.index(n) // self.size if n in self.path else 0

    def together(self, first: int, second: int) -> bool:
        """Whether two segments are in the same place."""
        return self.placement.together(first, second, self.n_segments)


def exits_on(
    path: Sequence[int], beginnings: Sequence[Prefix], exits: Mapping[int, float], here: Sequence[int], states: Tensor | None
) -> list[tuple[Prefix, float, Tensor | None]]:
    """Of each exit on a path: the blocks up to it, its weight, and the state there, None where it is elsewhere."""
    return [
        (beginnings[path.index(n)], weight, states[here.index(n)] if n in here else None) for n, weight in exits.items()
    ]


def upstream_of(here: Sequence[int], exits: Iterable[int], found: Iterator[Tensor], states: Tensor) -> Tensor:
    """d loss / d s_n of the exits on a path, of the blocks that are here [L, ...]; ``found`` has those of its exits next."""
    upstream = torch.zeros_like(states)
    for n in exits:
        if n in here:
            upstream[here.index(n)] = next(found)
    return upstream
