"""Before a model is saved: whether the folder is another's, and whether the weights are those that were loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hbll_seq.models.model_files import CHECKPOINTS_NAME, CONFIG_NAME, METRICS_NAME, RECORD_NAME, called
from hbll_seq.utils.integrity import sha256
from hbll_seq.utils.reading import possible_name, quote

#: what marks the folder of a training run; older versions wrote no record
_OF_A_RUN = (RECORD_NAME, CHECKPOINTS_NAME, METRICS_NAME)
#: dtype -> those whose values it holds exactly
_NARROWER = {
    torch.float32: (torch.bfloat16, torch.float16),
    torch.float64: (torch.float32, torch.bfloat16, torch.float16),
}


def as_folder(save_directory: Any) -> Path:
    """The folder's name, ``~`` expanded. Raises ValueError for what is no name."""
    try:
        return possible_name(save_directory)
    except TypeError:
        raise ValueError(f"save_directory={quote(save_directory)}: must be the name of a folder") from None


def refuse_run(folder: Path) -> None:
    """Raises ValueError where ``folder`` is a training run's: its model, record and checkpoints belong together."""
    if os.path.lexists(folder / RECORD_NAME):
        raise ValueError(
            f"save_directory={called(folder)} is the folder of a training run ({RECORD_NAME}), whose model a save would "
            "replace. Nothing was written; give another folder"
        )


def refuse_taken(folder: Path, overwrite: bool) -> None:
    """Raises ValueError where ``folder`` holds a run, or a model that is not to be replaced."""
    where = f"save_directory={called(folder)}"
    if found := [name for name in _OF_A_RUN if os.path.lexists(folder / name)]:
        raise ValueError(f"{where} is the folder of a training run ({found[0]}), which is never replaced. Nothing was "
                         "written; give another folder")
    if not overwrite and os.path.lexists(folder / CONFIG_NAME):
        raise ValueError(f"{where} already holds a model. Nothing was written; give another folder, or replace that model by "
                         "overwrite=True (--overwrite on the command line)")


def have_values_of(loaded_sha256: str | None, weights: dict[str, Tensor], saved: Path) -> bool:
    """Whether the weights are exactly those that were loaded, in their dtype or in one that holds all values of theirs.

    Args:
        loaded_sha256: of the file that was loaded; None where there was none.
        weights: name -> tensor.
        saved: the file that they were saved to; another one is made beside it for a while.
    """
    if loaded_sha256 is None or sha256(saved) == loaded_sha256:
        return loaded_sha256 is not None
    current = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
    for dtype in _NARROWER.get(next(iter(current)), ()) if len(current) == 1 else ():
        narrow = {}
        for name, tensor in weights.items():
            narrow[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
            if not torch.equal(narrow[name].to(tensor.dtype), tensor):
                break
        else:
            file = saved.with_name("narrower.safetensors")
            save_file(narrow, file, metadata={"format": "pt"})
            found = sha256(file)
            file.unlink()
            if found == loaded_sha256:
                return True
    return False
