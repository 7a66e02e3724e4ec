"""The texts that commands are given: arguments, files, stdin, splits of a data set."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NamedTuple

from hbll_seq.utils.console import is_terminal
from hbll_seq.utils.reading import possible_name, quote, read_bytes, shorten

#: bytes of a text that is read whole; a longer one goes by --data, which reads it piece by piece
MAX_TEXT = 1 << 28
_NO_TEXT = "no text: give FILE, - to read stdin, or --data bundled --split test"


def read_stdin() -> str:
    """All of stdin as UTF-8 text. Raises ValueError where it is something else."""
    data = b"" if sys.stdin is None else getattr(sys.stdin, "buffer", sys.stdin).read(MAX_TEXT + 1)
    if len(data) > MAX_TEXT:
        raise ValueError(f"stdin holds more than {MAX_TEXT:,} bytes: write it to a file and give that as --data")
    return _decoded(data, "stdin")


def prompt_text(given: str | None) -> str:
    """The prompt: the argument, or stdin where it is "-" or left out. The line break at the end of stdin is not part of it.

    Raises:
        ValueError: there is none.
    """
    if given not in (None, "-"):
        return given
    if given is None and is_terminal(sys.stdin):
        raise ValueError('no prompt: give one, as in `hbll-seq generate "The river"`, or - to read it from stdin')
    text = read_stdin()
    text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise ValueError("stdin holds no prompt: give some text, or the prompt as an argument")
    return text


class Measured(NamedTuple):
    """A text to be measured on. ``text`` is None where it is a split of ``data``, whose ``column`` holds the text."""

    name: str
    text: str | None
    data: str | None = None
    split: str | None = None
    column: str = "text"


def measured_text(args: argparse.Namespace, file: str | None) -> Measured:
    """The text that FILE, "-" or ``--data`` and ``--split`` name.

    Raises:
        ValueError: none or two are given, it cannot be read, or it is empty.
    """
    if args.data is not None:
        if file is not None:
            raise ValueError(f"{quote(file)} and --data {quote(args.data)} are both given: choose one text")
        split = args.split or "test"
        return Measured(f"{args.data} {split}", None, args.data, split, args.column or "text")
    for name in ("split", "column"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} belongs to --data: give --data bundled, say")
    if file is None and is_terminal(sys.stdin):
        raise ValueError(_NO_TEXT)
    if file in (None, "-"):
        name, text = "stdin", read_stdin()
    else:
        name, text = file, _read_file(file)
    if not text and file is None:  # nothing was piped in either
        raise ValueError(_NO_TEXT)
    if not text:
        remedy = "give some text, FILE, or --data bundled --split test" if file == "-" else "there is nothing to measure on"
        raise ValueError(f"{name if file == '-' else quote(name)} is empty: {remedy}")
    return Measured(name, text)


def windows_of(model: Any, measured: Measured) -> Any:
    """The text in windows of a model's context. Raises ValueError where it cannot be read or cut."""
    from hbll_seq.evaluation.text import split_windows, text_windows

    if measured.data is None:
        return text_windows(model, measured.text)
    return split_windows(model, measured.data, measured.split, column=measured.column)


def _read_file(file: str) -> str:
    try:
        data = read_bytes(possible_name(file), MAX_TEXT)
    except OSError as error:
        raise ValueError(f"cannot read {quote(file)}: {shorten(error.strerror)}; give a text file, or - for stdin") from None
    return _decoded(data, quote(file))


def _decoded(data: Any, name: str) -> str:
    try:
        return data if isinstance(data, str) else data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text (byte {error.start}): convert it, e.g. with `iconv -f LATIN1 -t UTF-8`; "
                         "packed files and tables go by --data") from None
