"""The folder of a run: when it may be written, how it is made ready, and how the results come into it."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from hbll_seq.models.model_files import CARD_NAME, REPLACED
from hbll_seq.training.checkpoint import list_checkpoints, remove_checkpoints
from hbll_seq.training.failures import cannot_write
from hbll_seq.training.option_values import names_file
from hbll_seq.training.run_record import (
    CHECKPOINTS,
    EVALUATIONS,
    METRICS,
    RECORD,
    RESULTS,
    SETTINGS,
    SUMMARY,
    RunRecord,
    foreign_files,
    is_finished,
    is_untouched,
    lines_of,
    read_record,
    summary_is_valid,
    summary_step,
)
from hbll_seq.training.settings import TrainingSettings
from hbll_seq.utils.atomic import atomic_write, roll_back, sweep
from hbll_seq.utils.console import say
from hbll_seq.utils.integrity import digest
from hbll_seq.utils.reading import quote


def check_place(folder: Path) -> None:
    """Raises ValueError where ``folder`` cannot be a folder that is written to; changes nothing."""
    where = f"output_dir={quote(str(folder))}"
    try:
        str(folder).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{where} is not UTF-8: safetensors reads no file below such a name; choose another "
                         "--output-dir") from None
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not nearest.is_dir():
        kind = "a file" if nearest.exists() else "a link to nothing"
        raise ValueError(f"{where}: {quote(str(nearest))} is {kind}; choose another --output-dir")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"{where}: {quote(str(nearest))} is not writable; choose another --output-dir")


def check_folder(folder: Path, settings: TrainingSettings, *, resuming: bool, overwrite: bool) -> None:
    """Look, without changing anything, whether a run may be written into ``folder``.

    Raises:
        ValueError: it holds a run already, or files that no run has written and that this one would replace; or the run's
            text or tokenizer lies among what it would replace.
    """
    where = f"output_dir={quote(str(folder))}"
    try:
        record = read_record(folder)
        taken = record is not None and not is_untouched(folder)
        if taken and not resuming and not overwrite:
            if is_finished(folder):
                raise ValueError(f"{where} holds a finished run: train it for more steps by --extend N, choose another "
                                 "--output-dir, or replace it by --overwrite")
            steps = list_checkpoints(folder / CHECKPOINTS)
            at = f" (saved at step {steps[-1]})" if steps else ""
            raise ValueError(f"{where} already holds a run{at}: go on with it by --resume, replace it by --overwrite, or "
                             "choose another --output-dir")
        _refuse_foreign_files(folder, record)
    except OSError as error:
        raise cannot_write(folder, error, resuming) from None
    _check_inputs(folder, settings)
    if taken and record.older:
        say(f"{folder} was written by an older version: its run has no {RECORD}, its files are told by what they hold")


def _refuse_foreign_files(folder: Path, record: RunRecord | None) -> None:
    names = foreign_files(folder, record)
    if record is not None and SUMMARY in names and not summary_is_valid(folder) and (folder / SUMMARY).is_file():
        names.remove(SUMMARY)  # the wreck of one: kept beside the new one
    if not names:
        return
    shown = ", ".join(map(quote, names[:6])) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    where = f"output_dir={quote(str(folder))}"
    if RECORD in names:
        raise ValueError(f"{where} has a {RECORD} that is no record of a run, or a damaged one. Nothing was changed; move it "
                         "away and give the same command again: what belongs to a run is then told by what it holds")
    if record is None:
        raise ValueError(f"{where} is not the folder of a run, and a run would write over what it holds: {shown}. Nothing "
                         "was changed; move that away, or choose another --output-dir")
    raise ValueError(f"{where} holds what its run has not written, or what was changed since: {shown}. Nothing was changed; "
                     "move that away and give the same command again, or choose another --output-dir")


def _check_inputs(folder: Path, settings: TrainingSettings) -> None:
    """The text and the tokenizer must outlive the run's start, and its own files must not become its text."""
    for name in ("data", "tokenizer"):
        value = getattr(settings, name)
        for result in (*RESULTS, METRICS, EVALUATIONS, SETTINGS):
            if names_file(name, value) and os.path.exists(folder / result) and os.path.samefile(value, folder / result):
                raise ValueError(f"{name}={quote(value)} is a file that this run replaces: copy it to another folder and "
                                 "give its new name, or choose another --output-dir")
    text, own = Path(os.path.realpath(settings.data)), Path(os.path.realpath(folder))
    if not names_file("data", settings.data) or not text.is_dir() or not own.is_relative_to(text):
        return
    if not any(part.startswith(".") for part in own.relative_to(text).parts):  # hidden folders are not read
        raise ValueError(f"output_dir={quote(str(folder))} lies in the folder of the text, data={quote(settings.data)}: the "
                         "run's own files would be read as text; choose an --output-dir outside of it")


