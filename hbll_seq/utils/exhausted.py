"""Whether an error says that the disk or the memory is full. Nothing here imports torch: programs ask before they end."""

from __future__ import annotations

import errno

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")  # as torch says it, of a RuntimeError


def disk_is_full(error: BaseException | None) -> bool:
    """Whether a full disk (or quota, or limit of a file's size) is behind an error, at whatever distance."""
    while error is not None:
        # safetensors reports it as an error of its own, in the words of the operating system
        if getattr(error, "errno", None) in _FULL or "No space left" in str(error) or "File too large" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def memory_is_full(error: BaseException) -> bool:
    """Whether an allocation failed."""
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and any(t in str(error) for t in _NO_MEMORY)
