"""Output that cannot end a program: a closed pipe, a full disk or an encoding without some character is no reason to stop."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import warnings
from typing import Any, TextIO

_PACKAGE = __name__.partition(".")[0]
#: control characters, and those that turn the direction of writing
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_STREAM_ENDED = (OSError, ValueError)  # ValueError: it was closed


class ForgivingStream:
    """A text stream whose writes never raise: characters that its encoding lacks are escaped, and once the stream below has
    failed (closed, disk full) the rest is dropped.

    Args:
        stream: the stream below; None, as Python has it where the descriptor was closed, drops everything.
        own: the program's own stream: when it fails for any reason, nothing is written to it again, so that the
            interpreter's last flush works too. Otherwise that holds for a closed pipe alone, which never recovers.
    """

    def __init__(self, stream: TextIO | None, own: bool = False):
        self._stream, self._own = stream, own

    def write(self, text: str) -> int:
        """Write what can be written; always counts all of it."""
        if self._stream is not None:
            try:
                write_escaped(self._stream, text)
            except _STREAM_ENDED as error:
                self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """Flush, as far as that is possible."""
        if self._stream is not None:
            try:
                self._stream.flush()
            except _STREAM_ENDED as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Nothing more is written; what is still buffered goes nowhere."""
        stream, self._stream = self._stream, None
        if self._own or isinstance(error, BrokenPipeError):
            lead_nowhere(stream)

    def isatty(self) -> bool:
        """Whether a person reads it."""
        return is_terminal(self._stream)

    @property
    def encoding(self) -> str:
        """Of the stream below."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or (stream := self.__dict__.get("_stream")) is None:
            raise AttributeError(name)
        return getattr(stream, name)


def write_escaped(stream: TextIO, text: str) -> None:
    """Write text, characters that the encoding lacks as escapes. Raises OSError, and ValueError of a closed stream."""
    try:
        stream.write(text)
    except UnicodeEncodeError:
        encoding = stream.encoding or "ascii"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))


def lead_nowhere(stream: TextIO) -> None:
    """What is still buffered goes nowhere: the interpreter's last flush would fail once more, and say so."""
    with contextlib.suppress(*_STREAM_ENDED, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person reads, or writes, the stream."""
    try:
        return stream is not None and stream.isatty()
    except _STREAM_ENDED:
        return False


def _occupy_standard_descriptors() -> None:
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            with contextlib.suppress(OSError):
                os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one


@contextlib.contextmanager
def forgiving_output():
    """For programs, around ``main``: ``sys.stdout`` and ``sys.stderr`` are a :class:`ForgivingStream` inside the block.

    Closed descriptors 1 and 2 lead to nowhere from then on: otherwise the next file opened would get such a number, and what
    a library of C prints would be written into it.
    """
    _occupy_standard_descriptors()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (s if isinstance(s, ForgivingStream) else ForgivingStream(s, own=True) for s in before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def say(text: str, file: TextIO | None = None, end: str = "\n") -> None:
    """``print(text, file=file or sys.stderr)`` that never raises: for what a library tells its user."""
    stream = ForgivingStream(sys.stderr if file is None else file)
    stream.write(text + end)
    stream.flush()


def warn_user(message: str) -> None:
    """A UserWarning that names the line of the user's program that called into this package."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def is_first_process() -> bool:
    """Whether this process is the only one of a launch, or the first: of several processes one speaks."""
    return os.environ.get("RANK", "0") == "0"


def printable(text: str) -> str:
    """The text for a terminal or a page: control characters, which could steer it or show a text in another order than it
    has, are shown as escapes; line ends and tabs stay."""
    return _CONTROL.sub(lambda match: match.group().encode("unicode_escape").decode(), text)
