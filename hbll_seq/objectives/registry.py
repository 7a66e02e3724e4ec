"""Names to options: one registry for the command line, presets and comparisons.

``"sweeps:forward=2,linearization=low_rank(rank=4)"`` is ``Sweeps(forward=2, linearization=LowRank(4))``. A name alone takes
all defaults.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from typing import Any

from hbll_seq.objectives.options import LINEARIZATIONS, DepthMix, Inference, Sweeps, Tree, VCycles
from hbll_seq.utils.reading import quote

#: ways to find states and adjoints over depth, by name
INFERENCES: dict[str, type[Inference]] = {kind.name: kind for kind in (Sweeps, Tree, VCycles)}


def parse_inference(text: str | Inference) -> Inference:
    """An inference over depth, from its text or as it is.

    Raises:
        ValueError: the name or an option is unknown, or a value is out of range.
    """
    if isinstance(text, Inference):
        return text
    name, _, rest = text.partition(":") if isinstance(text, str) else (text, "", "")
    if not isinstance(name, str) or name not in INFERENCES:
        raise ValueError(f"inference={quote(text)}: allowed are {', '.join(INFERENCES)}, with options as in sweeps:forward=2")
    return make(INFERENCES[name], options_of(rest, name))


def options_of(text: str, owner: str) -> dict[str, str]:
    """``"key=value,key=value"`` as a dict of texts; commas inside of parentheses divide nothing.

    Raises:
        ValueError: an item has no ``=``, or a key comes twice.
    """
    found: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in re.split(r",(?![^(]*\))", text))):
        key, equals, value = item.partition("=")
        if not equals or key in found:
            what = "comes twice" if equals else "has no value"
            raise ValueError(f"{owner}: option {quote(key)} {what}; write key=value once for each")
        found[key] = value
    return found


def make(kind: type, options: dict[str, str], **objects: Any) -> Any:
    """An options object of texts; ``objects`` are fields that no text can give.

    Raises:
        ValueError: an option is unknown, or a value does not fit.
    """
    known = {field.name: field for field in dataclasses.fields(kind) if "help" in field.metadata}
    for key in options:
        if key not in known:
            raise ValueError(f"{_name(kind)} has no option {quote(key)}; it has {', '.join(known)}")
    hints = typing.get_type_hints(kind)
    return kind(**{key: _value(key, value, hints[key]) for key, value in options.items()}, **objects)


def _name(kind: type) -> str:
    return getattr(kind, "name", kind.__name__) if kind is not DepthMix else "depths"


def _value(key: str, text: str, hint: Any) -> Any:
    """``text`` as the field's type; linearizations take options of their own in parentheses."""
    kinds = set(typing.get_args(hint)) if isinstance(hint, types.UnionType) else {hint}
    if text == "none" and type(None) in kinds:
        return None
    if key == "linearization":
        name, _, rest = text.removesuffix(")").partition("(")
        if name not in LINEARIZATIONS:
            raise ValueError(f"linearization={quote(text)}: allowed are {', '.join(LINEARIZATIONS)}")
        return make(LINEARIZATIONS[name], options_of(rest, name))
    if bool in kinds:
        if text not in ("true", "false"):
            raise ValueError(f"{key}={quote(text)}: must be true or false")
        return text == "true"
    for number in (float, int):
        if number in kinds:
            try:
                return number(text)
            except ValueError:
                what = "a number" if number is float else "a whole number"
                raise ValueError(f"{key}={quote(text)}: must be {what}") from None
    return text


def text_of(options: Any) -> str:
    """The text that makes an equal object; what is as by default is left out."""
    items = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if "help" not in field.metadata or value == field.default:
            continue
        if dataclasses.is_dataclass(value):
            inner = text_of(value)
            value = value.name + (f"({inner.partition(':')[2]})" if ":" in inner else "")
        items.append(f"{field.name}={str(value).lower() if isinstance(value, bool) or value is None else value}")
    return _name(type(options)) + (":" + ",".join(items) if items else "")
