"""Checkpoints that survive a crash at any instant.

A checkpoint is a folder ``step-00000100`` of safetensors files and one ``state.json``, which lists the size and SHA-256
of the others; ``SHA256SUMS`` holds the sums of all of them, so that no byte can change unseen. It is written under a hidden
name, flushed to the disk and then renamed: a folder with a checkpoint's name is complete, or was damaged afterwards, which
the sums tell. Nothing is pickled.

One process writes all of it (:func:`save_checkpoint`). Where ranks hold a model's blocks each writes its own files, between
:func:`start` and :func:`finish` of the first one; who reads them sees no difference.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from hbll_seq.training.checkpoint_parts import ENDING, by_group, file_name, is_checked_by
from hbll_seq.utils.atomic import ASIDE, atomic_write, fsync
from hbll_seq.utils.console import is_first_process, say
from hbll_seq.utils.integrity import SUMS_NAME, digest, read_sums, sha256
from hbll_seq.utils.reading import check_regular, parse_json, quote, read_bytes, shorten
from hbll_seq.utils.stored_tensors import StoredTensors
from hbll_seq.utils.tensors import first_not_finite

FORMAT = 2
_WITHOUT_SUMS = 1  # the format of older checkpoints, in which nothing covers state.json
_NAME = re.compile(r"step-([0-9]{8,18})")
_HALF_DONE = re.compile(re.escape(ASIDE) + r"(old-)?[0-9]{1,18}")  # being written, or being removed
_FILE_NAME = re.compile(r"[A-Za-z0-9_]{1,64}\.safetensors")
STATE = "state.json"
_MAX_STATE = 1 << 26  # bytes of state.json; each process adds about 40,000 of its random generators
#: the turn of one process that checks all files
EVERY_FILE = (0, 1)
TensorGroups = dict[str, Mapping[str, Tensor]]


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or does not fit; the message names it and the remedy."""


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"checkpoint {path} is damaged: {what}")


# ---------------------------------------------------------------------------------------------------- save


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies in ``folder``."""
    return Path(folder) / f"step-{step:08d}"


def list_checkpoints(folder: str | os.PathLike) -> list[int]:
    """Steps of the checkpoints in ``folder``, oldest first; whether they are sound is not looked at."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    steps = (int(match[1]) for entry in folder.iterdir() if (match := _NAME.fullmatch(entry.name)))
    return sorted({step for step in steps if checkpoint_path(folder, step).is_dir()})


def in_the_way(folder: str | os.PathLike) -> list[str]:
    """Names in ``folder`` that a checkpoint may take and that are no folder: files, pipes, links that lead nowhere."""
    folder = Path(folder)
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted(entry.name for entry in entries if _NAME.fullmatch(entry.name) and not entry.is_dir())


def save_checkpoint(
    folder: str | os.PathLike, step: int, groups: TensorGroups, state: dict[str, Any], keep: int = 2
) -> Path:
    """Write the checkpoint of ``step`` atomically, then remove all but the newest ``keep``.

    Args:
        folder: holds the checkpoints; created when missing.
        step: optimizer steps done.
        groups: file name (without ending) -> tensor name -> tensor of any shape; no two tensors share memory.
        state: JSON values to store beside them.
        keep: how many checkpoints remain, at least 1.

    Raises:
        ValueError: a tensor or the state holds NaN or infinity; nothing is written.
        OSError: folder not writable, disk full, or a checkpoint of ``step`` exists; nothing is left behind and older
            checkpoints are untouched.
    """
    refuse_not_finite(step, groups)
    aside = start(Path(folder), step)
    with gone_on_error(aside):
        return finish(aside, step, write_groups(aside, groups), state, keep)


def refuse_not_finite(step: int, groups: TensorGroups) -> None:
    """Raises ValueError where a tensor holds NaN or infinity."""
    for group, tensors in groups.items():
        bad = first_not_finite(tensors)
        if bad:
            raise ValueError(f"refusing to save step {step}: {group} tensor {bad!r} holds NaN or infinity")


