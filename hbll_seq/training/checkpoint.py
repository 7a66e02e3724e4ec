"""Checkpoints that survive a crash at any instant, and the other files a run keeps.

A checkpoint is a folder ``step-00000100`` of safetensors files and one ``state.json``, which lists the size and SHA-256
of the others. It is written under a hidden name, flushed to the disk and then renamed: a folder with a checkpoint's
name is complete, or was damaged afterwards, which the sums tell. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hbll_seq.atomic import ASIDE, atomic_write, fsync
from hbll_seq.integrity import sha256
from hbll_seq.tensors import first_not_finite, module_tensors

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")
TensorGroups = dict[str, dict[str, Tensor]]


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or does not fit; the message names it and the remedy."""


class JsonLines:
    """A file of one JSON object per line that only ever grows by whole lines.

    Args:
        path: the file; it is created by the first line.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

    def append(self, row: dict[str, Any]) -> None:
        """Add one line. Raises OSError when the disk is full, after taking back what was written of the line."""
        line = (json.dumps(row) + "\n").encode("utf-8")
        with open(self.path, "ab", buffering=0) as file:
            size = file.tell()
            try:
                if file.write(line) != len(line):
                    raise OSError(f"the disk is full: a line could not be added to {self.path}")
            except OSError:
                file.truncate(size)
                raise

    def rows(self) -> list[dict[str, Any]]:
        """All complete lines; a last line that a crash cut short is left out."""
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_bytes().split(b"\n")[:-1]:
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
        return rows

    def rewind(self, step: int) -> None:
        """Drop the lines after ``step``, so that a resumed run writes them again."""
        if self.path.exists():
            rows = [row for row in self.rows() if row["step"] <= step]
            atomic_write(self.path, "".join(json.dumps(row) + "\n" for row in rows))


# ---------------------------------------------------------------------------------------------------- save


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies in ``folder``."""
    return Path(folder) / f"step-{step:08d}"


def list_checkpoints(folder: str | os.PathLike) -> list[int]:
    """Steps of the checkpoints in ``folder``, oldest first; whether they are sound is not looked at."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    matches = (_NAME.fullmatch(entry.name) for entry in folder.iterdir() if entry.is_dir())
    return sorted(int(match[1]) for match in matches if match)


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
        ValueError: a tensor holds NaN or infinity; nothing is written.
        OSError: folder not writable, disk full, or a checkpoint of ``step`` exists; nothing is left behind and older
            checkpoints are untouched.
    """
    folder = Path(folder)
    for group, tensors in groups.items():
        bad = first_not_finite(tensors)
        if bad:
            raise ValueError(f"refusing to save step {step}: {group} tensor {bad!r} holds NaN or infinity")
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    final, aside = checkpoint_path(folder, step), folder / f"{ASIDE}{step}"
    if final.exists():
        raise FileExistsError(f"{final} exists already")
    try:
        aside.mkdir()
        files = {}
        for group, tensors in groups.items():
            file = aside / f"{group}.safetensors"
            cpu = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
            try:
                save_file(cpu, file)
            except SafetensorError as error:  # how safetensors reports a full disk
                raise OSError(f"{file.name}: {error}") from None
            file.chmod(aside.stat().st_mode & 0o666)  # safetensors makes private files; the folder has the umask
            fsync(file)
            files[file.name] = _digest(file)
        document = {"format": FORMAT, "step": step, "files": files, **state}
        atomic_write(aside / "state.json", json.dumps(document, indent=1) + "\n")
        os.replace(aside, final)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    fsync(folder)
    remove_checkpoints(folder, list_checkpoints(folder)[:-keep])
    return final


def remove_checkpoints(folder: str | os.PathLike, steps: Iterable[int]) -> None:
    """Delete checkpoints; each is renamed first, so that no half-deleted folder bears a checkpoint's name."""
    folder = Path(folder)
    for step in steps:
        os.replace(checkpoint_path(folder, step), folder / f"{ASIDE}old-{step}")
    _sweep(folder)


def _sweep(folder: Path) -> None:
    """Remove what an earlier crash left half written or half deleted."""
    for entry in folder.glob(f"{ASIDE}*"):
        shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)


