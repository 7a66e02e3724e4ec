"""Which files of a folder a run has written: nothing else is ever removed or overwritten.

``run.json`` marks a folder as a run's and names the results with their sizes and SHA-256. Folders of older versions have
none; they are known by their settings.yaml, and each of their results by what it holds.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hbll_seq.models.config import HBLLConfig
from hbll_seq.models.model_files import CARD_NAME, CONFIG_NAME, PATHS_NAME, TOKENIZER_NAME, WEIGHTS_NAME
from hbll_seq.models.model_files import CHECKPOINTS_NAME as CHECKPOINTS
from hbll_seq.models.model_files import METRICS_NAME as SUMMARY
from hbll_seq.models.model_files import RECORD_NAME as RECORD
from hbll_seq.models.path_table import SPLITS
from hbll_seq.training.checkpoint import STATE, checkpoint_path, in_the_way, list_checkpoints
from hbll_seq.training.json_lines import JsonLines
from hbll_seq.utils.atomic import atomic_write
from hbll_seq.utils.integrity import SUMS_NAME, digest, read_sums, sha256
from hbll_seq.utils.reading import read_bytes, read_json, read_yaml, to_json
from hbll_seq.utils.values import number_or_none

SETTINGS, METRICS, EVALUATIONS = "settings.yaml", "metrics.jsonl", "evaluations.jsonl"
CURVE, BY_DEPTH, TRADEOFF, TREE = "training_curve.png", "perplexity_by_depth.png", "tradeoff.png", "tree.png"
PICTURES = (CURVE, BY_DEPTH, TRADEOFF, TREE)
#: what the export writes, in the order in which it is removed: without metrics.json a run does not count as finished
RESULTS = (SUMMARY, *PICTURES, WEIGHTS_NAME, CONFIG_NAME, TOKENIZER_NAME, PATHS_NAME, SUMS_NAME)
_COMPLETE = (SUMMARY, WEIGHTS_NAME, CONFIG_NAME, TOKENIZER_NAME)
_WHAT = "a folder of a run of hbll_seq"
_OF_OLDER_RUNS = {"data", "tokenizer", "n_level", "n_embd", "max_steps", "lr", "seed", "output_dir"}  # in settings.yaml


@dataclass
class RunRecord:
    """What a folder is known to hold of a run.

    Attributes:
        files: result -> {"bytes": .., "sha256": ..}.
        exporting: an export has begun and its sums are not recorded yet.
        older: made up for a folder of an older version, which has no record.
    """

    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    exporting: bool = False
    older: bool = False

    def write(self, folder: Path) -> None:
        """Make it the folder's record. Raises OSError when that cannot be written."""
        values = {"what": _WHAT, "format": 1, "exporting": self.exporting, "files": self.files}
        atomic_write(folder / RECORD, to_json(values, indent=1) + "\n")

    def owns(self, folder: Path, name: str) -> bool:
        """Whether the result ``name``, which exists in ``folder``, was written by the run."""
        if not _is_regular(folder / name):  # what looks into files would wait for a pipe
            return False
        try:
            expected = self.files.get(name)
            if expected is not None and digest(folder / name) == expected:
                return True
            return (self.exporting or self.older) and _looks_written(folder, name)
        except (OSError, ValueError, SafetensorError):
            return False


def read_record(folder: Path) -> RunRecord | None:
    """The record of a run's folder, one made up where an older version wrote the folder, None where no run did.

    Raises:
        OSError: the record cannot be read.
    """
    if os.path.lexists(folder / RECORD):
        try:
            values = read_json(folder / RECORD)
            files, exporting = values["files"], values["exporting"]
        except (ValueError, KeyError, TypeError):
            return None
        sound = values.get("what") == _WHAT and isinstance(files, dict) and isinstance(exporting, bool)
        return RunRecord(files, exporting) if sound else None
    ran = list_checkpoints(folder / CHECKPOINTS) or _is_regular(folder / METRICS)
    ours = _settings_are_ours(folder) if os.path.lexists(folder / SETTINGS) else any(_states(folder))
    return RunRecord(older=True) if ours and ran else None


def _settings_are_ours(folder: Path) -> bool:
    try:
        settings = read_yaml(folder / SETTINGS)
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and settings.keys() >= _OF_OLDER_RUNS


