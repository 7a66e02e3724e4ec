"""Presets: YAML files of some settings, and how they, a run's settings and the command line become settings.

A value is looked up in three layers, the later one wins: the defaults of :class:`TrainingSettings`, a preset, the command
line. Files of older versions are read by today's names (:mod:`hbll_seq.utils.migration`).
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from pathlib import Path
from typing import Any

from hbll_seq.training.settings import TrainingSettings
from hbll_seq.utils import migration
from hbll_seq.utils.reading import possible_name, quote, read_yaml, shorten

#: folder of the presets that come with the package
PRESETS = Path(__file__).resolve().parent
DEFAULT_PRESET = "small"
#: settings that a depth mix is chosen for, and their defaults
_WANTS_ITS_MIX = {"objective": "sweeps", "path": "full"}
SETTINGS = tuple(field.name for field in dataclasses.fields(TrainingSettings))


def read_preset(name: str, folder: Path) -> dict[str, Any]:
    """The settings of a preset, by today's names: the file ``name`` itself, or ``folder/name.yaml``.

    Raises:
        ValueError: no such preset, not a YAML mapping, an unknown key, or an old key beside its new one.
    """
    try:
        path = possible_name(name)
    except ValueError as error:
        raise ValueError(f"preset: {error}") from None
    path = path if name.endswith((".yaml", ".yml")) else folder / f"{path}.yaml"
    try:
        values = read_yaml(path)
    except FileNotFoundError:
        known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
        raise ValueError(f"preset {quote(name)} does not exist: choose one of {known}, or give the path of a .yaml "
                         "file") from None
    except OSError as error:
        raise ValueError(f"preset {quote(name)} cannot be read ({shorten(error.strerror)}): choose another") from None
    except ValueError as error:
        raise ValueError(f"preset {error}; write lines of 'key: value'") from None
    where = f"preset {quote(str(path))}"
    if not isinstance(values, dict):
        raise ValueError(f"{where} must hold lines of 'key: value'")
    try:
        values = migration.settings(values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    check_keys(values, where)
    return values


def check_keys(values: dict[str, Any], where: str) -> None:
    """Raises ValueError for the first key that is no setting, with the nearest known one."""
    for key in values:
        if key not in SETTINGS:
            near = nearest_setting(key)
            hint = f"did you mean {near!r}?" if near else "remove it; train/lm.py --help lists what there is"
            raise ValueError(f"unknown key {quote(key)} in {where}: {hint}")


def nearest_setting(name: Any) -> str | None:
    """The setting that somebody who wrote ``name`` may have meant: that of an older version's name, or a similar one."""
    name = shorten(name, 40)
    near = difflib.get_close_matches(name, SETTINGS, n=1)
    return migration.new_option(name) or (near[0] if near else None)


def resolve(*layers: dict[str, Any]) -> TrainingSettings:
    """Settings from layers of values, the later one wins; nothing that was left open is decided.

    ``max_steps`` and ``epochs`` say the same thing, so a layer that sets one unsets the other of the layers before,
    and ``tokenizer`` unsets the ``vocab_size`` that belonged to a tokenizer trained before. Another ``objective`` or ``path``
    unsets the ``depth_mix`` of the layers before, which was chosen for theirs.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, rival in (("max_steps", "epochs"), ("epochs", "max_steps"), ("tokenizer", "vocab_size")):
            if layer.get(key) is not None:
                merged.pop(rival, None)
        if any(key in layer and layer[key] != merged.get(key, usual) for key, usual in _WANTS_ITS_MIX.items()):
            merged.pop("depth_mix", None)
        merged.update(layer)
    return TrainingSettings(**merged)


def preset_fingerprint(values: dict[str, Any]) -> str:
    """SHA-256 of what a preset says; comments, order and layout do not count."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
