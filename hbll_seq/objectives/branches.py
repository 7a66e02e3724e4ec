"""Short sub-networks that share their beginning with the main path: each is a branch off it.

A branch is at most log2 N blocks long, so it is a chain of one segment, walked block by block, exactly; that adds at most
log2 N to the span each way. Branches do not depend on each other. No graph reaches from one block into another here either.
Where the main path's segments are spread over ranks, a branch goes from rank to rank in legs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from hbll_seq.chains.depth import Prefix, prefixes
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
    first, last: the segments of the main path that its first and last block belong to.
    """

    path: tuple[int, ...]
    prefixes: list[Prefix]
    exits: dict[int, float]
    first: int
    last: int


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
        if legs and together(legs[-1].last, segment):
            before = legs.pop()
            legs.append(Leg((*before.path, n), [*before.prefixes, prefix], {**before.exits, **exits}, before.first, segment))
        else:
            legs.append(Leg((n,), [prefix], exits, segment, segment))
    return legs