def prepare_folder(folder: Path, settings: str, resumed_step: int | None, *, extending: bool = False) -> None:
    """Make the folder ready: empty of an older run, or wound back to the step that is resumed from.

    What the winding back removes is said on stderr. Wherever this is broken off, the folder holds the run before it with
    fewer checkpoints, or none.

    Args:
        folder: of the run.
        settings: text of settings.yaml.
        resumed_step: of the checkpoint that is resumed from; None starts anew.
        extending: the results of the finished run, up to that step, stay until the new end.

    Raises:
        ValueError: it cannot be written, or holds files that no run has written.
        RunFailed: the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        record = read_record(folder)
        _refuse_foreign_files(folder, record)
        _set_damaged_summary_aside(folder)
        keep_results = extending and resumed_step is not None and (summary_step(folder) or 0) <= resumed_step
        if resumed_step is not None and (removed := _later(folder, resumed_step, keep_results)):
            say(f"to go on from step {resumed_step}, removed from {folder}: {', '.join(removed)}")
        roll_back(folder, REPLACED, keep=(CARD_NAME,))  # after an export that was killed, or its files would come back
        for name in () if keep_results else RESULTS:
            (folder / name).unlink(missing_ok=True)
        checkpoints = folder / CHECKPOINTS
        keep = -1 if resumed_step is None else resumed_step
        # the newest first, and their lines after them: what is left always has the lines of all its steps
        remove_checkpoints(checkpoints, [step for step in reversed(list_checkpoints(checkpoints)) if step > keep])
        for name in (METRICS, EVALUATIONS):
            if resumed_step is None:
                (folder / name).unlink(missing_ok=True)
            else:
                lines_of(folder, name).rewind(resumed_step)
        RunRecord(_digests(folder)).write(folder)
        atomic_write(folder / SETTINGS, settings)
        sweep(folder)
    except OSError as error:
        raise cannot_write(folder, error, resuming=resumed_step is not None) from None


def _digests(folder: Path) -> dict[str, dict]:
    return {name: digest(folder / name) for name in RESULTS if os.path.lexists(folder / name)}


def _later(folder: Path, step: int, keep_results: bool) -> list[str]:
    """What a run that goes on from ``step`` writes anew, in words."""
    found = []
    steps = [str(later) for later in list_checkpoints(folder / CHECKPOINTS) if later > step]
    if steps:
        found.append(f"the checkpoints of steps {', '.join(steps)}")
    for name in (METRICS, EVALUATIONS):
        if count := sum(row["step"] > step for row in lines_of(folder, name).rows()):
            found.append(f"{count} line{'s' * (count > 1)} of {name}")
    return found + [name for name in RESULTS if not keep_results and (folder / name).exists()]


def _set_damaged_summary_aside(folder: Path) -> None:
    if not os.path.lexists(folder / SUMMARY) or summary_is_valid(folder):
        return
    number = next(n for n in range(1, 10_000) if not os.path.lexists(folder / f"{SUMMARY}.damaged-{n}"))
    os.rename(folder / SUMMARY, folder / f"{SUMMARY}.damaged-{number}")
    say(f"{folder / SUMMARY} is damaged: kept as {SUMMARY}.damaged-{number}, and written anew")


@contextlib.contextmanager
def exporting(folder: Path) -> Iterator[Callable[[str], None]]:
    """For the export: inside the block the results are written, the last by the function that it yields.

    That function takes the text of metrics.json, which makes the run a finished one, and writes it after the sums of all
    results are on record.

    Raises:
        ValueError: the folder holds results that no run has written; nothing was changed.
        OSError: it cannot be written.
    """
    record = read_record(folder) or RunRecord()
    _refuse_foreign_files(folder, record)
    RunRecord(record.files, exporting=True).write(folder)

    def finish(summary: str) -> None:
        files = _digests(folder)
        data = summary.encode("utf-8")
        files[SUMMARY] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        RunRecord(files).write(folder)
        atomic_write(folder / SUMMARY, data)

    yield finish
