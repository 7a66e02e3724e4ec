"""The growing files of a run: one JSON object per line, each with its ``step``."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from hbll_seq.utils.atomic import atomic_write, fsync
from hbll_seq.utils.console import say
from hbll_seq.utils.reading import check_regular, open_regular, parse_json, to_json

#: bytes of a line that are read at most; an evaluation's line holds the sampled text.
MAX_LINE = 1 << 24
#: bytes of a file that is read at most: a line of a step has some 150, that of an evaluation some thousands.
MAX_FILE = 1 << 30


class _Read(NamedTuple):
    """What a file holds: its good rows by step, and how many lines are damaged, and how many stand twice or out of order."""

    rows: list[dict[str, Any]]
    damaged: int
    misplaced: int


class JsonLines:
    """A file of one JSON object per line that only ever grows by whole lines.

    Args:
        path: the file; it is created by the first line.
        is_row: whether an object can be a line of this file; any other counts as damaged.
        flush_seconds: lines are flushed to the disk when the last flush is so long ago; 0 flushes each line. A flush costs
            milliseconds, as much as a step of a tiny model. Nothing is lost by a pause where :meth:`flush` is called before
            each checkpoint: what is newer than a checkpoint is written again by the run that goes on from it.
    """

    def __init__(self, path: str | os.PathLike, flush_seconds: float = 0.0,
                 is_row: Callable[[dict[str, Any]], bool] = lambda row: True):
        self.path, self.flush_seconds, self.is_row = Path(path), flush_seconds, is_row
        self._flushed = -float("inf")

    def append(self, row: dict[str, Any]) -> None:
        """Add one line; numbers that are not finite become null.

        Raises:
            OSError: the disk is full; what was written of the line is taken back.
            ValueError: the file is a folder, pipe or device.
        """
        line = (to_json(row) + "\n").encode("utf-8")
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
        handle = os.open(self.path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)  # a pipe is not waited for
        with open(handle, "ab", buffering=0) as file:
            check_regular(os.fstat(handle), self.path)
            size = os.fstat(handle).st_size
            try:
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, "the disk is full: a line could not be added", str(self.path))
                if time.monotonic() - self._flushed >= self.flush_seconds:
                    os.fsync(handle)
                    self._flushed = time.monotonic()
            except OSError:
                with contextlib.suppress(OSError):  # the first error is the one to tell
                    file.truncate(size)
                raise

    def flush(self) -> None:
        """Bring all lines to the disk, so that no power cut can take them. Raises OSError."""
        if self.path.exists():
            fsync(self.path)
            self._flushed = time.monotonic()

    def rows(self) -> list[dict[str, Any]]:
        """All good lines by step; of lines of the same step the last. A last line that a crash cut short is left out, and
        so is every damaged line.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is a folder, pipe or device, or larger than ``MAX_FILE``.
        """
        return self._read().rows

    def rewind(self, step: int) -> None:
        """Drop the lines after ``step``, so that a resumed run writes them again.

        A file with damaged lines, or with lines twice or out of order, is kept beside it under another name, and that is
        said: only the good lines go on.

        Raises:
            OSError: the file cannot be read or written; it is unchanged.
            ValueError: it is a folder, pipe or device, or larger than ``MAX_FILE``.
        """
        if not self.path.exists():
            return
        rows, damaged, misplaced = self._read()
        if damaged or misplaced:
            aside = self._keep_aside()
            found = [f"{damaged} damaged line{'s' * (damaged > 1)}, missing from now on"] * bool(damaged)
            found += [f"{misplaced} line{'s' * (misplaced > 1)} twice or out of order"] * bool(misplaced)
            say(f"warning: {self.path} holds {' and '.join(found)}; {len(rows)} good ones go on, the file as it was is kept "
                f"as {aside.name}")
        atomic_write(self.path, "".join(to_json(row) + "\n" for row in rows if row["step"] <= step))

    def _read(self) -> _Read:
        if not self.path.exists():
            return _Read([], 0, 0)
        rows: dict[int, dict[str, Any]] = {}
        damaged = misplaced = 0
        newest = -1
        with self._open() as file:
            for line, whole in _lines(file):
                if line is not None and not line.strip():
                    continue
                row = None if line is None else _row(line)
                if row is None or not self.is_row(row):
                    damaged += whole  # a last line without an end was cut short by a crash: nothing to speak of
                    continue
                misplaced += row["step"] <= newest
                newest = max(newest, row["step"])
                rows[row["step"]] = row
        return _Read([rows[step] for step in sorted(rows)], damaged, misplaced)

    def _open(self) -> BinaryIO:
        try:
            return open_regular(self.path, MAX_FILE)
        except ValueError as error:
            raise ValueError(f"{error}; move it away, then give the same command again") from None

    def _keep_aside(self) -> Path:
        """A copy of the file under the first free name ``<name>.damaged-<number>``."""
        number = 1
        while True:
            aside = self.path.with_name(f"{self.path.name}.damaged-{number}")
            try:
                copy = open(aside, "xb")  # never over an older one
            except FileExistsError:
                number += 1
                continue
            try:
                with copy, self._open() as file:
                    shutil.copyfileobj(file, copy)
                fsync(aside)
            except BaseException:
                aside.unlink(missing_ok=True)
                raise
            return aside


def _lines(file: BinaryIO) -> Iterator[tuple[bytes | None, bool]]:
    """The lines, None for one of more than ``MAX_LINE`` bytes, and whether each has an end."""
    while line := file.readline(MAX_LINE):
        too_long, whole = False, line.endswith(b"\n")
        while not whole and (rest := file.readline(MAX_LINE)):
            too_long, whole = True, rest.endswith(b"\n")
        yield (None if too_long else line), whole or too_long


def _row(line: bytes) -> dict[str, Any] | None:
    """The object of a line, None where it is damaged; older versions wrote NaN and Infinity."""
    try:
        row = parse_json(line.decode("utf-8"), null_for_non_finite=True)
    except ValueError:
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return row if type(step) is int and step >= 0 else None
