"""How a run is taken up again: from which checkpoint, with which settings, and whether what it reads is still the same.

Text, tokenizer and preset are compared by what they hold, not by their names: they may have moved.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from hbll_seq.training.checkpoint import (
    EVERY_FILE,
    CheckpointError,
    TensorGroups,
    list_checkpoints,
    load_checkpoint,
    newest_sound,
)
from hbll_seq.training.option_values import PATHS, names_file
from hbll_seq.training.presets import SETTINGS, check_keys, preset_fingerprint, read_preset, resolve
from hbll_seq.training.run_record import CHECKPOINTS, finished_step
from hbll_seq.training.run_state import check_run_state
from hbll_seq.training.settings import FREE_ON_RESUME, LEFT_OPEN, TrainingSettings
from hbll_seq.utils import migration
from hbll_seq.utils.console import is_first_process, say
from hbll_seq.utils.reading import quote, shorten

NEWEST = -1  # of the checkpoints


class Resumed(NamedTuple):
    """A checkpoint that a run goes on from, by today's names.

    tensors: file -> tensor name -> tensor; read when asked for.
    state: its state.json; ``settings`` there are resolved, ``asked`` is what had been left open.
    """

    tensors: TensorGroups
    state: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the state, which has those of all files."""
        return hashlib.sha256(json.dumps(self.state, sort_keys=True).encode()).hexdigest()


def folder_of(given: dict[str, Any]) -> Path:
    """The run's folder that a command line names, or the default one. Raises ValueError for an impossible name."""
    # the other settings do not matter here; this one is checked and ``~`` expanded as any other
    named = {"output_dir": given["output_dir"]} if "output_dir" in given else {}
    return Path(TrainingSettings(max_steps=1, **named).output_dir)


def check_resumable(folder: Path, step: int = NEWEST) -> int:
    """The step of the checkpoint that ``step`` names. Raises ValueError where there is none."""
    checkpoints = folder / CHECKPOINTS
    steps = list_checkpoints(checkpoints)
    if not steps:
        raise ValueError(f"nothing to resume: {quote(str(checkpoints))} holds no checkpoint; name the run's folder by "
                         "--output-dir, or start anew without --resume")
    if step != NEWEST and step not in steps:
        shown = ", ".join(map(str, steps[:10])) + ", ..." * (len(steps) > 10)
        raise ValueError(f"resume={quote(step)}: {quote(str(checkpoints))} holds no such checkpoint, only those of the steps "
                         f"{shown}")
    return steps[-1] if step == NEWEST else step


def check_extend(steps: int, resume: int | None, overwrite: bool) -> None:
    """Raises ValueError where ``--extend`` cannot be what is meant."""
    if steps < 1:
        raise ValueError(f"extend={quote(steps)}: must be at least 1, the steps that are added")
    if overwrite or resume not in (None, NEWEST):
        other = "--overwrite" if overwrite else f"--resume {resume}"
        raise ValueError(f"--extend and {other} exclude each other: --extend goes on from the end of a finished run")


def check_extendable(folder: Path) -> None:
    """Raises ValueError unless ``folder`` holds a finished run and the checkpoint of its end."""
    end, where = finished_step(folder), f"output_dir={quote(str(folder))}"
    if end is None and not list_checkpoints(folder / CHECKPOINTS):
        raise ValueError(f"nothing to extend: {where} holds no run; name the folder of a finished run by --output-dir, or "
                         "train one there first, without --extend")
    newest = (list_checkpoints(folder / CHECKPOINTS) or [-1])[-1]
    if end is None:
        raise ValueError(f"{where} holds no finished run to extend, but one saved at step {newest}: go on with it by "
                         "--resume first")
    if newest > end:
        raise ValueError(f"{where}: the run was finished at step {end} and is being extended (saved at step {newest}): go on "
                         "with that by --resume first")
    if newest < end:
        raise ValueError(f"{where}: the checkpoint of the run's end, step {end}, is gone: train on from its model with "
                         "--init-from and another --output-dir")


