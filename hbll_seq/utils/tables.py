"""Tables in plain text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

#: perplexity per word of which a table shows a dash: such a model has not learnt yet which pieces make words, or the text has
#: no words between blanks, and the figure says nothing
MOST_PER_WORD = 10_000


def shown_per_word(value: float | None) -> float | None:
    """A perplexity per word as tables show it: None, which is a dash there, above ``MOST_PER_WORD``."""
    return None if value is None or not value <= MOST_PER_WORD else value


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], formats: Sequence[str]) -> str:
    """Rows in columns below their names.

    Args:
        head: names of the columns.
        rows: values; None is shown as "-".
        formats: of each column, as Python's ``format`` has it; ``"<"`` and ``">"`` alone align texts.
    """
    cells = [["-" if value is None else format(value, f.lstrip("<>")) for value, f in zip(row, formats)] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *cells)]
    sides = ["<" if f.startswith("<") else ">" for f in formats]
    lines = ["  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths)) for line in [head, *cells]]
    return "".join(line.rstrip() + "\n" for line in lines)
