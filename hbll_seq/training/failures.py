"""What kind of failure an error is, and what can be done about it."""

from __future__ import annotations

import errno
from pathlib import Path

from hbll_seq.utils.reading import quote, shorten


class RunFailed(RuntimeError):
    """The run cannot go on (loss not finite, disk full); the message says what is kept and what to do."""


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")  # as torch says it, of a RuntimeError


def disk_is_full(error: BaseException | None) -> bool:
    """Whether a full disk (or quota, or limit of a file's size) is behind an error, at whatever distance."""
    while error is not None:
        # safetensors reports it as an error of its own, in the words of the operating system
        if getattr(error, "errno", None) in _FULL or "No space left" in str(error) or "File too large" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def remedy_for(error: BaseException) -> str:
    """What helps against a file that could not be written, by the kind of error."""
    if disk_is_full(error):
        return "make room"
    if getattr(error, "errno", None) in _FORBIDDEN:
        return "see that you may write there"
    return "see to the disk" if isinstance(error, OSError) else "mend what is named"


def memory_is_full(error: BaseException) -> bool:
    """Whether an allocation failed."""
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and any(t in str(error) for t in _NO_MEMORY)


def cannot_write(folder: Path, error: Exception, resuming: bool = False) -> Exception:
    """What to raise where the folder of a run cannot be written: ValueError, of a full disk RunFailed."""
    what = f"output_dir={quote(str(folder))} cannot be written ({shorten(error)})"
    if disk_is_full(error):
        return RunFailed(f"{what}; make room on that disk, then give the same command again")
    if resuming:
        return ValueError(f"{what}; see that it can be written, then give the same command again")
    return ValueError(f"{what}; choose another --output-dir")
