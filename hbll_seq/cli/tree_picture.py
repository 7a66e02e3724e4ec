"""The tree of a model in plain characters, and paths as arcs over it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hbll_seq.tree.topology import DyadicTree

#: a wider tree is not drawn: a line has a few characters for each transition
MAX_TRANSITIONS = 32


def draw_levels(tree: DyadicTree, indent: str = "") -> str:
    """The blocks level by level, each in the column of its number; empty for a tree too wide for a line."""
    if tree.N > MAX_TRANSITIONS:
        return ""
    return "".join(_line(tree, f"{indent}level {i}", level, " ") for i, level in enumerate(tree.levels))


def draw_paths(tree: DyadicTree, named: Iterable[tuple[str, Sequence[int]]], indent: str = "") -> str:
    """Each path as a line of arcs: ``0-------4---6-7-8``, with blocks in the columns of :func:`draw_levels`. A tree too wide
    for that has the numbers alone."""
    if tree.N > MAX_TRANSITIONS:
        return "".join(f"{indent}{name:<8} {'-'.join(map(str, [0, *path, tree.N]))}\n" for name, path in named)
    return "".join(_line(tree, indent + name, [0, *path, tree.N], "-") for name, path in named)


def _line(tree: DyadicTree, name: str, numbers: Sequence[int], between: str) -> str:
    width = 4 if tree.N <= 16 else 3
    line = ""
    for number in numbers:
        line += (between if line or between == " " else "") * (number * width - len(line)) + str(number)
    return f"{name:<12} {line}\n"
