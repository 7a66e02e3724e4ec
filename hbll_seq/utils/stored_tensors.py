"""Tensors that stay in their file until they are asked for, so that a part of a file takes the memory of that part."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TypeVar

from safetensors import safe_open
from torch import Tensor

from hbll_seq.utils.reading import quote

T = TypeVar("T")


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file by name, on the CPU: each is read when it is asked for, and none is kept.

    Raises:
        OSError, SafetensorError: the file cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._file = safe_open(path, framework="pt")
        self._names = dict.fromkeys(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Entries(Mapping[str, T]):
    """Some entries of a mapping, by names of their own; the mapping is asked when they are.

    Args:
        of: the mapping.
        names: here -> there.
    """

    def __init__(self, of: Mapping[str, T], names: Mapping[str, str]):
        self._of, self._names = of, dict(names)

    def __getitem__(self, name: str) -> T:
        return self._of[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Joined(Mapping[str, T]):
    """The entries of several mappings as those of one; each is asked for its own ones when they are.

    Args:
        parts: the mappings, by the names that an error gives them.

    Raises:
        ValueError: two hold an entry of the same name.
    """

    def __init__(self, parts: Mapping[str, Mapping[str, T]]):
        self._parts, self._holders = dict(parts), {}
        for part, entries in parts.items():
            for name in entries:
                if name in self._holders:
                    raise ValueError(f"{self._holders[name]} and {part} both hold {quote(name)}")
                self._holders[name] = part

    def __getitem__(self, name: str) -> T:
        return self._parts[self._holders[name]][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._holders)

    def __len__(self) -> int:
        return len(self._holders)