def resume_run(
    given: dict[str, Any], preset: str | None, step: int = NEWEST, presets: Path | None = None,
    turn: tuple[int, int] = EVERY_FILE,
) -> tuple[TrainingSettings, str, Resumed]:  # fmt: skip
    """Settings (resolved), preset and checkpoint of the run in ``given["output_dir"]`` (default: runs/lm).

    Settings come from the checkpoint. ``given`` may repeat them; only those that no weight depends on may differ, and the
    names of the text and the tokenizer, whose content :func:`check_identity` compares.

    Args:
        given: settings of the command line.
        preset: preset of the command line, None when there was none.
        step: of the checkpoint; NEWEST takes the newest.
        presets: folder of the presets that have a name alone.
        turn: see :func:`hbll_seq.training.checkpoint.load_checkpoint`.

    Raises:
        ValueError: nothing to resume, or other settings than the checkpoint's.
        CheckpointError: the checkpoint is damaged.
    """
    folder = folder_of(given)
    checkpoints = folder / CHECKPOINTS
    step = check_resumable(folder, step)
    where = f"the checkpoint of step {step} in {quote(str(checkpoints))}"
    try:
        tensors, state = load_checkpoint(checkpoints, step, turn)
        check_run_state(state)
        state = {**state, **_stored_settings(state, where)}
        tensors = _by_todays_names(tensors, where)
    except CheckpointError as error:
        older = newest_sound(checkpoints, step)
        remedy = (f"the newest sound one is that of step {older}: go on from it with --resume {older}"
                  if older is not None else "there is no older sound one: start anew with --overwrite")
        raise CheckpointError(f"{error}; {remedy}") from None
    if preset is not None:
        _check_preset(preset, state, presets or Path(), where)
    settings = resolve(_kept_settings(state["settings"], given), given, {"output_dir": str(folder)}).resolved()
    _refuse_other_settings(dataclasses.asdict(settings), state["settings"], where, finished_step(folder) is not None)
    return settings, state["preset"], Resumed(tensors, state)


