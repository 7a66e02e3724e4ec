"""Harm done to bytes, and to what lies where a file is expected."""

from __future__ import annotations

import os
import random
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

PAGE = 4096


def harm_bytes(data: bytes, rng: random.Random, other: bytes = b"") -> tuple[bytes, str]:
    """One harm, or now and then three, and what it was in words; the result always differs from ``data``.

    Args:
        other: another file's content, which may take this one's place.
    """
    words = []
    harmed = data
    for _ in range(rng.choice((1, 1, 1, 3))):
        name = rng.choice(list(_HARMS))
        harmed, where = _HARMS[name](harmed, rng) if name != "other" else (other, "")
        words.append(f"{name}{where}")
    if harmed == data:
        harmed, where = _flip(data or b"\0", rng)
        words.append(f"flip{where}")
    return harmed, ", ".join(words)


def _place(data: bytes, rng: random.Random) -> int:
    """An offset; headers and ends are met more often than their share."""
    if not data:
        return 0
    choice = rng.random()
    if choice < 0.2:
        return rng.randrange(min(len(data), 64))
    if choice < 0.3:
        return len(data) - 1 - rng.randrange(min(len(data), 64))
    return rng.randrange(len(data))


def _flip(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    if not data:
        return b"\1", " of nothing"
    at, bit = _place(data, rng), rng.randrange(8)
    return data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :], f" bit {bit} at {at}"


def _byte(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    at, value = _place(data, rng), rng.choice((0, 0xFF, 0x80, 0x7F, 10, 13, 0x22, 0x31, rng.randrange(256)))
    return data[:at] + bytes([value]) + data[at + 1 :], f" {value:#x} at {at}"


def _cut(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    at = _place(data, rng)
    return data[:at], f" at {at}"


def _remove(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    at, length = _place(data, rng), rng.choice((1, 2, 8, 100))
    return data[:at] + data[at + length :], f" {length} at {at}"


def _insert(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    at = _place(data, rng)
    what = rng.choice((b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"\r", b'"', b"[", b"\x1b[2J", rng.randbytes(9),
                       b"0" * 5000))
    return data[:at] + what + data[at:], f" {what[:12]!r} at {at}"


def _swap(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    if len(data) < 4:
        return data[::-1], " of all"
    length = rng.randrange(1, max(2, len(data) // 4))
    one = rng.randrange(len(data) - 2 * length + 1) if len(data) > 2 * length else 0
    two, end = one + length, one + 2 * length
    return data[:one] + data[two:end] + data[one:two] + data[end:], f" at {one}"


def _zero(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    at, length = _place(data, rng) // PAGE * PAGE, rng.choice((64, 512, PAGE))
    return data[:at] + bytes(len(data[at : at + length])) + data[at + length :], f" {length} at {at}"


def _repeat(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    return data + data[: rng.randrange(1, len(data) + 1) if data else 0], ""


_HARMS: dict[str, Callable] = {
    "flip": _flip, "flip again": _flip, "byte": _byte, "cut": _cut, "remove": _remove, "insert": _insert, "swap": _swap,
    "zero": _zero, "repeat": _repeat, "empty": lambda data, rng: (b"", ""),
    "noise": lambda data, rng: (rng.randbytes(300), ""),
    "other": None,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- what lies there


def harm_place(path: Path, rng: random.Random, kinds: tuple[str, ...] = ()) -> str:
    """Put something in the file's place that is no file of its kind; returns it in words.

    Args:
        kinds: some of ``PLACES``; all by default.
    """
    kind = rng.choice(kinds or tuple(PLACES))
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    PLACES[kind](path)
    return kind


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(3 << 30)  # more than an input may take of memory


def _full_folder(path: Path) -> None:
    path.mkdir()
    (path / "inside").write_text("x")


def _socket(path: Path) -> None:
    before = os.getcwd()
    os.chdir(path.parent)  # a socket's path may have about a hundred bytes
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(before)


PLACES: dict[str, Callable[[Path], None]] = {
    "missing": lambda path: None,
    "empty file": lambda path: path.touch(),
    "sparse file of 3 GiB": _sparse,
    "pipe": lambda path: os.mkfifo(path),
    "folder": lambda path: path.mkdir(),
    "folder with a file": _full_folder,
    "socket": _socket,
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "link to /dev/full": lambda path: path.symlink_to("/dev/full"),
    "link to a terminal": lambda path: path.symlink_to("/dev/tty"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to its folder": lambda path: path.symlink_to("."),
}
PLACES_OF_BOUNDED_SIZE = tuple(kind for kind in PLACES if not kind.startswith("sparse"))
