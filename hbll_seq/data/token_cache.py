"""The cache of token files and tokenizers, with the sums that each is checked against when it is opened.

A token cache is a folder of tokens.bin and meta.json, which holds the SHA-256 of tokens.bin and one of its own values. A
cached tokenizer KEY.model has its sum in KEY.model.sha256. Both appear whole or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from hbll_seq.data.file_tokens import FileTokens
from hbll_seq.data.tokenizer import MAX_MODEL, Tokenizer
from hbll_seq.utils.atomic import ASIDE, atomic_write
from hbll_seq.utils.integrity import read_sums
from hbll_seq.utils.reading import read_bytes, read_json, shorten

META, TOKENS = "meta.json", "tokens.bin"
IN_MEMORY = 1 << 28  # bytes; a larger token file is read slice by slice
STALE_AFTER_S = 24 * 3600.0  # a file of this age is left over from a killed process, if no process holds its lock
_META_SUM = "meta_sha256"
_KEY = re.compile(r"[0-9a-f]{32}")  # of an entry: what is called otherwise is not the cache's to remove


class NotUsable(Exception):
    """There is nothing to open; the message says why, as the end of a sentence about the cache."""


class Missing(NotUsable):
    """Nothing was ever written there."""


class Broken(NotUsable):
    """Its bytes are not those that were written."""


class WithoutSums(NotUsable):
    """An older version wrote it without sums, so that its bytes cannot be checked."""


# -- tokens -------------------------------------------------------------------------------------------------------


def seal(meta: dict[str, Any]) -> str:
    """The text of a meta.json with the sum of its own values."""
    return json.dumps({**meta, _META_SUM: _sum_of(meta)}, indent=1)


def _sum_of(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def open_tokens(
    folder: Path, fingerprint: str, dtype: np.dtype, vocab_size: int, *, without_sums: bool = False
) -> tuple[np.ndarray | FileTokens, int, int]:
    """Tokens, number of words and number of bytes of a cached text; no lock is needed.

    The sums are checked once a process, the ids' range with them. without_sums: take one of an older version, of which
    only sizes and ids can be checked.

    Raises NotUsable (Missing, Broken, WithoutSums).
    """
    if not os.path.lexists(folder):
        raise Missing
    try:
        meta = read_json(folder / META, 1 << 16)
        if not isinstance(meta, dict):
            raise ValueError(f"{META} holds no values")
        own_sum = meta.pop(_META_SUM, None)
        has_sums = own_sum is not None or "sha256" in meta
        if has_sums and own_sum != _sum_of(meta):
            raise ValueError(f"{META} was changed")
        if not has_sums and not without_sums:
            raise WithoutSums("has no sums, as older versions wrote it")
        counts = [meta.get(name) for name in ("n_tokens", "n_words", "n_bytes")]
        if any(type(count) is not int or count < 0 for count in counts):
            raise ValueError(f"{META} lacks n_tokens, n_words or n_bytes")
        if (meta.get("fingerprint"), meta.get("dtype")) != (fingerprint, dtype.name):
            raise ValueError(f"{META} is that of another text or tokenizer")
        tokens = _open_ids(folder / TOKENS, dtype, counts[0], meta.get("sha256"), vocab_size)
    except (OSError, ValueError) as error:
        raise Broken(f"is broken ({shorten(error)})") from error
    return tokens, counts[1], counts[2]


def _open_ids(path: Path, dtype: np.dtype, length: int, digest: str | None, vocab_size: int) -> np.ndarray | FileTokens:
    """The ids, with the right sum. Raises ValueError when they are others, OSError when they cannot be read."""
    tokens = FileTokens(path, dtype, length, digest, vocab_size)
    if length * dtype.itemsize > IN_MEMORY:
        return tokens
    tokens = tokens[:]
    tokens.flags.writeable = False
    return tokens


# -- tokenizers ---------------------------------------------------------------------------------------------------


def open_tokenizer(path: Path, vocab_size: int, *, without_sums: bool = False) -> Tokenizer:
    """A cached tokenizer; no lock is needed. without_sums: take one of an older version. Raises NotUsable."""
    try:
        proto = read_bytes(path, MAX_MODEL)
    except FileNotFoundError:
        raise Missing from None
    except (OSError, ValueError) as error:
        raise Broken(f"is broken ({shorten(error)})") from error
    try:
        with contextlib.suppress(FileNotFoundError):
            sums = read_sums(sum_path(path))
            without_sums = True  # it has them
            if sums.get(path.name) != hashlib.sha256(proto).hexdigest():
                raise ValueError("its bytes are not those that were written")
        tokenizer = Tokenizer(proto)
        if tokenizer.vocab_size != vocab_size:
            raise ValueError(f"it has {tokenizer.vocab_size} pieces, not {vocab_size}")
    except (OSError, ValueError) as error:
        raise Broken(f"is broken ({shorten(error)})") from error
    if not without_sums:
        raise WithoutSums("has no sum, as older versions wrote it")
    return tokenizer


def sum_path(path: Path) -> Path:
    """Where the sum of a cached tokenizer is."""
    return path.with_name(f"{path.name}.sha256")


def save_sum(path: Path, tokenizer: Tokenizer) -> None:
    """Writes the sum of a cached tokenizer, whose fingerprint is the SHA-256 of its bytes."""
    atomic_write(sum_path(path), f"{tokenizer.fingerprint}  {path.name}\n")


# -- files left by killed processes ----------------------------------------------------------------------------------


def sweep(target: Path) -> None:
    """Removes the files that killed writers left beside `target`, whose lock the caller holds.

    Everything unfinished of the target itself is removed. Of other targets, it must be older than a day and not locked.
    """
    key = target.name.partition(".")[0]
    for path in [*target.parent.glob("*.tmp"), *target.parent.glob(f"{ASIDE}*")]:
        other = path.name.removeprefix(ASIDE).partition(".")[0]
        if other == key:
            remove(path)
        elif _KEY.fullmatch(other) and time.time() - _last_written(path) > STALE_AFTER_S:
            with _all_locks(target.parent, other) as free:
                if free:
                    remove(path)


def remove(path: Path) -> None:
    """Removes a file, link or folder, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _last_written(path: Path) -> float:
    times = [0.0]
    with contextlib.suppress(OSError):
        times.append(path.lstat().st_mtime)
        times += [inner.lstat().st_mtime for inner in path.iterdir()] if path.is_dir() else []
    return max(times)


@contextlib.contextmanager
def _all_locks(parent: Path, key: str) -> Iterator[bool]:
    """Whether nobody holds a lock of that key; nobody gets one while the block runs."""
    with contextlib.ExitStack() as stack:
        try:
            for lock in parent.glob(f"{key}*.lock"):
                stack.enter_context(FileLock(lock, timeout=0))
        except (Timeout, OSError):
            yield False
            return
        yield True
