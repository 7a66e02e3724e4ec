"""The folder of a run: what lies in it, when it may be written, and how a run is taken up again."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from hbll_seq.atomic import atomic_write
from hbll_seq.training.checkpoint import (
    CheckpointError,
    list_checkpoints,
    load_checkpoint,
    remove_checkpoints,
    sound_checkpoints,
)
from hbll_seq.training.json_lines import JsonLines
from hbll_seq.training.run_state import check_run_state
from hbll_seq.training.settings import FREE_ON_RESUME, TrainingSettings, as_meant, differences, resolve

SETTINGS, METRICS, EVALUATIONS, SUMMARY = "settings.yaml", "metrics.jsonl", "evaluations.jsonl", "metrics.json"
CURVE, BY_DEPTH, CHECKPOINTS = "training_curve.png", "perplexity_by_depth.png", "checkpoints"
_MARKS = (SETTINGS, METRICS, CHECKPOINTS, "model.safetensors")  # one of these tells that a folder holds a run
RESULTS = (SUMMARY, CURVE, BY_DEPTH, "model.safetensors", "config.json", "tokenizer.model")
NEWEST = -1


class Resumed(NamedTuple):
    """A checkpoint that a run goes on from: file -> tensor name -> tensor, and its state.json."""

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def check_folder(folder: Path, *, resuming: bool, overwrite: bool) -> None:
    """Look, without changing anything, whether a run may be written into ``folder``.

    Raises:
        ValueError: it holds a run already, or cannot be written.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ValueError(f"output_dir={str(folder)!r}: {nearest} is a file; choose another --output-dir")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"output_dir={str(folder)!r}: {nearest} is not writable; choose another --output-dir")
    if not resuming and not overwrite and any((folder / name).exists() for name in _MARKS):
        steps = list_checkpoints(folder / CHECKPOINTS)
        at = f" (saved at step {steps[-1]})" if steps else ""
        raise ValueError(f"output_dir={str(folder)!r} already holds a run{at}: go on with it by --resume, replace it "
                         "by --overwrite, or choose another --output-dir")


