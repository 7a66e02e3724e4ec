"""SHA-256 of files, and the list of them that a folder carries: ``SHA256SUMS``, which ``sha256sum --check`` reads too."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hbll_seq.utils.reading import open_regular, quote, read_text

SUMS_NAME = "SHA256SUMS"
_MOST = 1 << 20  # bytes of a SHA256SUMS: a checkpoint of 1023 ranks lists up to four files of each
_LINE = re.compile(r"([0-9a-f]{64})  ([^/\\\0\n]{1,255})")


def sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a regular file, in hexadecimal. Raises as :func:`hbll_seq.utils.reading.open_regular`."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file) -> str:  # Python 3.10
    found = hashlib.sha256()
    while block := file.read(1 << 20):
        found.update(block)
    return found.hexdigest()


def digest(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as a run's record and its checkpoints hold them. Raises as :func:`sha256`."""
    return {"bytes": os.stat(path).st_size, "sha256": sha256(path)}


def format_sums(folder: Path, names: Iterable[str]) -> str:
    """The text of a ``SHA256SUMS`` for these files of ``folder``. Raises OSError when one cannot be read."""
    return "".join(f"{sha256(folder / name)}  {name}\n" for name in sorted(names))


def read_sums(path: Path) -> dict[str, str]:
    """File name -> SHA-256, of a ``SHA256SUMS``.

    Raises:
        ValueError: a line is something else, is cut short, or names a file outside its folder.
        OSError: it is missing or cannot be read.
    """
    sums: dict[str, str] = {}
    text = read_text(path, _MOST)
    if text and not text.endswith("\n"):
        raise ValueError(f"{quote(os.fspath(path))} is cut short: its last line has no end")
    for number, line in enumerate(text.splitlines(), start=1):
        match = _LINE.fullmatch(line)
        if match is None or match[2] in (".", "..") or match[2] in sums:
            raise ValueError(f"{quote(os.fspath(path))}, line {number}: {quote(line)} is no line of `sha256sum`")
        sums[match[2]] = match[1]
    return sums