def _kept_settings(stored: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Those of a checkpoint that a run keeps where the command line does not name them: shares of ranks are those of their
    number."""
    is_other = given.get("block_parallel", stored["block_parallel"]) != stored["block_parallel"]
    return {**stored, "block_shares": None} if is_other else stored


def _stored_settings(state: dict[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """The checkpoint's ``settings``, resolved, and ``asked``, by today's names.

    Raises:
        CheckpointError: these, or the locations, cannot be used.
    """
    locations, asked = state.get("locations", {}), state.get("asked", {})
    if not isinstance(locations, dict) or not all(isinstance(path, str) for path in locations.values()):
        raise CheckpointError(f"{where} is damaged: its locations are {quote(locations)}")
    if not isinstance(asked, dict) or not asked.items() <= LEFT_OPEN.items():
        raise CheckpointError(f"{where} is damaged: what it says was asked for is {quote(asked)}")
    try:
        stored = migration.checkpoint_settings(state["settings"])
        check_keys(stored, "its settings")
        if missing := sorted(set(SETTINGS) - stored.keys() - migration.LATER_SETTINGS):
            raise ValueError(f"its settings lack {', '.join(missing[:4])}")
        resolved = dataclasses.asdict(resolve(stored).resolved())
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{where} cannot be used: {error}") from None
    return {"settings": resolved, "asked": asked}


def _by_todays_names(tensors: TensorGroups, where: str) -> TensorGroups:
    try:
        return migration.checkpoint_tensors(tensors)
    except ValueError as error:
        raise CheckpointError(f"{where} is damaged: {error}") from None


def _check_preset(preset: str, state: dict[str, Any], presets: Path, where: str) -> None:
    """A preset given again must say what it said: by its content, or its name where an older version stored no more."""
    known, remedy = state.get("preset_sha256"), "leave --preset out, or start a new run in another --output-dir"
    if known is None and preset != state["preset"]:
        raise ValueError(f"preset={quote(preset)} differs from {where}, which was made with preset {quote(state['preset'])}: "
                         f"{remedy}")
    if known is None:
        return
    values = read_preset(preset, presets)
    if known not in (preset_fingerprint(values), preset_fingerprint(migration.settings_of_0_1(values))):
        raise ValueError(f"preset={quote(preset)} does not say what preset {quote(state['preset'])} said when {where} was "
                         f"made: {remedy}")


def _refuse_other_settings(now: dict[str, Any], stored: dict[str, Any], where: str, finished: bool) -> None:
    fixed = [field.name for field in dataclasses.fields(TrainingSettings) if field.metadata["resume"] == "fixed"]
    names = [name for name in fixed if now[name] != stored[name]]
    if names:
        pairs = ", ".join(f"{name}={quote(now[name])} (there {quote(stored[name])})" for name in names)
        more = ""
        if set(names) <= {"max_steps", "epochs"} and (now["max_steps"] or 0) >= (stored["max_steps"] or 0):
            more = "more steps by --extend N, in place of --resume" + (", once the run is finished" if not finished else "")
        raise ValueError(f"other settings than {where}: {pairs}; leave them out, {more and more + ', '}or start a new run in "
                         f"another --output-dir. A resumed run may change {', '.join(sorted(FREE_ON_RESUME))}")


# ---------------------------------------------------------------------------------------------------- where things lie


def locations(settings: TrainingSettings) -> dict[str, str]:
    """Where the files that the settings name lie, for a resume from another folder: setting -> absolute path."""
    named = {name: getattr(settings, name) for name in PATHS if name != "output_dir"}
    return {name: os.path.abspath(value) for name, value in named.items() if names_file(name, value)}


def located(settings: TrainingSettings, given: dict[str, Any], resumed: Resumed) -> TrainingSettings:
    """The settings of a resumed run with the places where its files are now: for opening them, not for the record.

    A file that the command line does not name is looked for where it was, then from the current folder.
    Raises ValueError where the text or the tokenizer is in neither place.
    """
    found = {}
    for name, path in resumed.state.get("locations", {}).items():
        if name not in PATHS or name in given:
            continue
        if os.path.exists(path):
            found[name] = path
        elif name in ("data", "tokenizer") and not os.path.exists(getattr(settings, name)):
            raise ValueError(f"cannot resume: {name}={shorten(quote(path), 300)} is no longer there; if it was moved, give "
                             f"its new place by --{name}")
    return dataclasses.replace(settings, **found)


# ---------------------------------------------------------------------------------------------------- what is read


def check_identity(now: dict[str, Any], state: dict[str, Any]) -> None:
    """Compare what a run stores of itself in every checkpoint with a checkpoint's.

    Another type of device or number of threads is told on stderr: sums are then rounded differently.

    Raises:
        ValueError: the text, the tokenizer, the precision or the number of data-parallel replicas is another one.
    """
    _check_replicas(now, state)
    remedies = {
        "tokenizer": "give the same tokenizer file by --tokenizer",
        "data": "give the same text by --data",
        "validation": "give the same text by --data, its validation split included",
        "test": "give the same text by --data, its test split included",
        "precision": f"give --precision {shorten(state['precision'], 20)}",
    }
    for name, remedy in remedies.items():
        if now[name] != state.get(name, now[name]):
            raise ValueError(f"cannot resume: {name} is {_named(name, now)} and was {_named(name, state)} in the checkpoint "
                             f"of step {state['step']}; {remedy}, or start a new run in another --output-dir")
    for name in ("device", "threads", *(["num_processes"] if "num_processes" in state else [])):
        if now[name] != state[name] and is_first_process():
            say(f"warning: {name} is {now[name]!r} and was {quote(state[name])} in the checkpoint of step {state['step']}: "
                "the result is not bit for bit that of the unbroken run")


def _check_replicas(now: dict[str, Any], state: dict[str, Any]) -> None:
    """The processes of a launch may be more or fewer as long as the ranks of a model are so too: its replicas decide which
    windows a step takes, and whose states go on with which."""
    replicas, ranks = {}, {}
    for when, identity in (("now", now), ("then", state)):
        ranks[when] = identity["settings"].get("block_parallel", 1)
        replicas[when] = identity["num_processes"] // ranks[when]
    if replicas["now"] != replicas["then"]:
        spread = f" with --block-parallel {ranks['now']}" if ranks["now"] > 1 else ""
        raise ValueError(
            f"cannot resume: num_processes is {now['num_processes']} and was {state['num_processes']} in the checkpoint of "
            f"step {state['step']}, so that {replicas['now']} models are trained side by side, and were {replicas['then']}; "
            f"launch {replicas['then'] * ranks['now']} processes{spread}, since the order of the data depends on it, or "
            "start a new run in another --output-dir"
        )


def _named(name: str, identity: dict[str, Any]) -> str:
    """What an identity holds under ``name``; a fingerprint goes with the name of its file."""
    setting = "tokenizer" if name == "tokenizer" else "data"
    if name not in ("tokenizer", "data", "validation", "test"):
        return quote(identity[name])
    path = identity.get("locations", {}).get(setting) or identity["settings"].get(setting)
    shown = quote(path) if len(str(path)) <= 90 else quote("..." + str(path)[-87:])  # the end of a path tells most
    return f"{shown} ({shorten(identity[name], 12)})"
