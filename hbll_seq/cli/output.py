"""What commands write to stdout, and the ways in which that can fail."""

from __future__ import annotations

from typing import Any, TextIO

from hbll_seq.utils.console import is_terminal, lead_nowhere, printable, write_escaped
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
        return is_terminal(self._stream)

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
            write_escaped(self._stream, text)
            self._stream.flush()
        except (OSError, ValueError) as error:
            stream, self._stream = self._stream, None
            lead_nowhere(stream)
            if isinstance(error, BrokenPipeError):
                raise
            reason = getattr(error, "strerror", None) or error
            raise Failure(f"cannot write to stdout: {shorten(reason)}") from None

    def json(self, value: Any) -> None:
        """Write one JSON document. Raises as :meth:`write`."""
        self.write(to_json(value, indent=2) + "\n")
