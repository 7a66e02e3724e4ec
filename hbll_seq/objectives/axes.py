"""What sweeps take along each axis where nothing is said: depth, time, and the time inside of recurrent blocks."""

from __future__ import annotations

from dataclasses import dataclass

from hbll_seq.engine.linearization.base import Diagonal, Identity, Linearization, Zero
from hbll_seq.engine.linearization.low_rank import LowRank
from hbll_seq.engine.linearization.shared_matrix import SharedMatrix


@dataclass(frozen=True)
class Axis:
    """What sweeps along one axis take where nothing is said, and what they can do there."""

    forward: int | None
    backward: int | None
    chunk_size: int
    linearization: Linearization
    init: str
    linearizations: tuple[type[Linearization], ...]
    inits: tuple[str, ...]


#: over the blocks of a path; over the steps of a recurrent model; over the steps inside a recurrent block of a hierarchy. The
#: defaults of the last are the least that lost nothing in one trial (docs/lab-log.md)
AXES = {
    "depth": Axis(None, None, 4, Identity(), "first", (Identity, Zero, Diagonal, LowRank), ("input", "first", "tree")),
    "time": Axis(1, 1, 8, Zero(), "state", (Zero, Diagonal, SharedMatrix), ("zeros", "state", "diagonal")),
    "layer": Axis(1, 1, 8, Diagonal(), "state", (Zero, Diagonal), ("state",)),
}
#: over depth, what is not said beside a K or M that is, or where iterations are wanted: passes over single blocks
OF_SINGLE_BLOCKS = {"forward": 3, "backward": 4, "chunk_size": 1}
#: over depth, what a control begins with where nothing is said
AT_FIRST = {"forward": 1, "backward": 1}
#: the axes in messages
WORDS = {"depth": "depth", "time": "time", "layer": "the time inside of blocks"}
