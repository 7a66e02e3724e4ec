"""The lock of a run folder: one run at a time writes there, and a second one is told which.

The operating system holds the lock and drops it with the process, however that ends: a lock that nobody holds is no
hindrance, even where its file was left behind. The file says who holds it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import stat
from datetime import datetime
from pathlib import Path
from typing import Any

import filelock

from hbll_seq.training.failures import cannot_write
from hbll_seq.utils.console import say
from hbll_seq.utils.reading import parse_json, quote

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".run.lock"
_WHAT = "a run of hbll_seq holds this folder"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_LONGEST = 4096  # bytes of the description


class FolderLock:
    """Holds a folder from its making to :meth:`release`; the folder is made where it is missing.

    Raises:
        ValueError: another run holds it, or the folder cannot be written.
        RunFailed: the disk is full.
    """

    def __init__(self, folder: Path):
        self.path, self._folder = folder / LOCK, folder
        self._made: list[Path] = []
        self._handle: int | None = None
        self._held: filelock.BaseFileLock | None = None
        try:
            while not self._take():
                pass
        except BaseException as error:
            self.release()
            if isinstance(error, OSError):
                raise cannot_write(folder, error) from None
            raise

    def release(self) -> None:
        """Give the folder back. Its lock file goes, and so does the folder where this lock made it and nothing came in."""
        if self._handle is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()  # before the lock is dropped, or it would be another's file
            os.close(self._handle)
        if self._held is not None:
            self._held.release()
            with contextlib.suppress(OSError):
                self.path.unlink()
        self._handle = self._held = None
        with contextlib.suppress(OSError):
            for folder in reversed(self._made):
                folder.rmdir()
        self._made = []

    def _take(self) -> bool:
        """Whether the lock is held now; False where its file, or the folder, went while it was being taken."""
        missing = [path for path in (self._folder, *self._folder.absolute().parents) if not os.path.exists(path)]
        for folder in reversed(missing):
            try:
                folder.mkdir()
                self._made.append(folder)
            except FileExistsError:  # another run has just made it, or it is a link that leads nowhere
                if os.path.islink(folder) and not os.path.exists(folder):
                    raise ValueError(f"output_dir={quote(str(self._folder))}: {quote(str(folder))} is a link to nothing; "
                                     "remove the link, or choose another --output-dir") from None
        if fcntl is None:
            return self._take_by_library()
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # a run that has just ended took its folder away
            return False
        try:
            self._check_kind(handle)
            self._lock(handle)
            if not _is_at(handle, self.path):  # the run before removed the file that has been opened
                os.close(handle)
                return False
            with contextlib.suppress(OSError):  # a full disk: the lock holds without a name too
                os.ftruncate(handle, 0)
                os.pwrite(handle, _description().encode(), 0)
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle
        return True

    def _lock(self, handle: int) -> None:
        holder = _read(handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._refusal(_read(handle) or holder) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            if holder and not _has_ended(holder):
                raise self._refusal(holder, f", or remove {quote(str(self.path))} if it has ended without doing so") from None
            say(f"warning: the file system of {self._folder} has no locks: see that no second run writes there")

    def _check_kind(self, handle: int) -> None:
        if not stat.S_ISREG(os.fstat(handle).st_mode) or (os.fstat(handle).st_size and _read(handle) is None):
            raise ValueError(f"{quote(str(self.path))} is not the lock of a run: move it away, or choose another "
                             "--output-dir")

    def _take_by_library(self) -> bool:
        self._held = filelock.FileLock(self.path, timeout=0)
        try:
            self._held.acquire()
        except filelock.Timeout:
            self._held = None
            raise self._refusal({}) from None
        return True

    def _refusal(self, holder: dict[str, Any], more: str = "") -> ValueError:
        who = f"process {quote(holder.get('process'))} on {quote(holder.get('host'))}, since {quote(holder.get('since'))}" \
            if holder else "which has not said its name yet"
        return ValueError(f"output_dir={quote(str(self._folder))} is held by another run ({who}): wait for its end, or "
                          f"choose another --output-dir{more}")


def _description() -> str:
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    values = {"what": _WHAT, "host": socket.gethostname(), "process": os.getpid(), "since": since}
    return json.dumps(values) + "\n"


def _read(handle: int) -> dict[str, Any] | None:
    """Who wrote the file; empty where nobody has yet, None where it is another kind of file."""
    text = os.pread(handle, _LONGEST, 0)
    if not text:
        return {}
    try:
        values = parse_json(text)
    except ValueError:
        return None
    return values if isinstance(values, dict) and values.get("what") == _WHAT else None


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _has_ended(holder: dict[str, Any]) -> bool:
    """Whether that process is known to be gone; of another machine nobody can tell."""
    process = holder.get("process")
    if holder.get("host") != socket.gethostname() or type(process) is not int or process < 1:
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False
