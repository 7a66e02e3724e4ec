"""Processes that are killed at a chosen file operation: what tests/kill_points.py is made of. Linux only."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch

#: audit events of operations that change names or sizes: which argument is the path, and which its folder's handle.
EVENTS = {"os.rename": (1, 3), "os.link": (1, 3), "os.truncate": (0, None), "os.mkdir": (0, 2), "os.remove": (0, 1),
          "os.rmdir": (0, 1)}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
DEADLINE = 120.0  # seconds until a worker counts as hanging
_RANDOM = re.compile(r"[0-9a-f]{8,}|(?<=\.)\w{8}(?=\.tmp)")  # parts of names that differ between two runs


@dataclasses.dataclass(frozen=True)
class Point:
    """Where a process is killed."""

    kind: str
    at: float
    second: Point | None = None

    @classmethod
    def parse(cls, text: str) -> Point:
        first, _, second = text.partition("+")
        kind, _, at = first.partition(":")
        if kind not in ("before", "half", "power", "time"):
            raise ValueError(f"{text!r} is no point; give before:N, half:N, power:N or time:SECONDS")
        return cls(kind, float(at) if kind == "time" else int(at), cls.parse(second) if second else None)

    def __str__(self) -> str:
        at = f"{self.at:.4f}" if self.kind == "time" else self.at
        return f"{self.kind}:{at}" + (f"+{self.second}" if self.second else "")


class Watch:
    """Counts the file operations of this process below ``root``, and ends it at ``point``."""

    def __init__(self, root: Path, point: Point | None):
        self.root, self.labels = f"{root}{os.sep}", []
        self.kind, self.number = (point.kind, point.at) if point else ("none", 0)
        self.active = True
        self._opened: tuple[str, int] | None = None  # path and size before it was opened for writing
        self._flushed: dict[int, int] = {}  # inode -> bytes that a power cut leaves

    def audit(self, event: str, arguments: tuple) -> None:
        """The hook of ``sys.addaudithook``: Python calls it before each operation."""
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, (str, bytes)) and flags & WRITING:
                self.operation("write", path, truncates=bool(flags & os.O_TRUNC))
        elif event in EVENTS:
            position, handle = EVENTS[event]
            if isinstance(arguments[position], (str, bytes, os.PathLike)):
                self.operation(event.removeprefix("os."), arguments[position], arguments[handle] if handle else -1)

    def operation(self, name: str, path: str | bytes | os.PathLike, handle: int = -1, truncates: bool = False) -> None:
        """One operation that is about to take place."""
        folder = os.getcwd() if handle in (-1, None) else os.readlink(f"/proc/self/fd/{handle}")
        path = os.path.normpath(os.path.join(folder, os.fsdecode(path)))
        if not self.active or not path.startswith(self.root):
            return
        self._note_opened()
        self._half_done()
        self.labels.append(f"{name} {_RANDOM.sub('*', path.removeprefix(self.root))}")
        if self.kind in ("before", "power") and len(self.labels) == self.number:
            self.kill()
        self._opened = None
        if name == "write":
            self.writes(path, 0 if truncates or not os.path.exists(path) else os.path.getsize(path))

    def writes(self, path: str, size: int = 0) -> None:
        """``path`` is written from ``size`` on."""
        self._opened = path, size

    def flushed(self, handle: int) -> None:
        """``handle`` was flushed to the disk."""
        status = os.fstat(handle)
        self._flushed[status.st_ino] = status.st_size

    def finish(self) -> None:
        """The action is over: what is done from here on is no part of it."""
        self._half_done()
        self.active = False

    def at_half(self) -> bool:
        """Whether the operation that was counted last is to be half done."""
        return self.active and self.kind == "half" and len(self.labels) == self.number

    def kill(self) -> None:
        """End this process as a power cut or SIGKILL does."""
        self.active = False
        if self.kind == "power":
            self._cut_power()
        os.kill(os.getpid(), signal.SIGKILL)

    def _half_done(self) -> None:
        """Where the kill came while a file was written, it loses half of what was."""
        if self.at_half():
            self.active = False
            if self._opened and os.path.exists(self._opened[0]):
                path, size = self._opened
                os.truncate(path, size + (os.path.getsize(path) - size) // 2)
            self.kill()

    def _note_opened(self) -> None:
        if self._opened and os.path.exists(self._opened[0]):
            path, size = self._opened
            inode = os.stat(path).st_ino
            self._flushed[inode] = min(size, self._flushed.get(inode, size))

    def _cut_power(self) -> None:
        """Files lose what was not flushed. Renames are not undone."""
        for folder, _, names in os.walk(self.root):
            for path in (os.path.join(folder, name) for name in names):
                status = os.stat(path)
                if self._flushed.get(status.st_ino, status.st_size) < status.st_size:
                    os.truncate(path, self._flushed[status.st_ino])


_watch: Watch | None = None


def intercept() -> None:
    """Let ``_watch``, where a worker has one, see every operation of Python and safetensors."""
    fsync, serialize = os.fsync, safetensors.torch.serialize_file

    def watched_fsync(file) -> None:
        handle = file if isinstance(file, int) else file.fileno()
        if _watch:
            _watch.operation("flush", os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)
        if _watch:
            _watch.flushed(handle)

    def watched_serialize(tensors, filename, metadata=None) -> None:
        if not _watch:
            return serialize(tensors, filename, metadata=metadata)
        _watch.operation("weights", filename)
        half = _watch.at_half()
        # safetensors is native code, which writes under a name such as this one and renames
        path = os.path.abspath(Path(filename).with_name(".tmpHaLf00") if half else filename)
        serialize(tensors, path, metadata=metadata)
        _watch.writes(path)
        if half:
            _watch.finish()

    os.fsync, safetensors.torch.serialize_file = watched_fsync, watched_serialize
    sys.addaudithook(lambda event, arguments: _watch.audit(event, arguments) if _watch else None)


@dataclasses.dataclass
class Outcome:
    """What became of a worker: exit code (-9: killed), what its action returned, its operations, its output."""

    code: int
    value: Any
    labels: list[str]
    output: str
    seconds: float

    @property
    def last_line(self) -> str:
        """The last error that it told, or the last line."""
        lines = [line for line in self.output.splitlines() if line.strip()] or ["no output"]
        return next((line for line in reversed(lines) if "rror" in line), lines[-1])


class Worker:
    """A forked process that calls ``action`` in the folder ``root``, and is killed at ``point``."""

    _numbers = itertools.count()

    def __init__(self, action: Callable[[], Any], root: Path, point: Point | None = None):
        self.point, self.start, name = point, time.monotonic(), f"worker-{next(self._numbers)}"
        self.result, self.log = root.parent / f"{name}.json", root.parent / f"{name}.log"
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            self._work(action, root)

    def _work(self, action: Callable[[], Any], root: Path) -> None:
        global _watch
        code = 70
        try:
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT)
            for stream in (1, 2):
                os.dup2(log, stream)
            os.chdir(root)
            _watch = watch = Watch(root, self.point)
            value = action()
            watch.finish()
            self.result.write_text(json.dumps([value, watch.labels]))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(code)

    def wait(self) -> Outcome:
        """Its outcome, once it has ended; this kills it where the point is a time, or where it hangs."""
        timed = self.point is not None and self.point.kind == "time"
        deadline = self.start + (self.point.at if timed else DEADLINE)
        while not (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            if time.monotonic() >= deadline:
                os.kill(self.pid, signal.SIGKILL)
                ended = os.waitpid(self.pid, 0)
                break
            time.sleep(0.001)
        seconds = time.monotonic() - self.start
        value, labels = json.loads(self.result.read_text()) if self.result.exists() else (None, [])
        output = self.log.read_text(errors="replace") if self.log.exists() else ""
        return Outcome(os.waitstatus_to_exitcode(ended[1]), value, labels, output, seconds)
