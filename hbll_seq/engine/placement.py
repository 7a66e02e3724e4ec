"""Where the segments of a chain are walked: all here, or some of them here and the others on other ranks.

Segments learn of each other in ``Composer.compose`` alone, from the states at which they begin and in which their walks end,
and from the adjoints there. So a chain whose segments lie on several ranks needs one exchange of these for each pass, and
everything else stays where it is.
"""

from __future__ import annotations

from torch import Tensor


class Placement:
    """All segments are here."""

    #: whether some of them are elsewhere
    is_spread = False
    #: by how many batches this place is ahead of the last one
    lead = 0

    def own(self, n_segments: int) -> range:
        """The segments that are walked here, which follow one another."""
        return range(n_segments)

    def exchange(self, own: Tensor, segments: range, n_segments: int) -> Tensor:
        """Of each of some segments a tensor [...], from all to all: [own ones among them, ...] -> [segments, ...]."""
        return own

    def pass_on(self, state: Tensor, source: int, target: int, n_segments: int) -> Tensor:
        """A tensor [1, ...] that segment ``source`` has made and segment ``target`` reads. Where the target is not here,
        another of its shape is returned, which nobody reads; where the source is not, what is given may be [0, ...]."""
        return state

    def total(self, part: Tensor) -> Tensor:
        """The sum of what all places have of a tensor; a new one, the same everywhere."""
        return part

    def together(self, first: int, second: int, n_segments: int) -> bool:
        """Whether two segments are in the same place."""
        return True


#: one for all
HERE = Placement()


def overlap(first: range, second: range) -> range:
    """The numbers in both of two ranges of step 1; one without any begins where it would."""
    start = max(first.start, second.start)
    return range(start, max(start, min(first.stop, second.stop)))