def prepare_folder(folder: Path, settings: TrainingSettings, resumed_step: int | None) -> None:
    """Make the folder ready: empty of an older run, or wound back to the step that is resumed from.

    What the winding back removes is said on stderr.

    Raises:
        ValueError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints = folder / CHECKPOINTS
        if resumed_step is not None and (removed := _later(folder, resumed_step)):
            print(f"to go on from step {resumed_step}, removed from {folder}: {', '.join(removed)}", file=sys.stderr)
        for name in RESULTS:  # without metrics.json the run does not count as finished
            (folder / name).unlink(missing_ok=True)
        if resumed_step is None:
            for name in (METRICS, EVALUATIONS):
                (folder / name).unlink(missing_ok=True)
            if checkpoints.exists():
                shutil.rmtree(checkpoints)
        else:
            for name in (METRICS, EVALUATIONS):
                JsonLines(folder / name).rewind(resumed_step)
            remove_checkpoints(checkpoints, [step for step in list_checkpoints(checkpoints) if step > resumed_step])
        atomic_write(folder / SETTINGS, settings.to_yaml())
    except OSError as error:
        remedy = "choose another --output-dir"
        raise ValueError(f"output_dir={str(folder)!r} cannot be written ({error}); {remedy}") from None


def _later(folder: Path, step: int) -> list[str]:
    """What a run that goes on from ``step`` writes anew, in words."""
    found = []
    steps = [str(later) for later in list_checkpoints(folder / CHECKPOINTS) if later > step]
    if steps:
        found.append(f"the checkpoints of steps {', '.join(steps)}")
    for name in (METRICS, EVALUATIONS):
        if count := sum(row["step"] > step for row in JsonLines(folder / name).rows()):
            found.append(f"{count} line{'s' * (count > 1)} of {name}")
    return found + [name for name in RESULTS if (folder / name).exists()]


def resume_run(
    given: dict[str, Any], preset: str | None, step: int = NEWEST
) -> tuple[TrainingSettings, str, Resumed]:
    """Settings, preset and checkpoint of the run in ``given["output_dir"]`` (default: runs/lm).

    Settings come from the checkpoint. ``given`` may repeat them; only those that no weight depends on may differ.

    Args:
        given: settings of the command line.
        preset: preset of the command line, None when there was none.
        step: of the checkpoint; NEWEST takes the newest.

    Raises:
        ValueError: nothing to resume, or other settings than the checkpoint's.
        CheckpointError: the checkpoint is damaged.
    """
    default = next(f.default for f in dataclasses.fields(TrainingSettings) if f.name == "output_dir")
    folder = Path(given.get("output_dir", default))
    checkpoints = folder / CHECKPOINTS
    steps = list_checkpoints(checkpoints)
    if not steps:
        raise ValueError(f"nothing to resume: {checkpoints} holds no checkpoint; name the run's folder by "
                         "--output-dir, or start anew without --resume")
    if step != NEWEST and step not in steps:
        raise ValueError(f"resume={step}: {checkpoints} holds no such checkpoint, only those of the steps "
                         f"{', '.join(map(str, steps))}")
    step = steps[-1] if step == NEWEST else step
    try:
        tensors, state = load_checkpoint(checkpoints, step)
        check_run_state(state)
    except CheckpointError as error:
        older = [s for s in sound_checkpoints(checkpoints) if s < step]
        remedy = (f"the newest sound one is that of step {older[-1]}: go on from it with --resume {older[-1]}"
                  if older else "there is no older sound one: start anew with --overwrite")
        raise CheckpointError(f"{error}; {remedy}") from None
    where = f"the checkpoint of step {step} in {checkpoints}"
    stored = as_meant(state["settings"])
    if preset is not None and preset != state["preset"]:
        raise ValueError(f"preset={preset!r} differs from {where}, which was made with preset {state['preset']!r}: "
                         "leave --preset out, or start a new run in another --output-dir")
    settings = resolve(stored, given, {"output_dir": str(folder)})
    _refuse_other_settings(dataclasses.asdict(settings), stored, where)
    return settings, state["preset"], Resumed(tensors, state)


def _refuse_other_settings(now: dict[str, Any], stored: dict[str, Any], where: str) -> None:
    names = differences(now, stored)
    if names:
        pairs = ", ".join(f"{name}={now.get(name)!r} (there {stored.get(name)!r})" for name in names)
        raise ValueError(f"other settings than {where}: {pairs}; leave them out, or start a new run in another "
                         f"--output-dir. A resumed run may change {', '.join(sorted(FREE_ON_RESUME))}")


def check_identity(now: dict[str, Any], state: dict[str, Any]) -> None:
    """Compare what a run stores of itself in every checkpoint with a checkpoint's.

    Another type of device or number of threads is told on stderr: sums are then rounded differently.

    Raises:
        ValueError: the text, the tokenizer, the precision or the number of processes is another one.
    """
    remedies = {
        "num_processes": "launch as many, since the order of the data depends on it",
        "tokenizer": "give the same tokenizer file",
        "data": "give the same text",
        "precision": f"give --precision {state['precision']}",
    }
    for name, remedy in remedies.items():
        if now[name] != state[name]:
            raise ValueError(f"cannot resume: {name} is {now[name]!r} and was {state[name]!r} in the checkpoint of "
                             f"step {state['step']}; {remedy}, or start a new run in another --output-dir")
    for name in ("device", "threads"):
        if now[name] != state[name] and os.environ.get("RANK", "0") == "0":  # of several processes one speaks
            print(f"warning: {name} is {now[name]!r} and was {state[name]!r} in the checkpoint of step {state['step']}: "
                  "the result is not bit for bit that of the unbroken run", file=sys.stderr)
