"""A file of token ids that is too large for memory, read slice by slice.

A memory map would do the same, but a process dies of SIGBUS, without a message, when a mapped file is cut.
"""

from __future__ import annotations

import hashlib
import os
import time
import weakref
from collections.abc import Iterator
from numbers import Integral
from pathlib import Path

import numpy as np

from hbll_seq.utils.reading import open_regular, quote, shorten

BLOCK = 1 << 20  # tokens read at once where all are
_SETTLED_NS = 2_000_000_000  # a change within one clock tick keeps the file's time, so a younger file is not remembered

#: files that this process has found right: identity, size and time of each, and what it was compared with
_verified: set[tuple[object, ...]] = set()


class FileTokens:
    """The ids in a file, with the methods of a read-only 1-D array: length, indices, slices, `take`, conversion.

    The file stays open, so that it may be renamed or deleted meanwhile. Every read notices whether the file was cut or
    changed: bytes other than those of `digest` (SHA-256 of the file; None: unknown) are never returned.

    Raises ValueError when the file is not one of `length` ids below `vocab_size` with that sum, on opening or at a later
    read; OSError when it cannot be opened.
    """

    ndim = 1

    def __init__(self, path: Path, dtype: np.dtype, length: int, digest: str | None, vocab_size: int) -> None:
        self._path, self.dtype, self._length = path, dtype, length
        self._digest, self._vocab_size = digest, vocab_size
        with open_regular(path) as file:
            self._handle = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._handle)
        info = os.fstat(self._handle)
        self._stamp = info.st_size, info.st_mtime_ns
        key = str(path.absolute()), info.st_dev, info.st_ino, *self._stamp, digest, vocab_size
        if key not in _verified:
            self._verify()
            if time.time_ns() - info.st_mtime_ns > _SETTLED_NS:
                _verified.add(key)

    def __reduce__(self) -> tuple[type[FileTokens], tuple[object, ...]]:
        return type(self), (self._path, self.dtype, self._length, self._digest, self._vocab_size)

    def __len__(self) -> int:
        return self._length

    @property
    def shape(self) -> tuple[int]:
        """As of a NumPy array: one dimension."""
        return (self._length,)

    @property
    def size(self) -> int:
        """How many ids there are."""
        return self._length

    def __getitem__(self, index: int | slice) -> np.ndarray | np.integer:
        if isinstance(index, slice):
            start, stop, step = index.indices(self._length)
            if step < 0:
                return self[:][index]
            return self._read(start, max(0, stop - start))[::step]
        if not isinstance(index, Integral):
            raise TypeError(f"tokens of a file take whole numbers and slices, not {quote(index)}; see also take()")
        if not -self._length <= index < self._length:
            raise IndexError(f"token {index} of {self._length}")
        return self._read(int(index) % self._length, 1)[0]

    def __iter__(self) -> Iterator[np.integer]:
        for block in self.blocks():
            yield from block

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)

    def blocks(self) -> Iterator[np.ndarray]:
        """All ids in order, in arrays of bounded size."""
        for start in range(0, self._length, BLOCK):
            yield self._read(start, min(BLOCK, self._length - start))

    def take(self, indices: np.ndarray, mode: str = "raise") -> np.ndarray:
        """The ids at `indices`, of their shape; mode: as for `numpy.take`, "raise" or "wrap"."""
        indices = np.asarray(indices)
        flat = indices.ravel() % self._length if mode == "wrap" else indices.ravel()
        runs = np.split(flat, np.flatnonzero(np.diff(flat) != 1) + 1) if flat.size else []
        for run in runs:
            if not 0 <= run[0] <= run[-1] < self._length:
                raise IndexError(f"tokens {run[0]} .. {run[-1]} of {self._length}")
        parts = [self._read(int(run[0]), len(run)) for run in runs]
        return np.concatenate([np.empty(0, self.dtype), *parts]).reshape(indices.shape)

    # -- reading ------------------------------------------------------------------------------------------------

    def _read(self, start: int, count: int) -> np.ndarray:
        try:
            info = os.fstat(self._handle)
            if (info.st_size, info.st_mtime_ns) != self._stamp:
                self._verify()  # it was written to, or only touched
            return self._read_unchecked(start, count)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"token cache {quote(os.fspath(self._path))} was changed while it was in use ({shorten(error)}); "
                "start again, and the cache is made anew"
            ) from error

    def _read_unchecked(self, start: int, count: int) -> np.ndarray:
        data, missing = bytearray(), count * self.dtype.itemsize
        while missing and (part := _pread(self._handle, missing, start * self.dtype.itemsize + len(data))):
            data += part
            missing -= len(part)
        if missing:
            raise ValueError(f"{self._path.name} was cut")
        return np.frombuffer(data, dtype=self.dtype)

    def _verify(self) -> None:
        """Reads the whole file once and checks it; the result holds as long as the file's stamp does."""
        info = os.fstat(self._handle)
        if info.st_size != self._length * self.dtype.itemsize:
            raise ValueError(f"{self._path.name} has {info.st_size:,} bytes, not {self._length * self.dtype.itemsize:,}")
        digest, largest = hashlib.sha256(), 0
        for start in range(0, self._length, BLOCK):
            block = self._read_unchecked(start, min(BLOCK, self._length - start))
            digest.update(block)
            largest = max(largest, int(block.max()))
        if self._digest is not None and digest.hexdigest() != self._digest:
            raise ValueError(f"the bytes of {self._path.name} are not those that were written")
        if largest >= self._vocab_size:
            raise ValueError(f"{self._path.name} holds the id {largest}, but the vocabulary ends at {self._vocab_size - 1}")
        self._stamp = info.st_size, info.st_mtime_ns


def _pread(handle: int, n_bytes: int, offset: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(handle, n_bytes, offset)
    os.lseek(handle, offset, os.SEEK_SET)
    return os.read(handle, n_bytes)
