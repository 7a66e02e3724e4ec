"""Ways to train that a comparison names: what they share, and how their names are read.

A name is a kind with options, as in ``"sweeps:forward=2,backward=1,linearization=low_rank"``. What the options mean is in
``depth_methods.py`` and ``time_methods.py``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar, get_args, get_type_hints

from torch import nn

from comparisons.words import current_name
from hbll_seq.objectives.registry import options_of

#: what an option's text becomes, by the option's name
Types = Mapping[str, Callable[[str], Any]]


@dataclass(frozen=True)
class Method(ABC):
    """A way to train.

    name: as it was asked for, in today's words.
    kind: what stands before the colon.
    options: those of its objective, by name.
    lr: its own learning rate, if it has one.
    """

    name: str
    kind: str
    options: tuple[tuple[str, Any], ...]
    lr: float | None = None

    @property
    @abstractmethod
    def description(self) -> str:
        """What the method does, with every default written out: runs of another description are not this method's."""

    @abstractmethod
    def objective(self, model: nn.Module, seed: int = 0) -> nn.Module:
        """This method's objective around a model.

        Raises:
            ValueError: an option is out of range, or does not fit the model.
        """

    @property
    def is_iterative(self) -> bool:
        """Whether its gradient comes from iterations, so that its alignment with the exact one is worth measuring."""
        return self.kind in ("sweeps", "v_cycles")


AnyMethod = TypeVar("AnyMethod", bound=Method)


def parse(name: str, over: str, kinds: Mapping[str, Types], also: str = "") -> tuple[str, str, dict[str, Any]]:
    """Reads ``"kind:key=value,key=value"``. A name in the words of older results is taken too.

    Args:
        name: of a method.
        over: ``"depth"`` or ``"time"``.
        kinds: the kinds that there are, each with its options.
        also: further names that are allowed, for the message.

    Returns:
        The name in today's words, the kind, and its options.

    Raises:
        ValueError: kind or option is unknown, or a value is not of the option's type.
    """
    name = current_name(name, over)
    kind, _, rest = name.partition(":")
    if kind not in kinds:
        allowed = also + ", ".join(kinds)
        raise ValueError(f"method {name!r}: allowed are {allowed}; options follow a colon, as in sweeps:forward=2")
    options = {}
    for key, value in options_of(rest, f"method {name!r}").items():
        if key not in kinds[kind]:
            known = ", ".join(sorted(kinds[kind])) or "none"
            raise ValueError(f"method {name!r}: {kind} has no option {key!r}; it has {known}")
        try:
            options[key] = kinds[kind][key](value)
        except ValueError:
            allowed = "true or false" if kinds[kind][key] is flag else "a number"
            raise ValueError(f"method {name!r}: {key}={value!r} must be {allowed}") from None
    return name, kind, options


def types_of(options: type) -> dict[str, Callable[[str], Any]]:
    """What each option of a kind of options objects becomes, by name; those that are objects themselves are given by name."""
    hints = get_type_hints(options)
    kinds = {field.name: set(get_args(hints[field.name])) or {hints[field.name]} for field in fields(options)}
    return {
        name: flag if bool in kind else int if int in kind else float if float in kind else str
        for name, kind in kinds.items() if str in kind or not kind.isdisjoint({bool, int, float})
    }  # fmt: skip


def distinct(methods: Iterable[AnyMethod]) -> list[AnyMethod]:
    """The methods, each name once: an older name and today's may be one."""
    return list({method.name: method for method in methods}.values())


def flag(text: str) -> bool:
    """``"true"`` or ``"false"``. Raises ValueError for anything else."""
    if text not in ("true", "false"):
        raise ValueError(text)
    return text == "true"


def whole_or_none(text: str) -> int | None:
    """A whole number, or None for ``"none"``."""
    return None if text == "none" else int(text)


def check_rate(name: str, value: float) -> None:
    """Raises ValueError unless the value can be a learning rate."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r}: must be a number above 0, such as 2e-3")
