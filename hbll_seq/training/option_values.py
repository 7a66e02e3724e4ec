"""A value of a setting, as YAML or a command line gives it, in the setting's type and range."""

from __future__ import annotations

import dataclasses
import math
import numbers as abstract
import os
import types
import typing
from typing import Any

from hbll_seq.utils.options import missed_limit
from hbll_seq.utils.reading import possible_name, quote
from hbll_seq.utils.values import check_choice

#: settings that may name a file or folder
PATHS = ("data", "tokenizer", "init_from", "cache_dir", "output_dir")
_NO_FILES = {"data": ("bundled", "wikitext-2", "wikitext-103"), "tokenizer": ("default", "train", "model"),
             "init_from": ("bundled",)}
#: settings that are lists, written with commas
_LISTS = ("path", "cell", "block_shares")
PRECISIONS = ("auto", "float32", "bfloat16")
_PRECISION_ALIASES = {"fp32": "float32", "no": "float32", "bf16": "bfloat16"}
_FLOAT16_NAMES = ("float16", "fp16", "half")
#: bounds where a setting has none of its own: larger ones would end in an OverflowError.
_MOST, _LARGEST = 2**31 - 1, 1e6


def coerce(name: str, value: Any, hint: Any) -> Any:
    """``value`` (from YAML or the command line) in the type of ``hint``; PyYAML reads 1e-4 as a string."""
    optional = isinstance(hint, types.UnionType)
    kind = next(t for t in typing.get_args(hint) if t is not type(None)) if optional else hint
    wanted = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}[kind]
    error = ValueError(f"{name}={quote(value)}: must be {wanted}{' or none' if optional else ''}")
    if optional and (value is None or (isinstance(value, str) and value.lower() in ("none", "null"))):
        return None
    if kind is str and name in _LISTS:
        value = _listed(value, error)
    if kind is str:
        if not isinstance(value, str):
            raise error
        if not value:
            raise ValueError(f"{name}='': must not be empty{'; none leaves it out' if optional else ''}")
        if name in _LISTS:
            return value.replace(" ", "").strip("[]()")
        return _precision(value) if name == "precision" else str(value)  # not a subclass, which YAML could not write
    if kind is bool:
        if not isinstance(value, bool):
            raise error
        return value
    if isinstance(value, bool) or not isinstance(value, (abstract.Real, str)):
        raise error
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):  # the last for a whole number of 400 digits
        raise error from None
    if not math.isfinite(number) or (kind is int and number != int(number)):
        raise error
    return kind(value) if not isinstance(value, str) else kind(number)


def _listed(value: Any, error: ValueError) -> Any:
    """A block number, or a list of numbers or names, as the command line writes it: joined by commas."""
    items = value if isinstance(value, (list, tuple)) else [value]
    if any(isinstance(item, bool) or not isinstance(item, (int, str)) for item in items):
        raise error
    if any(isinstance(item, int) and abs(item) > _MOST for item in items):
        raise error
    return ",".join(map(str, items))


def numbers(name: str, value: str | None, allowed: str) -> tuple[int, ...] | None:
    """A list of numbers as :func:`coerce` leaves it, None for none. Raises ValueError where it holds another word."""
    try:
        return value if value is None else tuple(map(int, value.split(",")))
    except ValueError:
        raise ValueError(f"{name}={quote(value)}: must be {allowed}") from None


def expand_path(name: str, value: str) -> str:
    """The name with ``~`` expanded, as a shell does for an option's separate value."""
    try:
        path = possible_name(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return str(path) if value.startswith("~") else value


def names_file(name: str, value: str | None) -> bool:
    """Whether the value of a setting of ``PATHS`` is the name of a file or folder that exists."""
    return value is not None and value not in _NO_FILES.get(name, ()) and os.path.exists(value)


def _precision(value: str) -> str:
    if value in _FLOAT16_NAMES:
        raise ValueError(
            f"precision={quote(value)} is refused: a loss scaler does not reach the gradients inside the local losses; "
            f"allowed are {', '.join(PRECISIONS)}"
        )
    return _PRECISION_ALIASES.get(value, value)


def check_range(field: dataclasses.Field, value: Any) -> None:
    """Raises ValueError where the value of a setting is not one that its field allows."""
    allowed = field.metadata
    if value is None:
        return
    if allowed["choices"]:
        check_choice(field.name, value, allowed["choices"])
    if isinstance(value, str):
        return
    if allowed["high"] is None and allowed["below"] in (None, math.inf):
        allowed = {**allowed, "high": _MOST if isinstance(value, int) else _LARGEST}
    if limit := missed_limit(value, allowed):
        remedy = allowed["remedy"] if limit.startswith("above") else ""
        raise ValueError(f"{field.name}={quote(value)}: must be {limit}{remedy}")
