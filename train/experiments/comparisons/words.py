"""Reads the words of older files of results as today's. A file stays as it is until a run is added.

A stored run names its method twice: as it was asked for, such as ``"sweeps:forward=2,backward=3"``, and by a description with
every default written out, such as ``"sweeps {'forward': 2, ...}"``. Both are translated, and so are the keys. What is in
today's words already is left alone.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

#: keys of a run and of a comparison's setting
RUN_KEYS = {"side": "method", "method": "description", "probes": "alignment"}
SETTING_KEYS = {"mix": "depth_mix", "block_size": "context_length", "probe_every": "alignment_every"}
#: kinds of method; the second of each pair stands before a name's other options
KINDS = {"multigrid": ("v_cycles", ""), "tree+sweeps": ("sweeps", "init=tree"), "paper": ("tree", "")}
#: options of all kinds, and what those of one kind are called instead
OPTIONS = {
    "sweeps": "forward", "corrections": "backward", "chunk": "chunk_size", "secant_rank": "rank",
    "time_sweeps": "time_forward", "time_corrections": "time_backward", "time_chunk": "time_chunk_size",
    "mix": "depth_mix", "mix_weight": "depth_mix_weight", "graphs": "recompute",
    "default_paths": "paths", "readout_rank": "exit_rank", "readout_by": "exit_by", "readouts": "exit_by",
}  # fmt: skip
OPTIONS_OF_KIND = {"v_cycles": {"sweeps": "cycles"}, "tree": {"sweeps": "consistency"}}
#: values of options; what "secant" means depends on the axis
VALUES = {("recompute", "recomputed"): "true", ("recompute", "kept"): "false"}
VALUES_OVER = {
    "depth": {("linearization", "secant"): "low_rank"},
    "time": {("linearization", "secant"): "shared_matrix"},
}


def current_option(kind: str, key: str, value: Any, over: str) -> tuple[str, Any]:
    """An option of a kind of method, both in today's words."""
    key = OPTIONS_OF_KIND.get(kind, {}).get(key) or OPTIONS.get(key, key)
    return key, {**VALUES, **VALUES_OVER[over]}.get((key, value), value)


def current_name(name: str, over: str) -> str:
    """A method's name as it was asked for, options in the order in which they stood.

    Args:
        name: such as ``"sweeps:sweeps=2,corrections=3"``.
        over: ``"depth"`` or ``"time"``.
    """
    kind, colon, rest = name.partition(":")
    kind, first = KINDS.get(kind, (kind, ""))
    items = [first] if first else []
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        key, value = current_option(kind, key, value, over)
        items.append(f"{key}{equals}{value}")
    return kind + (":" if items else colon) + ",".join(items)


def describe(kind: str, options: Mapping[str, Any]) -> str:
    """A description: the kind, and its options by name."""
    return f"{kind} {dict(sorted(options.items()))}"


def current_description(description: str, over: str) -> str:
    """A description in today's words."""
    kind, _, options = description.partition(" ")
    kind, _ = KINDS.get(kind, (kind, ""))
    try:
        found = ast.literal_eval(re.sub(r"\binf\b", "1e999", options))
        return describe(kind, dict(current_option(kind, key, value, over) for key, value in found.items()))
    except (ValueError, SyntaxError, AttributeError):  # no description of ours: it is found by its own words alone
        return description


def current_run(run: Mapping[str, Any], over: str) -> dict[str, Any]:
    """A stored run."""
    if "side" in run:
        run = {RUN_KEYS.get(key, key): value for key, value in run.items()}
        run["method"] = current_name(run["method"], over)
        if "description" in run:
            run["description"] = current_description(run["description"], over)
    return {**run, "method": _with_numbers(run["method"], run.get("description", ""), over)}


def _with_numbers(name: str, description: str, over: str) -> str:
    """A method's name with the numbers that a bare "sweeps" over depth stood for before segments were its default."""
    kind, _, rest = name.partition(":")
    told = {item.partition("=")[0] for item in rest.split(",")}
    is_bare = kind == "sweeps" and over == "depth" and not told & {"forward", "backward", "chunk_size"}
    stood_for = all(part in description for part in ("'forward': 3", "'backward': 4")) and "'chunk_size'" not in description
    if not (is_bare and stood_for):
        return name
    return f"sweeps:forward=3,backward=4{',' if rest else ''}{rest}"


def current_setting(setting: Mapping[str, Any]) -> dict[str, Any]:
    """The setting of a comparison; also the parameters of a task, by which its data is identified, are named in it."""
    setting = {SETTING_KEYS.get(key, key): value for key, value in setting.items()}
    if isinstance(setting.get("text"), str):
        setting["text"] = setting["text"].replace("'block_size'", "'context_length'")
    return setting


def current_points(points: list[dict]) -> list[dict]:
    """Points of a benchmark over time, with the times of a step by method."""
    return [
        {k: v for k, v in point.items() if k != "sides"}
        | {"methods": {current_name(name, "time"): times for name, times in point["sides"].items()}}
        if "sides" in point else point
        for point in points
    ]  # fmt: skip
