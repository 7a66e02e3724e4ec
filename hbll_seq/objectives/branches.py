"""Short sub-networks that share their beginning with the main path: each is a branch off it.

A branch is at most log2 N blocks long, so it is a chain of one segment, walked block by block, exactly; that adds at most
log2 N to the span each way. Branches do not depend on each other. No graph reaches from one block into another here either.
"""

from __future__ import annotations

from collections.abc import Sequence
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