def aside_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is written before it is one."""
    return folder / f"{ASIDE}{step}"


def start(folder: Path, step: int) -> Path:
    """Make the empty :func:`aside_path`, after what killed runs left is swept away. Raises OSError as
    :func:`save_checkpoint`."""
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    final, aside = checkpoint_path(folder, step), aside_path(folder, step)
    if final.exists():
        raise FileExistsError(f"{final} exists already")
    aside.mkdir()
    return aside


@contextlib.contextmanager
def gone_on_error(aside: Path) -> Iterator[None]:
    """Whatever is raised inside, nothing is left of ``aside``."""
    try:
        yield
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def write_groups(aside: Path, groups: TensorGroups, part: int = 1, n_parts: int = 1) -> dict[str, dict[str, Any]]:
    """Write the groups, or one part of each, into ``aside`` and flush them.

    Returns:
        What state.json lists of each file: its ``bytes``, ``sha256`` and number of ``tensors``.

    Raises:
        OSError: a file cannot be written.
    """
    files = {}
    for group, tensors in groups.items():
        file = aside / file_name(group, part, n_parts)
        cpu = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
        try:
            save_file(cpu, file)
        except SafetensorError as error:  # how safetensors reports a full disk
            number = re.search(r"os error ([0-9]{1,4})", str(error))
            raise OSError(int(number[1]) if number else errno.EIO, str(error), str(file)) from None
        file.chmod(aside.stat().st_mode & 0o666)  # safetensors makes private files; the folder has the umask
        fsync(file)
        files[file.name] = {**digest(file), "tensors": len(cpu)}
    return files


def finish(aside: Path, step: int, files: dict[str, dict[str, Any]], state: dict[str, Any], keep: int) -> Path:
    """Make ``aside`` the checkpoint of ``step``, then remove all but the newest ``keep``.

    Args:
        files: what :func:`write_groups` gave, of all that ``aside`` holds.

    Raises:
        ValueError, OSError: as :func:`save_checkpoint`.
    """
    folder, final = aside.parent, checkpoint_path(aside.parent, step)
    document = {"format": FORMAT, "step": step, "files": files, **state}
    atomic_write(aside / STATE, json.dumps(document, indent=1, allow_nan=False) + "\n")
    sums = {**{name: entry["sha256"] for name, entry in files.items()}, STATE: sha256(aside / STATE)}
    atomic_write(aside / SUMS_NAME, "".join(f"{value}  {name}\n" for name, value in sorted(sums.items())))
    os.replace(aside, final)
    fsync(folder)
    try:
        remove_checkpoints(folder, list_checkpoints(folder)[:-keep])
    except OSError as error:  # the new one is safe: what is too much takes room and nothing else
        say(f"warning: older checkpoints in {folder} could not be removed: {shorten(error)}")
    return final


def remove_checkpoints(folder: str | os.PathLike, steps: Iterable[int]) -> None:
    """Delete checkpoints; each is renamed first, so that no half-deleted folder bears a checkpoint's name.

    Raises:
        OSError: one cannot be renamed; it is whole.
    """
    folder = Path(folder)
    for step in steps:
        os.replace(checkpoint_path(folder, step), folder / f"{ASIDE}old-{step}")
    sweep(folder)


def sweep(folder: str | os.PathLike) -> None:
    """Remove the checkpoints that a run that was killed left half written or half deleted; what cannot be removed stays.

    Only for the owner of a run's folder: another process may be writing there.
    """
    with contextlib.suppress(OSError):
        for entry in list(Path(folder).iterdir()):
            if _HALF_DONE.fullmatch(entry.name):
                shutil.rmtree(entry, ignore_errors=True)  # not through a link


# ---------------------------------------------------------------------------------------------------- load


def load_checkpoint(
    folder: str | os.PathLike, step: int, turn: tuple[int, int] = EVERY_FILE
) -> tuple[TensorGroups, dict[str, Any]]:
    """Tensors and state of the checkpoint of ``step``, after checking every byte of it, or of this process's turn.

    The tensors stay in their files: each is read, on the CPU, when it is asked for (:class:`StoredTensors`). Parts of a group
    are one mapping.

    A checkpoint of an older version, whose state.json no sum covers, is read too, and that is said on stderr.

    Args:
        turn: number of this process and how many check the files between them (:func:`is_checked_by`). No tensor may be used
            before all have come through.

    Raises:
        CheckpointError: a file or part is missing, was cut or changed, is no regular file, or holds NaN; two parts hold a
            tensor of one name; state.json names files outside the folder, another step or an unknown format. The message
            names the file.
    """
    groups, state = _load(checkpoint_path(Path(folder), step), step, turn)
    if state["format"] == _WITHOUT_SUMS and is_first_process():
        say(f"the checkpoint of step {step} in {folder} was made by an older version: no sum covers its state.json")
    return groups, state


def _load(path: Path, step: int, turn: tuple[int, int] = EVERY_FILE) -> tuple[TensorGroups, dict[str, Any]]:
    state = _read_state(path, step)
    files: dict[str, StoredTensors] = {}
    for name, expected in state["files"].items():
        is_mine = is_checked_by(name, *turn)
        try:
            _check_file(path / name, expected, every_byte=is_mine)
            tensors = StoredTensors(path / name)
            bad = first_not_finite(tensors) if is_mine else None  # reads all of them, one by one
        except CheckpointError as error:
            raise _damaged(path, f"{name} {error}") from None
        except (OSError, SafetensorError, ValueError, RuntimeError, KeyError) as error:  # the last two: odd tensor types
            raise _damaged(path, f"{name} cannot be read ({shorten(error)})") from None
        if bad:
            raise _damaged(path, f"{name} holds NaN or infinity in {quote(bad)}")
        if len(tensors) != expected.get("tensors", len(tensors)):
            raise _damaged(path, f"{name} holds {len(tensors)} tensors instead of {expected['tensors']}")
        files[name] = tensors
    try:
        return by_group(files), state
    except ValueError as error:
        raise _damaged(path, str(error)) from None


def _check_file(file: Path, expected: dict[str, Any], *, every_byte: bool) -> None:
    """Raises CheckpointError or OSError unless the file is there itself, as long as it should be, and unchanged."""
    info = os.lstat(file)
    if stat.S_ISLNK(info.st_mode):
        raise CheckpointError("is a link; a checkpoint holds its files itself: copy the file there")
    check_regular(info, file)
    if info.st_size != expected["bytes"]:
        raise CheckpointError(f"has {info.st_size} bytes instead of {expected['bytes']}")
    if every_byte and sha256(file) != expected["sha256"]:
        raise CheckpointError("was changed after it was saved")


def _read_state(path: Path, step: int) -> dict[str, Any]:
    """The state.json of a checkpoint, whose sum, format, step and list of files are right."""
    text = _read(path, STATE, lambda file: read_bytes(file, _MAX_STATE))
    sums = _read(path, SUMS_NAME, read_sums) if os.path.lexists(path / SUMS_NAME) else None
    if sums is not None and sums.get(STATE) != hashlib.sha256(text).hexdigest():
        raise _damaged(path, f"{STATE} was changed after it was saved")
    try:
        state = parse_json(text)
    except ValueError as error:
        raise _damaged(path, f"{STATE} cannot be read ({error})") from None
    version = state.get("format") if isinstance(state, dict) else None
    if type(version) is not int or not isinstance(state.get("files"), dict):
        raise _damaged(path, f"{STATE} names no format, or no files")
    if version not in (FORMAT, _WITHOUT_SUMS):
        raise CheckpointError(f"checkpoint {path} has format {quote(version)}; this version of hbll_seq reads "
                              f"{_WITHOUT_SUMS} and {FORMAT}")
    if sums is None and version != _WITHOUT_SUMS:
        raise _damaged(path, f"{SUMS_NAME} is missing")
    if type(state.get("step")) is not int or state["step"] != step:
        raise _damaged(path, f"{STATE} is that of step {quote(state.get('step'))}")
    _check_list(path, state["files"])
    if sums is not None and sums != {STATE: sums[STATE], **{n: entry["sha256"] for n, entry in state["files"].items()}}:
        raise _damaged(path, f"{SUMS_NAME} and {STATE} list different files or sums")
    return state


def _read(path: Path, name: str, read: Callable[[Path], Any]) -> Any:
    try:
        if (path / name).is_symlink():
            raise ValueError("it is a link; a checkpoint holds its files itself")
        return read(path / name)
    except (OSError, ValueError) as error:
        raise _damaged(path, f"{name} cannot be read ({shorten(error)})") from None


def _check_list(path: Path, files: dict[str, Any]) -> None:
    """Raises CheckpointError unless ``files`` names the folder's own safetensors files, all of them, with size and sum."""
    for name, entry in files.items():
        if not _FILE_NAME.fullmatch(name):
            raise _damaged(path, f"{STATE} lists the file {quote(name)}; file names in state.json may not leave the folder "
                           "and end in .safetensors")
        if not isinstance(entry, dict) or not {"bytes", "sha256"} <= set(entry) <= {"bytes", "sha256", "tensors"}:
            raise _damaged(path, f"{STATE} does not give bytes and sha256 of {name}, or more than that")
        counts = [entry["bytes"], entry.get("tensors", 0)]
        if any(type(count) is not int or count < 0 for count in counts) or not isinstance(entry["sha256"], str):
            raise _damaged(path, f"{STATE} gives {quote(entry)} for {name}; bytes and tensors must be whole numbers, sha256 "
                           "text")
    present = {name for name in _read(path, ".", os.listdir) if name.endswith(ENDING)}
    if extra := present - set(files):
        raise _damaged(path, f"{quote(min(extra))} lies in it and {STATE} does not list it")


def sound_checkpoints(folder: str | os.PathLike) -> list[int]:
    """Steps of the checkpoints that load without an error, oldest first."""
    return [step for step in list_checkpoints(folder) if _is_sound(folder, step)]


def newest_sound(folder: str | os.PathLike, before: int) -> int | None:
    """Step of the newest checkpoint of an earlier step that loads without an error; None where there is none."""
    earlier = [step for step in list_checkpoints(folder) if step < before]
    return next((step for step in reversed(earlier) if _is_sound(folder, step)), None)


def _is_sound(folder: str | os.PathLike, step: int) -> bool:
    try:
        _load(checkpoint_path(Path(folder), step), step)
    except CheckpointError:
        return False
    return True
