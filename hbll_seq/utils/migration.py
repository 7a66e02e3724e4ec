"""Old names and what they are called now: the one table by which files of older versions are read.

Files alone are migrated: config.json, presets and settings.yaml, the settings and tensors of checkpoints, the tensors of a
saved model. The command line and Python take today's names. A key that is in no table here stays as it is, and whoever reads
the file refuses what it does not know.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from hbll_seq.utils.reading import quote
from hbll_seq.utils.stored_tensors import Entries

T = TypeVar("T")

#: keys of a language model's config.json, old -> new
CONFIG_KEYS = {"block_size": "context_length", "readout_rank": "exit_rank", "readout_by": "exit_by"}
#: keys of presets, settings.yaml and the settings of checkpoints
SETTINGS_KEYS = {
    **CONFIG_KEYS,
    "sweeps": "forward",
    "corrections": "backward",
    "time_sweeps": "time_forward",
    "time_corrections": "time_backward",
    "time_chunk": "time_chunk_size",
    "mix": "depth_mix",
    "mix_weight": "depth_mix_weight",
    "graphs": "recompute",
}
#: values of settings, by the new key: old -> new
SETTINGS_VALUES = {"linearization": {"secant": "low_rank"}, "recompute": {"kept": False, "recomputed": True}}
#: beginnings of the names of tensors: in a saved model, and in the checkpoint of an objective around one
MODEL_TENSORS = {"readouts.": "exits."}
CHECKPOINT_TENSORS = {f"model.{old}": f"model.{new}" for old, new in MODEL_TENSORS.items()}
#: settings that some older version did not have: a checkpoint may lack them, and then means today's default
LATER_SETTINGS = frozenset(
    {"block_parallel", "carry_state", "cell", "chunk_size", "default_paths", "free_energy", "init", "init_from"}
    | {"linearization", "mlp", "control", "control_every", "control_most", "control_tolerance", "n_kv_head", "qk_norm"}
    | {"time_linearization", "auxiliary_exits", "ahead", "cuda_graph", "rank_timeout", "block_shares"}
    | {"auxiliary_blocks"}
    | set(SETTINGS_KEYS.values()) - {"context_length"}
)


def config(values: dict[str, Any]) -> dict[str, Any]:
    """The keys of a config.json by today's names. Raises ValueError where it holds an old name beside the new one."""
    return _renamed(values, CONFIG_KEYS)


def settings(values: dict[str, Any]) -> dict[str, Any]:
    """The keys of a preset or settings.yaml by today's names, and their values. Raises ValueError as :func:`config`."""
    found = _renamed(values, SETTINGS_KEYS)
    for key, words in SETTINGS_VALUES.items():
        if isinstance(found.get(key), str):
            found[key] = words.get(found[key], found[key])
    return found


def checkpoint_settings(values: dict[str, Any]) -> dict[str, Any]:
    """The settings of a checkpoint, in which nothing is left open, by today's names.

    Before ``default_paths`` there were neither exit adapters nor other paths than the spine's, and a mix could be left open.
    Raises ValueError as :func:`config`.
    """
    found = settings(values)
    if "default_paths" in found:
        return found
    mixed = found.get("objective") == "sweeps" and found.get("path", "full") == "full"
    mix = found.get("depth_mix", "none")
    mix = mix if mix != "auto" else "sandwich" if mixed else "none"
    return {**found, "depth_mix": mix, "exit_rank": 0, "default_paths": "spine"}


def settings_of_0_1(values: dict[str, Any]) -> dict[str, Any]:
    """Inverse of :func:`settings`: what version 0.1 had read from the same preset, and made its fingerprint of."""
    old_keys = {new: old for old, new in SETTINGS_KEYS.items()}
    found = {}
    for key, value in values.items():
        old_values = {new: old for old, new in SETTINGS_VALUES.get(key, {}).items()}
        known = isinstance(value, (str, bool)) and value in old_values
        found[old_keys.get(key, key)] = old_values[value] if known else value
    return found


def model_tensors(source: str, names: Iterable[str], wanted: Iterable[str]) -> dict[str, str]:
    """The names of a saved model's tensors: today's name -> the name in the file ``source``.

    Only names that the model lacks are renamed, and only to such as it has: a user's own module may be called as ours was.

    Raises:
        ValueError: the file holds a tensor by its old and by its new name.
    """
    wanted = set(wanted)
    found: dict[str, str] = {}
    for name in names:
        new = _new_name(name, MODEL_TENSORS)
        new = new if name not in wanted and new in wanted else name
        if new in found:
            raise ValueError(f"{source} holds {quote(found[new])} and {quote(name)}, which are one weight by its old and its "
                             "new name: load an intact copy")
        found[new] = name
    return found


def checkpoint_tensors(groups: Mapping[str, Mapping[str, T]]) -> dict[str, Mapping[str, T]]:
    """File -> tensor name -> tensor of a checkpoint, by today's names; states of an optimizer go with their parameter. No
    tensor is read.

    Raises:
        ValueError: a tensor is there by its old and by its new name.
    """
    found: dict[str, Mapping[str, T]] = {}
    for group, tensors in groups.items():
        found[group] = Entries(tensors, {_new_name(name, CHECKPOINT_TENSORS): name for name in tensors})
        if len(found[group]) < len(tensors):
            raise ValueError(f"{group} holds a tensor by its old and by its new name: go on from another checkpoint")
    return found


def new_option(old: str) -> str | None:
    """Today's name of a setting of an older version; None where there was none of that name."""
    return SETTINGS_KEYS.get(old)


def _renamed(values: dict[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        new = keys.get(key, key) if isinstance(key, str) else key
        if new in found or new != key and new in values:
            raise ValueError(f"{key} and {new} are one setting, by its old and its new name: leave {key} out")
        found[new] = value
    return found


def _new_name(name: str, beginnings: Mapping[str, str]) -> str:
    for old, new in beginnings.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
