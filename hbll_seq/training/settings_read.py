"""Which settings a run's training reads: those that its results name, and those of the command line that it leaves unused."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from hbll_seq.objectives.control import Adaptive
from hbll_seq.objectives.options import DepthMix, Sweeps, Tree
from hbll_seq.training.settings import TrainingSettings

_DECISIVE = ("objective", "depth_mix", "max_steps", "batch_size", "lr", "seed")


def notable(settings: TrainingSettings) -> dict[str, Any]:
    """What a reader of the results wants to know of the training, beside text and model: a few settings always, others where
    they are not as by default."""
    usual = TrainingSettings(max_steps=1).resolved()
    found = {}
    for field in dataclasses.fields(settings):
        name, value = field.name, getattr(settings, field.name)
        differs = value is not None and value != getattr(usual, name)
        if (name in _DECISIVE or differs) and is_read(settings, field) and name not in ("data", "cache_dir", "num_proc"):
            found[name] = value
    return found


def unused(settings: TrainingSettings, given: Collection[str]) -> str:
    """One line on the options among ``given`` that no part of this run reads; nothing where there are none.

    What reads an option is the class that it is declared in (:mod:`hbll_seq.objectives.options`).
    """
    names = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(settings)
             if field.name in given and field.metadata["of"] and not is_read(settings, field)]
    run = f"--objective {settings.objective} --depth-mix {settings.depth_mix} --cell {settings.cell}"
    return f"warning: not used by this run ({run}): {', '.join(names)}" if names else ""


def is_read(settings: TrainingSettings, field: dataclasses.Field) -> bool:
    """Whether this run's training depends on the setting, as far as the model's configuration does not say it."""
    kind, axis, _ = field.metadata["of"] or (None, None, None)
    if kind is DepthMix:
        return settings.objective != "tree" and (field.name == "depth_mix" or settings.depth_mix != "none")
    if kind is Adaptive:
        return settings.objective == "sweeps" and settings.control != "none"
    if kind is Sweeps:
        over_time = settings.has_recurrence and settings.objective != "backprop"
        return settings.objective == "sweeps" if axis == "depth" else over_time
    return settings.objective == "tree" if kind is Tree else field.metadata["group"] not in ("model", "run")
