"""Guesses from the text itself: what followed where its last three tokens stood before.

Such a guess costs nothing, and a text that repeats names or runs in a circle makes many right ones (Yang et al. 2023, arXiv
2304.04487; "prompt lookup"). Whether to guess is decided by counting, not by the clock: a seed repeats its text.
"""

from __future__ import annotations

from collections.abc import Sequence

from hbll_seq.generation.draft_control import LONGEST, Totals, count

#: tokens that must have stood there before
_ALIKE = 3
#: what a check of n guesses costs beyond a plain step, in plain steps: a first token more, and every one; with one row and
#: with several. At the upper end of what was measured on a CPU (docs/results.md 17)
_CHECK, _EACH, _EACH_OF_ROWS = 0.6, 0.12, 0.26
#: the share of plain decoding's time that guesses may lose, and how many plain steps of what they gained they may lose again
_MAY_LOSE, _CREDIT = 0.02, 8.0


class RepeatedText:
    """One row's text, and where each three tokens stood last."""

    def __init__(self, ids: Sequence[int]):
        self._ids = list(ids)
        self._ends: dict[tuple[int, ...], int] = {}
        self._n_noted = _ALIKE

    def append(self, tokens: Sequence[int]) -> None:
        """The text goes on with these."""
        self._ids += tokens

    def guesses(self, n: int) -> list[int]:
        """Up to n tokens, or none: what followed last time; where that reaches the text's end, it is taken to go on so."""
        ids = self._ids
        for end in range(self._n_noted, len(ids)):  # the text's own end is not noted yet
            self._ends[tuple(ids[end - _ALIKE : end])] = end
        self._n_noted = max(self._n_noted, len(ids))
        at = self._ends.get(tuple(ids[-_ALIKE:]))
        if at is None:
            return []
        found = ids[at : at + n]
        while len(found) < n:
            found += found[: n - len(found)]
        return found


class Budget:
    """Decides how many tokens are guessed at once: as many as may fail without making the text 2% slower than plain.

    It has the methods of :class:`hbll_seq.generation.draft_control.Control`, and measures nothing.

    Args:
        n_rows: rows of the batch.
    """

    def __init__(self, n_rows: int):
        self.totals = Totals()
        self._each = _EACH if n_rows == 1 else _EACH_OF_ROWS
        self._plain, self._lost = 0, 0.0  # in plain steps: what plain decoding would have taken, and what guesses lost

    def choose(self) -> tuple[int, int]:
        """See :meth:`Control.choose`."""
        return 0, min(LONGEST, max(0, int((_MAY_LOSE * self._plain - self._lost - _CHECK) / self._each)))

    def note(self, drafter: int, n_draft: int, gained: int, seconds: float) -> None:
        """See :meth:`Control.note`."""
        count(self.totals, n_draft, gained)
        self._plain += gained
        if n_draft > 0:
            self._lost = max(-_CREDIT, self._lost + self.cost(n_draft) - gained)

    def cost(self, n_draft: int) -> float:
        """Of a round that guesses so many tokens, in plain steps."""
        return 1 + _CHECK + self._each * n_draft if n_draft > 0 else 1.0
