"""What commands write to stdout, and the ways in which that can fail."""

from __future__ import annotations

import contextlib
import io
import os
from typing import Any, TextIO

from hbll_seq.utils.console import printable
from hbll_seq.utils.reading import shorten, to_json


class Failure(Exception):
    """The command was understood and could not be done: exit code 1."""


class Output:
    """Standard output of a command: text, or one JSON document.

    A character that its encoding lacks is escaped. A terminal shows control characters, which could steer it, as escapes.

    Args:
        stream: stdout; None, as Python has it where the descriptor was closed, drops everything.
    """

    def __init__(self, stream: TextIO | None):
        self._stream = stream

    @property
    def is_terminal(self) -> bool:
        """Whether a person reads it."""
        try:
            return self._stream is not None and self._stream.isatty()
        except (OSError, ValueError):
            return False

    def write(self, text: str) -> None:
        """Write text at once.

        Raises:
            BrokenPipeError: its reader has ended.
            Failure: it cannot be written.
        """
        if self._stream is None or not text:
            return
        text = printable(text) if self.is_terminal else text
        try:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding or "ascii"
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            self._stream.flush()
        except BrokenPipeError:
            self._give_up()
            raise
        except (OSError, ValueError) as error:
            self._give_up()
            reason = getattr(error, "strerror", None) or error
            raise Failure(f"cannot write to stdout: {shorten(reason)}") from None

    def json(self, value: Any) -> None:
        """Write one JSON document. Raises as :meth:`write`."""
        self.write(to_json(value, indent=2) + "\n")

    def _give_up(self) -> None:
        """What is still buffered goes nowhere: the interpreter's last flush would fail once more, and say so."""
        stream, self._stream = self._stream, None
        with contextlib.suppress(OSError, ValueError, AttributeError, io.UnsupportedOperation):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)


def table(head: list[str], rows: list[list[Any]], formats: list[str]) -> str:
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
