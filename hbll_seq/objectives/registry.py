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

from hbll_seq.engine.linearization.base import Linearization
from hbll_seq.objectives.control import CONTROLS, Adaptive
from hbll_seq.objectives.depth_mix import MIXES
from hbll_seq.objectives.options import (
    LINEARIZATIONS,
    DepthMix,
    Inference,
    Sweeps,
    TimeTree,
    Tree,
    TreeGuess,
    VCycles,
)
from hbll_seq.utils.reading import quote
from hbll_seq.utils.values import check_choice

#: ways to find states and adjoints, by name: over depth, over the steps of a recurrent model, and inside recurrent blocks
INFERENCES: dict[str, type[Inference]] = {kind.name: kind for kind in (Sweeps, Tree, VCycles)}
TIME_INFERENCES: dict[str, type[Inference]] = {kind.name: kind for kind in (Sweeps, TimeTree)}
LAYER_INFERENCES: dict[str, type[Inference]] = {Sweeps.name: Sweeps}


def parse_inference(
    value: str | Inference, allowed: dict[str, type[Inference]] = INFERENCES, name: str = "inference"
) -> Inference:
    """An inference from its text, or as it is.

    Args:
        value: such as ``"sweeps:forward=2,linearization=low_rank(rank=4)"``.
        allowed: the kinds that it may be, by name.
        name: of the argument, for messages.

    Raises:
        ValueError: it is none of these, an option is unknown, or a value is out of range.
    """
    if isinstance(value, tuple(allowed.values())):
        return value
    kind, _, rest = value.partition(":") if isinstance(value, str) else ("", "", "")
    if kind not in allowed:
        classes = ", ".join(each.__name__ for each in allowed.values())
        raise ValueError(
            f"{name}={quote(value)}: allowed are {', '.join(allowed)}, with options as in sweeps:forward=2, and "
            f"objects of {classes}"
        )
    try:
        return make(allowed[kind], options_of(rest, kind))
    except ValueError as error:
        raise ValueError(f"{'' if name == 'inference' else f'{name}: '}{error}") from None


def parse_depths(value: str | DepthMix | None) -> DepthMix:
    """A depth mix from its text, such as ``"octaves"`` or ``"octaves:weight=4"``, or as it is; None is ``"none"``.

    Raises:
        ValueError: it is no such text, or the weight is out of range.
    """
    if isinstance(value, DepthMix):
        return value
    name, _, rest = value.partition(":") if isinstance(value, str) else (value, "", "")
    name = "none" if name is None else name
    check_choice("depths", name, MIXES)
    options = options_of(rest, "depths")
    if "name" in options:
        raise ValueError(f"depths={quote(value)}: the name goes before the colon, as in octaves:weight=4")
    return make(DepthMix, options, name=name)


def options_of(text: str, owner: str) -> dict[str, str]:
    """``"key=value,key=value"`` as a dict of texts; commas inside of parentheses divide nothing.

    Raises:
        ValueError: an item has no ``=``, or a key comes twice.
    """
    found: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in re.split(r",(?![^(]*\))", text))):
        key, equals, value = (word.strip() for word in item.partition("="))
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
    known = [field.name for field in dataclasses.fields(kind) if "help" in field.metadata]
    for key in options:
        if key not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(f"{_name(kind)} has no option {quote(key)}; {has}")
    for field in dataclasses.fields(kind):
        if field.default is dataclasses.MISSING and field.name not in objects:
            raise ValueError(
                f"{_name(kind)!r} without a {field.name}, which no text can give: pass a {kind.__name__}({field.name}=..)"
            )
    hints = typing.get_type_hints(kind)
    return kind(**{key: _value(key, value, hints[key]) for key, value in options.items()}, **objects)


def _name(kind: type) -> str:
    return "depths" if kind is DepthMix else getattr(kind, "name", kind.__name__)


def _value(key: str, text: str, hint: Any) -> Any:
    """``text`` as the field's type; linearizations and controls take options of their own in parentheses."""
    kinds = set(typing.get_args(hint)) if isinstance(hint, types.UnionType) else {hint}
    if text == "none" and type(None) in kinds:
        return None
    if key == "linearization":
        return parse_linearization(text)
    if key == "control":
        return parse_control(text)
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


def parse_linearization(text: str) -> Linearization:
    """A linearization from its text, such as ``"low_rank(rank=4)"``.

    Raises:
        ValueError: it is no such text, or an option is out of range.
    """
    return _object_of("linearization", text, LINEARIZATIONS, "low_rank(rank=4)")


def parse_control(text: str) -> Adaptive:
    """A control of K and M from its text, such as ``"adaptive(tolerance=0.05,every=20)"``.

    Raises:
        ValueError: it is no such text, or an option is out of range.
    """
    return _object_of("control", text, CONTROLS, "adaptive(tolerance=0.05)")


def _object_of(key: str, text: str, kinds: dict[str, type], example: str) -> Any:
    """``"name"`` or ``"name(key=value,key=value)"`` as an object of one of these kinds."""
    found = re.fullmatch(r"(\w+)(?:\((.*)\))?", text)
    if found is None or found[1] not in kinds:
        raise ValueError(f"{key}={quote(text)}: allowed are {', '.join(kinds)}, with options as in {example}")
    return make(kinds[found[1]], options_of(found[2] or "", found[1]))


def text_of(options: Any) -> str:
    """The text that makes an equal object; what is as by default is left out.

    Raises:
        ValueError: it holds an object that no text can give, such as a tree.
    """
    head, items = (options.name if isinstance(options, DepthMix) else _name(type(options))), []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if "help" not in field.metadata or isinstance(value, TreeGuess):
            raise ValueError(f"{type(options).__name__} with a {type(value).__name__}: no text can give that object")
        if value == field.default or (isinstance(options, DepthMix) and field.name == "name"):
            continue
        items.append(f"{field.name}={_text_of_value(value)}")
    return head + (":" + ",".join(items) if items else "")


def _text_of_value(value: Any) -> str:
    if isinstance(value, (Linearization, Adaptive)):
        name, _, inner = text_of(value).partition(":")
        return f"{name}({inner})" if inner else name
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