def foreign_files(folder: Path, record: RunRecord | None) -> list[str]:
    """Names in ``folder`` that a run would remove or write over and that no run is known to have written."""
    found = [name for name in RESULTS if os.path.lexists(folder / name) and not (record and record.owns(folder, name))]
    kept = (RECORD, SETTINGS, METRICS, EVALUATIONS)
    if record is None:
        found += [name for name in kept if os.path.lexists(folder / name)]
        found += [f"{CHECKPOINTS}/{checkpoint_path(folder, step).name}" for step in list_checkpoints(folder / CHECKPOINTS)]
    else:
        found += [name for name in kept if os.path.lexists(folder / name) and not _is_regular(folder / name)]
    if os.path.lexists(folder / CHECKPOINTS) and not (folder / CHECKPOINTS).is_dir():
        found.append(CHECKPOINTS)
    return found + [f"{CHECKPOINTS}/{name}" for name in in_the_way(folder / CHECKPOINTS)]


def is_untouched(folder: Path) -> bool:
    """Whether a run that owns the folder has left nothing there yet: it was killed before its first checkpoint."""
    return not (list_checkpoints(folder / CHECKPOINTS)
                or any(os.path.lexists(folder / name) for name in RESULTS)
                or os.path.lexists(folder / METRICS) and os.path.getsize(folder / METRICS))


def is_finished(folder: Path) -> bool:
    """Whether the folder holds the whole result of a run: a valid metrics.json and a model folder that is as it was saved."""
    record = read_record(folder)
    if record is None or not summary_is_valid(folder):
        return False
    return all(os.path.lexists(folder / name) and record.owns(folder, name) for name in _COMPLETE)


def finished_step(folder: Path) -> int | None:
    """The step at which the run in ``folder`` was finished; None where :func:`is_finished` says that it is not.

    While a finished run is extended, its results stay: its newest checkpoint is then of a later step.
    """
    return summary_step(folder) if is_finished(folder) else None


def summary_step(folder: Path) -> int | None:
    """The step that metrics.json tells, None where there is none."""
    step = read_json(folder / SUMMARY)["step"] if summary_is_valid(folder) else None
    return step if type(step) is int else None


def summary_is_valid(folder: Path) -> bool:
    """Whether metrics.json is a document that a finished run writes."""
    try:
        values = read_json(folder / SUMMARY)
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.keys() >= {"step", "settings", "n_parameters"}


def lines_of(folder: Path, name: str, flush_seconds: float = 0.0) -> JsonLines:
    """The lines of METRICS or EVALUATIONS; what no run can have written there counts as damaged."""
    return JsonLines(folder / name, flush_seconds, {METRICS: _is_step, EVALUATIONS: _is_evaluation}[name])


def _is_step(row: dict[str, Any]) -> bool:
    return all(_is_figure(row.get(name)) for name in ("loss", "ce", "lr"))  # what is drawn and summed up


def _is_evaluation(row: dict[str, Any]) -> bool:
    tables = [row.get("validation"), *([row["test"]] if "test" in row else [])]
    are_tables = all(isinstance(rows, list) and all(map(_is_of_path, rows)) for rows in tables)
    return are_tables and isinstance(row.get("samples"), list)


def _is_of_path(row: Any) -> bool:
    """Whether it can be a row of ``evaluate_paths``."""
    return (isinstance(row, dict) and isinstance(row.get("name"), str) and type(row.get("depth")) is int
            and all(name in row and _is_figure(row[name]) for name in ("loss", "perplexity")))


def _is_figure(value: Any) -> bool:
    return value is None or number_or_none(value) is not None  # null: it was not finite


def _looks_written(folder: Path, name: str) -> bool:
    """Whether a result without a recorded sum is of the kind that this run's export writes."""
    path = folder / name
    if name == SUMMARY:
        return summary_is_valid(folder)
    if name in PICTURES:
        return b"Matplotlib" in read_bytes(path)[:1024]
    if name == CONFIG_NAME:
        values = read_json(path)
        return isinstance(values, dict) and values.get("model_type") == HBLLConfig.model_type
    if name == WEIGHTS_NAME:
        with safe_open(path, framework="pt") as file:
            return any(key.startswith("blocks.") for key in file.keys())
    if name == TOKENIZER_NAME:
        fingerprints = [state.get("tokenizer") for state in _states(folder)]  # SHA-256 of the file
        return sha256(path) in fingerprints or summary_is_valid(folder) and _looks_written(folder, CONFIG_NAME)
    if name == PATHS_NAME:
        values = read_json(path)
        return isinstance(values, dict) and set(values) <= set(SPLITS)
    return set(read_sums(path)) <= {*RESULTS, CARD_NAME}


def _states(folder: Path) -> Iterator[dict[str, Any]]:
    """What the checkpoints hold beside their tensors, as far as it can be read."""
    for step in list_checkpoints(folder / CHECKPOINTS):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            state = read_json(checkpoint_path(folder / CHECKPOINTS, step) / STATE)
            if state.get("settings", {}).keys() >= _OF_OLDER_RUNS:
                yield state


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False
