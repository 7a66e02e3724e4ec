"""Topology of the binary tree over a chain of N = 2**D blocks (paper section 3.1, Theorem 1). No torch in here.

The chain is z_0 -> z_1 -> ... -> z_N. The nodes are 1 .. N-1; 0 and N are the boundaries. For N = 8:

    level 0                 4
    level 1         2               6
    level 2     1       3       5       7        (boundaries 0 and 8)

An *arc* i -> j is a dyadic interval: j = i + 2**l with 2**l dividing i. A *path* walks 0 -> N over arcs and is named by
the blocks it runs, so ``(4, 6, 7)`` is 0 -> 4 -> 6 -> 7 -> 8 (docs/method.md 1.4).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence, Set

from hbll_seq.utils.reading import quote
from hbll_seq.utils.values import as_whole, check_choice, whole_or_none

#: more paths than this are counted and sampled, never listed (n_level = 5 has 458,329).
MAX_LISTED_PATHS = 100_000
#: orders in which depth grows from one block to all of them, see :meth:`DyadicTree.path_for_depth`.
PATH_FAMILIES = ("spine", "prefix")


def path_text(path: Sequence[int]) -> str:
    """A path as reports write it, from the embedding to the head: ``0-4-6-head``."""
    return "-".join(map(str, (0, *path))) + "-head"


class DyadicTree:
    """The tree over ``N = 2**n_level`` transitions.

    Args:
        n_level: number of levels D, at least 1.
        family: which path of a depth is the default one, of ``PATH_FAMILIES``; see :meth:`path_for_depth`.

    Attributes:
        n_level: D.
        N: number of transitions, ``2**D`` (the last one is the prediction head).
        n_nodes: number of inner nodes, ``N - 1``.
        levels: the nodes level by level, root first; a node needs only nodes of levels above its own.

    Raises:
        ValueError: ``n_level`` is not a whole number of at least 1, or the family is unknown.
    """

    def __init__(self, n_level: int, family: str = "spine"):
        n_level = as_whole("n_level", n_level, 1)
        check_choice("family", family, PATH_FAMILIES)
        self.n_level, self.family = n_level, family
        self.N = 2**n_level
        self.n_nodes = self.N - 1
        self.levels = tuple(tuple(range(self.N >> (t + 1), self.N, self.N >> t)) for t in range(n_level))

    def __repr__(self) -> str:
        return f"DyadicTree(n_level={self.n_level}, family={self.family!r})"

    def span(self, n: int) -> int:
        """Largest power of two that divides node ``n`` (paper: ``2**l(n)``)."""
        self._check_node(n)
        return n & -n

    def parents(self, n: int) -> tuple[int, int]:
        """Left and right parent ``(n - span, n + span)``; 0 and N are boundaries (Eq. 7)."""
        span = self.span(n)
        return n - span, n + span

    def level_of(self, n: int) -> int:
        """Level of node ``n``; 0 is the root."""
        return self.n_level - self.span(n).bit_length()

    def is_arc(self, i: int, j: int) -> bool:
        """Whether i -> j is a dyadic interval inside [0, N]."""
        length = j - i
        return 0 <= i < j <= self.N and length & (length - 1) == 0 and i % length == 0

    def arcs(self) -> tuple[tuple[int, int], ...]:
        """Every dyadic interval (i, j), longest first: 2N - 1 of them."""
        return tuple(
            (i, i + length)
            for length in (2**level for level in range(self.n_level, -1, -1))
            for i in range(0, self.N, length)
        )

    @staticmethod
    def _count(level: int) -> int:
        count = 1
        for _ in range(level):
            count = 1 + count * count
        return count

    @property
    def n_paths(self) -> int:
        """Number of paths with at least one block: T(D) - 1, T(0) = 1, T(l) = 1 + T(l-1)**2 (docs/method.md 1.4)."""
        return self._count(self.n_level) - 1

    def paths(self) -> tuple[tuple[int, ...], ...]:
        """Every non-empty path, shortest first, each a tuple of block numbers.

        Raises:
            ValueError: there are more than ``MAX_LISTED_PATHS``; use :attr:`n_paths` and :meth:`sample_path`.
        """
        if self.n_paths > MAX_LISTED_PATHS:
            raise ValueError(
                f"n_level={self.n_level} has {self.n_paths:,} paths, more than the {MAX_LISTED_PATHS:,} that are listed: "
                "use n_paths to count and sample_path to draw them"
            )
        return tuple(sorted((p for p in self._walk(0, self.N) if p), key=lambda p: (len(p), p)))

    def _walk(self, i: int, j: int) -> Iterator[tuple[int, ...]]:
        """Blocks strictly inside (i, j), for every way to jump or split that interval."""
        yield ()
        if j - i > 1:
            middle = (i + j) // 2
            for left in self._walk(i, middle):
                for right in self._walk(middle, j):
                    yield (*left, middle, *right)

    def sample_path(self, rng: random.Random) -> tuple[int, ...]:
        """One non-empty path, uniform over all of them, without listing them."""

        def draw(i: int, j: int) -> list[int]:
            whole = (i, j) == (0, self.N)
            # Of the T(l) ways through an interval of length 2**l, exactly one jumps it; the whole one may not be jumped.
            if j - i == 1 or (not whole and rng.randrange(self._count((j - i).bit_length() - 1)) == 0):
                return []
            middle = (i + j) // 2
            return [*draw(i, middle), middle, *draw(middle, j)]

        return tuple(draw(0, self.N))

    def path_for_depth(self, depth: int) -> tuple[int, ...]:
        """The default path with ``depth`` blocks, 1 <= depth <= N - 1, of the tree's family.

        ``"spine"``: up to D blocks it is the start of the *right spine* N/2, 3N/4, .., N-1 (the paper's table). Beyond, the
        rightmost interval that can still be split is split at its middle, one at a time, until every block is on the path.
        So every path from D blocks on contains the one before it: for D = 3 they are (4) (4,6) (4,6,7) (4,5,6,7) (2,4,5,6,7)
        (2,3,4,5,6,7) (1,..,7).

        ``"prefix"``: the path that leaves the full one as late as it can, the first in the order of block numbers: for
        D = 3 (4) (2,4) (1,2,4) (1,2,3,4) (1,2,3,4,6) (1,..,6) (1,..,7). Its blocks then read what they read on the full
        path, and at most D of them read something else.

        Raises:
            ValueError: ``depth`` is not a whole number in 1 .. N-1.
        """
        plain = whole_or_none(depth)
        if plain is None or not 1 <= plain <= self.n_nodes:
            raise ValueError(
                f"depth={quote(depth)}: a model with n_level={self.n_level} runs 1 to {self.n_nodes} blocks; "
                f"choose a whole number in that range"
            )
        return self._first_path(plain) if self.family == "prefix" else self._spine_path(plain)

    @property
    def right_spine(self) -> tuple[int, ...]:
        """The path N/2, 3N/4, .., N-1 of the nodes whose right parent is y."""
        return tuple(self.N - (self.N >> t) for t in range(1, self.n_level + 1))

    def _spine_path(self, depth: int) -> tuple[int, ...]:
        path = list(self.right_spine[:depth])
        while len(path) < depth:
            ends = [0, *path, self.N]
            i, j = next((i, j) for i, j in zip(ends[-2::-1], ends[:0:-1]) if j - i > 1)
            path = sorted([*path, (i + j) // 2])
        return tuple(path)

    def _first_path(self, depth: int) -> tuple[int, ...]:
        path: list[int] = []
        while len(path) < depth:
            i, after = path[-1] if path else 0, depth - len(path) - 1
            longest = i & -i if i else self.N // 2
            steps = (i + (1 << level) for level in range(longest.bit_length()))
            # From j on, any number of blocks between that of the longest jumps and all of them can follow.
            path.append(next(j for j in steps if j < self.N and self._fewest_after(j) <= after <= self.n_nodes - j))
        return tuple(path)

    def _fewest_after(self, j: int) -> int:
        """Blocks between ``j`` and the head when every jump is the longest possible."""
        count = 0
        while (j := j + (j & -j)) < self.N:
            count += 1
        return count

    def validate_path(self, path: Sequence[int]) -> tuple[int, ...]:
        """``path`` as a tuple of ints, after checking that it walks 0 -> N over arcs.

        Raises:
            ValueError: the path is empty, holds something else than block numbers (of Python or NumPy), is a text or a set,
                or takes a step that is no arc.
        """
        blocks: tuple[int | None, ...] = ()
        if not isinstance(path, (str, bytes, bytearray, Set, Mapping)):
            try:
                blocks = tuple(whole_or_none(n) for n in itertools.islice(path, self.N))  # one too many is too long
            except TypeError:
                pass
        if blocks and all(n is not None for n in blocks):
            self._check_numbers(blocks)
        else:
            raise ValueError(
                f"path={quote(path)}: must list at least one of the block numbers 1 to {self.n_nodes}, such as "
                f"{list(self.path_for_depth(min(2, self.n_nodes)))}"
            )
        ends = (0, *blocks, self.N)
        for i, j in zip(ends, ends[1:]):
            if not self.is_arc(i, j):
                allowed = [b for a, b in sorted(self.arcs()) if a == i and b < self.N]
                reachable = f"from {i} the next block can be {quote(allowed)}"
                if not allowed:
                    reachable = f"from {i} only the head is left"
                raise ValueError(
                    f"path={quote(list(blocks))}: the step {i} -> {j} is not a dyadic interval of a tree with N={self.N}; "
                    f"{reachable}" + (f" or the head ({self.N})" if allowed and self.is_arc(i, self.N) else "")
                )
        return blocks

    def _check_numbers(self, blocks: tuple[int, ...]) -> None:
        """Raises ValueError unless the numbers are those of blocks, in ascending order."""
        path, example = f"path={quote(list(blocks))}", list(self.path_for_depth(min(2, self.n_nodes)))
        if outside := list(dict.fromkeys(n for n in blocks if not 0 < n < self.N)):
            raise ValueError(f"{path}: {quote(outside[0])} is none of the block numbers 1 to {self.n_nodes}; "
                             f"give a path such as {example}")
        if falls := [(i, j) for i, j in zip(blocks, blocks[1:]) if j <= i]:
            ordered = sorted(set(blocks))
            is_path = all(self.is_arc(i, j) for i, j in zip((0, *ordered), (*ordered, self.N)))
            raise ValueError(f"{path}: {falls[0][1]} comes after {falls[0][0]}, but a path names its blocks in ascending "
                             f"order; give {quote(ordered) if is_path else f'one such as {example}'}")

    def _check_node(self, n: int) -> None:
        if not isinstance(n, int) or isinstance(n, bool) or not 0 < n < self.N:
            raise ValueError(f"node {quote(n)}: the nodes of a tree with n_level={self.n_level} are 1 to {self.n_nodes}")