def _digest(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


# ---------------------------------------------------------------------------------------------------- load


def load_checkpoint(folder: str | os.PathLike, step: int) -> tuple[TensorGroups, dict[str, Any]]:
    """Tensors (on the CPU) and state of the checkpoint of ``step``, after checking every byte of it.

    Raises:
        CheckpointError: a file is missing, was cut or changed, or holds NaN; the message names the file.
    """
    path = checkpoint_path(Path(folder), step)
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        files, version = state["files"], state["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: state.json cannot be read ({error!r})") from None
    if version != FORMAT:
        raise CheckpointError(f"checkpoint {path} has format {version!r}; this version of hbll_seq reads {FORMAT}")
    groups = {}
    for name, expected in files.items():
        file = path / name
        try:
            found = _digest(file)
            if found["bytes"] != expected["bytes"]:
                raise CheckpointError(
                    f"checkpoint {path} is damaged: {name} has {found['bytes']} bytes instead of {expected['bytes']}"
                )
            if found != expected:
                raise CheckpointError(f"checkpoint {path} is damaged: {name} was changed after it was saved")
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"checkpoint {path} is damaged: {name} cannot be read ({error})") from None
        bad = first_not_finite(tensors)
        if bad:
            raise CheckpointError(f"checkpoint {path} is damaged: {name} holds NaN or infinity in {bad!r}")
        groups[file.stem] = tensors
    return groups, state


def sound_checkpoints(folder: str | os.PathLike) -> list[int]:
    """Steps of the checkpoints that load without an error, oldest first."""

    def sound(step: int) -> bool:
        try:
            load_checkpoint(folder, step)
        except CheckpointError:
            return False
        return True

    return [step for step in list_checkpoints(folder) if sound(step)]


# ---------------------------------------------------------------------------------------------------- contents


def load_module(module: nn.Module, tensors: dict[str, Tensor], where: str = "checkpoint") -> None:
    """Copy ``tensors`` into ``module``; names, shapes and types must be exactly the module's.

    Raises:
        CheckpointError: a tensor is missing, unexpected, or of another shape or type; ``module`` is unchanged.
    """
    targets = module_tensors(module)
    _compare(targets, tensors, where)
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(tensors[name])


def _compare(targets: dict[str, Tensor], tensors: dict[str, Tensor], where: str) -> None:
    remedy = "it belongs to a model of another configuration"
    for problem, names in (("lacks", set(targets) - set(tensors)), ("holds unexpected", set(tensors) - set(targets))):
        if names:
            raise CheckpointError(f"{where} {problem} tensor {min(names)!r} ({len(names)} in all): {remedy}")
    for name, target in targets.items():
        found = tensors[name]
        if found.shape != target.shape or found.dtype != target.dtype:
            raise CheckpointError(
                f"{where}: {name!r} is {found.dtype} of shape {tuple(found.shape)}, expected {target.dtype} of shape "
                f"{tuple(target.shape)}: {remedy}"
            )


def optimizer_tensors(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as ``<parameter name>|<state name>`` -> tensor."""
    tensors = {}
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}|{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return tensors


def load_optimizer(optimizer: torch.optim.Optimizer, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Inverse of :func:`optimizer_tensors` for an optimizer over the same parameters.

    Raises:
        CheckpointError: a state belongs to no parameter, or has another shape than its parameter.
    """
    parameters = dict(module.named_parameters())
    state: dict[nn.Parameter, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, key = full_name.rsplit("|", 1)
        parameter = parameters.get(name)
        if parameter is None or tensor.shape not in (parameter.shape, torch.Size([])):
            raise CheckpointError(f"optimizer state {full_name!r} of shape {tuple(tensor.shape)} fits no parameter: "
                                  "it belongs to a model of another configuration")
        # PyTorch keeps step counts on the CPU unless the optimizer is fused or capturable
        device = parameter.device if tensor.ndim or _on_device(optimizer) else "cpu"
        state.setdefault(parameter, {})[key] = tensor.to(device, copy=True)
    optimizer.state.clear()
    optimizer.state.update(state)


def _on_device(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.defaults.get("fused") or optimizer.defaults.get("capturable"))


def rng_state() -> dict[str, Any]:
    """State of this process's random number generators (Python, NumPy, torch, the current GPU) as JSON values."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    python = random.getstate()
    return {
        "python": [python[0], list(python[1]), python[2]],
        "numpy": [kind, keys.tolist(), position, has_gauss, gauss],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": torch.cuda.get_rng_state().numpy().tobytes().hex() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Inverse of :func:`rng_state`."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state["torch"]), dtype=torch.uint8))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.frombuffer(bytearray.fromhex(state["cuda"]), dtype=torch.uint8))
