"""Reading what others may have written: regular files of bounded size, strict JSON and YAML, messages of bounded length.

A file is checked before it is read: reading a pipe or a device could wait for ever, a large file could fill the memory, and
a deeply nested document would end in a RecursionError.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
import stat
from pathlib import Path
from typing import Any, BinaryIO

import yaml

#: characters of a value that a message quotes at most.
MAX_QUOTED = 200
#: bytes of a document (configuration, card, state, preset) that are read at most, where a caller names no other limit.
MAX_DOCUMENT = 1 << 24
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class _Repr(reprlib.Repr):
    """``repr`` that never walks through all of a large value."""

    def __init__(self):
        super().__init__()
        self.maxlevel = 3
        self.maxstring = self.maxother = self.maxlong = MAX_QUOTED
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = self.maxdeque = self.maxarray = 12

    def repr_str(self, x: str, level: int) -> str:
        return repr(x[:MAX_QUOTED]) + "..." * (len(x) > MAX_QUOTED)

    def repr_bytes(self, x: bytes, level: int) -> str:
        return repr(x[:MAX_QUOTED]) + "..." * (len(x) > MAX_QUOTED)

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() < 3 * MAX_QUOTED else f"<whole number of {x.bit_length()} bits>"

    def repr_instance(self, x: object, level: int) -> str:
        try:
            return super().repr_instance(x, level)
        except Exception:  # a foreign __repr__ may raise anything
            return f"<{type(x).__name__}>"


def quote(value: object) -> str:
    """``repr(value)`` for a message: one line of at most ``MAX_QUOTED`` characters, made in bounded time and memory."""
    try:
        text = " ".join(_Repr().repr(value).split())
    except Exception:
        text = f"<{type(value).__name__}>"
    return text if len(text) <= MAX_QUOTED else text[: MAX_QUOTED - 3] + "..."


def shorten(text: object, limit: int = MAX_QUOTED) -> str:
    """A foreign message (an exception's, say) as one line of at most ``limit`` characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


# ---------------------------------------------------------------------------------------------------- files


def open_regular(path: str | os.PathLike[str], limit: int | None = None) -> BinaryIO:
    """A regular file (or a link to one) opened for reading bytes; nothing is waited for.

    Args:
        path: the file.
        limit: bytes that it may have at most; None for any number.

    Raises:
        ValueError: it is a folder, pipe, socket or device, larger than ``limit``, or no possible name.
        OSError: it is missing or cannot be opened.
    """
    check_regular(os.stat(path), path, limit)
    # a pipe that takes the file's place between the two calls must not be waited for
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        check_regular(os.fstat(handle), path, limit)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def check_regular(info: os.stat_result, path: str | os.PathLike[str], limit: int | None = None) -> None:
    """Raises ValueError unless ``info`` is that of a regular file of at most ``limit`` bytes."""
    if not stat.S_ISREG(info.st_mode):
        kind = next((name for test, name in _KINDS if test(info.st_mode)), "no regular file")
        raise ValueError(f"{quote(os.fspath(path))} is {kind}; it must be a regular file")
    if limit is not None and info.st_size > limit:
        raise ValueError(f"{quote(os.fspath(path))} has {info.st_size:,} bytes; it may have at most {limit:,}")


def read_bytes(path: str | os.PathLike[str], limit: int = MAX_DOCUMENT) -> bytes:
    """All bytes of a regular file. Raises as :func:`open_regular`."""
    with open_regular(path, limit) as file:
        data = file.read(limit + 1)
    if len(data) > limit:  # it has grown meanwhile
        raise ValueError(f"{quote(os.fspath(path))} has more than {limit:,} bytes")
    return data


def read_text(path: str | os.PathLike[str], limit: int = MAX_DOCUMENT, errors: str = "strict") -> str:
    """A regular file as UTF-8 text. Raises as :func:`open_regular`, and ValueError where it is not UTF-8."""
    try:
        return read_bytes(path, limit).decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise ValueError(f"{quote(os.fspath(path))} is not UTF-8 text ({shorten(error)})") from None


# ---------------------------------------------------------------------------------------------------- documents


def parse_json(text: str | bytes, *, null_for_non_finite: bool = False) -> Any:
    """Strict JSON: no NaN or Infinity, no key twice, no nesting that Python cannot follow.

    Args:
        text: the document.
        null_for_non_finite: read NaN and Infinity as None, for lines that older versions wrote.

    Raises:
        ValueError: it is something else; the message says what, and is short.
    """

    def number(literal: str) -> float | None:
        value = float(literal)
        return value if math.isfinite(value) else constant(literal)

    def constant(literal: str) -> None:
        if null_for_non_finite:
            return None
        raise ValueError(f"{shorten(literal, 40)} is no finite number")

    try:
        return json.loads(text, parse_constant=constant, parse_float=number, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:  # of JSON, of UTF-8, of a number with thousands of digits
        raise ValueError(shorten(error)) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {quote(twice)} stands in it twice")
    return values


def read_json(path: str | os.PathLike[str], limit: int = MAX_DOCUMENT) -> Any:
    """The strict JSON of a regular file. Raises OSError when it cannot be read, ValueError (naming it) for all else."""
    text = read_bytes(path, limit)
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{quote(os.fspath(path))} is not valid JSON: {error}") from None


def to_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON: NaN and infinite numbers are written as null, which every reader takes."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


class _StrictLoader(yaml.SafeLoader):
    """Plain values alone: an alias can make a document of a few lines stand for millions of values."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError(f"line {self.peek_event().start_mark.line + 1}: aliases (*name) are not read")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            keys = [self.construct_object(key) for key, _ in node.value]
            twice = next(key for i, key in enumerate(keys) if key in keys[:i])
            raise yaml.YAMLError(f"the key {quote(twice)} stands in it twice")
        return mapping


def parse_yaml(text: str) -> Any:
    """YAML of plain values without aliases. Raises ValueError, with a short message, for anything else."""
    try:
        return yaml.load(text, Loader=_StrictLoader)  # a SafeLoader: it makes plain values only
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, KeyError, IndexError, OverflowError) as error:
        raise ValueError(shorten(error)) from None  # PyYAML lets what its constructors meet through


def read_yaml(path: str | os.PathLike[str], limit: int = 1 << 16) -> Any:
    """The YAML of a regular file. Raises OSError when it cannot be read, ValueError (naming it) for all else."""
    text = read_text(path, limit)
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{quote(os.fspath(path))} is not valid YAML: {error}") from None


def possible_name(path: str | os.PathLike[str]) -> Path:
    """The path with ``~`` expanded, after checking that a file could bear it.

    Raises:
        ValueError: it is empty, holds a NUL or a lone surrogate, or has a part of more than 255 bytes.
    """
    text = os.fspath(path)
    if isinstance(text, bytes):
        text = os.fsdecode(text)
    if not text.strip():
        raise ValueError(f"path {quote(text)} is empty; give the name of a file or folder")
    if "\0" in text:
        raise ValueError(f"path {quote(text)} holds a NUL character; no file can bear that name")
    try:
        lengths = [len(os.fsencode(part)) for part in text.split("/")]
    except UnicodeEncodeError:
        raise ValueError(f"path {quote(text)} holds a lone surrogate; no file can bear that name, choose another") from None
    if max(lengths) > 255 or sum(lengths) + len(lengths) > 4000:
        raise ValueError(f"path {quote(text)} is too long for a file name; parts may have 255 bytes, choose a shorter one")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # an unknown user, or an unknown home
        raise ValueError(f"path {quote(text)}: {shorten(error)}; write the folder out") from None
