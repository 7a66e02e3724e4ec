"""How the files of a checkpoint are called: a group of tensors is one file, or one part of each rank that wrote it.

``model.safetensors`` is whole; ``model_1_of_2.safetensors`` and ``model_2_of_2.safetensors`` are what two ranks hold of it.
All groups of a checkpoint have as many parts. Which rank wrote a tensor does not matter to who reads it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from hbll_seq.utils.stored_tensors import Joined

T = TypeVar("T")
ENDING = ".safetensors"
_PART = re.compile(r"([A-Za-z0-9]{1,32})_([1-9][0-9]{0,3})_of_([1-9][0-9]{0,3})")


def file_name(group: str, part: int = 1, n_parts: int = 1) -> str:
    """Of the file that holds a group, or one of its parts, from 1."""
    return group + (f"_{part}_of_{n_parts}" if n_parts > 1 else "") + ENDING


def is_checked_by(name: str, process: int, n_processes: int) -> bool:
    """Whether that process, from 0, checks the file of that name where several check a checkpoint between them.

    Where each has written a part, that one; a file that is whole, every process. So all files are checked by somebody.
    """
    match = _PART.fullmatch(name.removesuffix(ENDING))
    part, n_parts = (int(match[2]), int(match[3])) if match else (1, 1)
    return (part - 1) % n_processes == process % n_parts


def by_group(files: Mapping[str, Mapping[str, T]]) -> dict[str, Mapping[str, T]]:
    """The groups of tensors that files hold, by the files' names: group -> tensor name -> tensor. None is read.

    Raises:
        ValueError: a part is missing, two parts hold a tensor of the same name, or the files do not all have as many parts.
    """
    groups: dict[str, None] = {}
    of_number: dict[int, str] = {}  # how many parts -> a file that is one of so many
    for name in files:
        stem = name.removesuffix(ENDING)
        match = _PART.fullmatch(stem)
        group, part, n_parts = (match[1], int(match[2]), int(match[3])) if match else (stem, 1, 1)
        if name != file_name(group, part, n_parts) or part > n_parts:
            raise ValueError(f"{name} is the name of no part")
        groups[group] = None
        of_number[n_parts] = name
    if len(of_number) > 1:
        one, other = sorted(of_number)[:2]
        raise ValueError(f"{of_number[one]} and {of_number[other]} lie in it, which are of different numbers of parts")
    n_parts = next(iter(of_number), 1)
    return {group: _whole(files, group, n_parts) for group in groups}


def _whole(files: Mapping[str, Mapping[str, T]], group: str, n_parts: int) -> Mapping[str, T]:
    names = [file_name(group, part, n_parts) for part in range(1, n_parts + 1)]
    if missing := [name for name in names if name not in files]:
        raise ValueError(f"{missing[0]} is missing")
    return Joined({name: files[name] for name in names})
