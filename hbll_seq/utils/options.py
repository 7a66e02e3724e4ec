"""Options as fields of a dataclass: what each means and may be stands beside its default, once, for all who ask."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any

from hbll_seq.utils.reading import quote
from hbll_seq.utils.values import as_flag, check_choice, number_or_none, whole_or_none


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] | None = None,
    remedy: str = "",
    **more: Any,
) -> Any:
    """A dataclass field that is an option.

    Args:
        default: its value where nothing is said.
        help: what it means, for ``--help``.
        low, high: the least and the largest value. above, below: values that it must exceed, and stay under; a number
            with ``below=math.inf`` must be finite.
        choices: the words that it may be.
        remedy: what a message adds to the range, such as ``", or None for all"``.
        more: further metadata, as a command line's group.
    """
    metadata = dict(help=help, low=low, high=high, above=above, below=below, choices=choices, remedy=remedy, **more)
    return dataclasses.field(default=default, metadata=metadata)


def check_options(options: Any, prefix: str = "") -> None:
    """Checks every plain option of a frozen dataclass (numbers, flags, words), and makes NumPy's numbers Python's.

    Args:
        options: an instance; fields that hold objects of other kinds check themselves.
        prefix: goes before an option's name in messages.

    Raises:
        ValueError: a value has the wrong type or is out of range; the message names it and what is allowed.
    """
    hints = typing.get_type_hints(type(options))
    for field in dataclasses.fields(options):
        kinds = kinds_of(hints[field.name])
        value = getattr(options, field.name)
        if "help" not in field.metadata or (value is None and type(None) in kinds):
            continue
        if not isinstance(value, str) and not {bool, int, float} & kinds and str in kinds and len(kinds - {str, type(None)}):
            continue  # an object, where a word would be sugar for one
        object.__setattr__(options, field.name, _checked(prefix + field.name, value, kinds, field.metadata))


def kinds_of(hint: Any) -> set[type]:
    """The classes that a type hint names: of ``list[str] | None`` list, str and NoneType."""
    origin = typing.get_origin(hint)
    inner = set().union(*map(kinds_of, typing.get_args(hint)))
    return {hint} if origin is None else inner if origin in (types.UnionType, typing.Union) else inner | {origin}


def _checked(name: str, value: Any, kinds: set[type], allowed: typing.Mapping[str, Any]) -> Any:
    if bool in kinds:
        return as_flag(name, value)
    if float in kinds or int in kinds:
        plain = number_or_none(value) if float in kinds else whole_or_none(value)
        if plain is None or missed_limit(plain, allowed):
            within = allowed_range(allowed)
            what = "a number" if float in kinds else "a whole number"
            raise ValueError(f"{name}={quote(value)}: must be {what}{' ' * bool(within)}{within}{allowed.get('remedy', '')}")
        return plain
    if allowed["choices"]:
        check_choice(name, value, allowed["choices"])
    return value


def missed_limit(value: float, allowed: typing.Mapping[str, Any]) -> str:
    """The limit of an option's metadata that a number misses, such as ``"at least 1"``; empty where it keeps all of them."""
    low, high, above, below = (allowed[key] for key in ("low", "high", "above", "below"))
    if low is not None and not value >= low:
        return f"at least {low}"
    if above is not None and not value > above:
        return f"above {above:g}"
    if high is not None and not value <= high:
        return f"at most {high}"
    return f"below {below:g}" if below is not None and not value < below else ""


def allowed_range(allowed: typing.Mapping[str, Any]) -> str:
    """The range of an option in words, from its metadata: ``"of at least 1 and at most 5"``; empty where it has none."""
    low, high, above, below = (allowed[key] for key in ("low", "high", "above", "below"))
    least = f"of at least {low}" if low is not None else f"above {above}" if above is not None else ""
    most = f"at most {high}" if high is not None else f"below {below}" if below not in (None, math.inf) else ""
    return " ".join(words for words in (least, "and" if least and most else "", most) if words)
