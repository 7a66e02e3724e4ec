"""Where a model is: what ``from_pretrained`` and ``push_to_hub`` are given, and the folder that a name stands for."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from hbll_seq.models.model_files import FILES, WHAT_TO_LOAD, called
from hbll_seq.utils.reading import possible_name, quote, shorten
from hbll_seq.utils.tensors import FLOATS

#: the name of the language model in the package, ``hbll_seq/assets/bundled``
BUNDLED = "bundled"
#: what huggingface_hub raises: ValueErrors for ids, OSErrors, and the errors of the HTTP library that it is built on.
HUB_ERRORS = (OSError, ValueError, *HfHubHTTPError.__bases__)
#: arguments of transformers' from_pretrained, and what takes their place here.
_ELSEWHERE = {
    "torch_dtype": "its name is dtype=",
    "device_map": "name one device by device=",
    "use_auth_token": "give it as token=",
    "trust_remote_code": "leave it out: no code is ever loaded",
    "force_download": "leave it out: files are checked; delete the cached ones to download them again",
    "tokenizer": "it is loaded with the model; set model.tokenizer afterwards for another one",
    "config": "it is read from config.json",
}


def refuse_unknown(unknown: dict[str, Any]) -> None:
    """Raises ValueError where ``from_pretrained`` was given an argument that it does not have."""
    if not unknown:
        return
    names = ", ".join(shorten(name, 40) for name in list(unknown)[:4])
    advice = "; ".join(f"{name}: {_ELSEWHERE[name]}" for name in list(unknown)[:2] if name in _ELSEWHERE)
    raise ValueError(
        f"from_pretrained does not know {names}: known are revision, subfolder, token, cache_dir, local_files_only, device "
        "and dtype; "
        f"{advice or 'leave it out'}"
    )


def as_source(source: Any) -> str:
    """The name of a folder or a Hub id as text. Raises ValueError for anything else."""
    try:
        text = os.fsdecode(source)
    except TypeError:
        text = None
    if text is None or "\0" in text or len(text) > 4000:
        raise ValueError(f"there is no folder {quote(source)}, and it is no Hub id. {WHAT_TO_LOAD}")
    return text


def check_hub_options(**options: Any) -> None:
    """Raises ValueError for an option of from_pretrained or push_to_hub of another type than it has."""
    types = {
        "token": ((str, bool, type(None)), "a token, True, False or None"),
        "local_files_only": ((bool,), "True or False"),
        "create_pr": ((bool,), "True or False"),
        "private": ((bool, type(None)), "True, False or None"),
        "cache_dir": ((str, os.PathLike, type(None)), "the name of a folder, or None"),
        "revision": ((str, type(None)), "the name of a branch, tag or commit, or None"),
        "subfolder": ((str, type(None)), "the name of a folder inside, or None"),
        "commit_message": ((str,), "a text"),
        "repo_id": ((str,), "an id such as 'owner/name'"),
    }
    for name, value in options.items():
        allowed, words = types[name]
        if not isinstance(value, allowed):
            shown = type(value).__name__ if name == "token" else quote(value)  # a secret in odd clothes is one too
            raise ValueError(f"{name}={shown}: must be {words}")


def as_device(device: Any) -> torch.device:
    """A device that this machine has. Raises ValueError for anything else."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except Exception as error:  # torch raises errors of several types for a device that it does not have
        reason = shorten(error, 150)
        given = str(device) if isinstance(device, torch.device) else device
        raise ValueError(f"device={quote(given)}: {reason}; choose one that this machine has, such as 'cpu'") from None
    return found


def package_folder() -> Path:
    """The folder in this package that holds the bundled model."""
    return Path(str(resources.files("hbll_seq") / "assets" / BUNDLED))


def bundled_folder(revision: str | None = None, subfolder: str | None = None) -> Path:
    """The folder of the bundled model. Raises ValueError for a revision or subfolder, or where one is here."""
    for name, value in (("revision", revision), ("subfolder", subfolder)):
        if value is not None:
            raise ValueError(f"{name}={quote(value)} with the bundled model, which has none; leave it out")
    if os.path.lexists(BUNDLED):
        raise ValueError(f"{quote(BUNDLED)} is the bundled model and a file or folder here: write './{BUNDLED}' for the one "
                         "here, or work in another folder for the bundled one")
    return package_folder()


def as_dtype(dtype: Any, source: str = "") -> torch.dtype | None:
    """The dtype that a name or a torch.dtype stands for; None for "auto", but of the bundled model float32. Raises ValueError
    for what no weights have."""
    if isinstance(dtype, str) and dtype == "auto":
        return torch.float32 if source == BUNDLED else None
    names = {str(known).removeprefix("torch."): known for known in FLOATS}
    found = names.get(dtype) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or found not in FLOATS:
        raise ValueError(
            f"dtype={quote(dtype)}: allowed are {', '.join(map(repr, names))}, torch dtypes of these names, and 'auto' for "
            "the dtype that the model was saved in"
        )
    return found


def find_folder(
    source: str,
    revision: str | None,
    token: str | bool | None,
    cache_dir: Any,
    local_files_only: bool,
    subfolder: str | None = None,
    also: Sequence[str] = (),
) -> Path:
    """The folder ``source``, the bundled model's, or a local copy of the Hub's repository of that name; with ``subfolder``
    the folder of that name in it.

    Args:
        source: a folder, "bundled" or a Hub id.
        revision, token, cache_dir, local_files_only: of the Hub.
        subfolder: parts divided by "/".
        also: names of files to bring from the Hub beside those of a model.

    Raises:
        ValueError: there is none of these, a local folder is asked for a revision, or ``"bundled"`` may mean two.
    """
    if source == BUNDLED:
        return bundled_folder(revision, subfolder)
    below = _below(subfolder)
    if source.startswith("~"):
        source = os.fspath(possible_name(source))
    if os.path.isdir(source):
        if revision is not None:
            raise ValueError(f"revision={quote(revision)} with the local folder {called(source)}: only Hub models have one")
        return _inside(Path(source), below, source)
    if os.path.lexists(source):
        raise ValueError(f"{called(source)} is a file. {WHAT_TO_LOAD}")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        raise ValueError(f"there is no folder {called(source)}, and it is no Hub id. {WHAT_TO_LOAD}")
    try:
        options = dict(revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        wanted = [(below / name).as_posix() for name in (*FILES, *also)]
        return _inside(Path(snapshot_download(source, allow_patterns=wanted, **options)), below, source)
    except HUB_ERRORS as error:
        if isinstance(error, _NoSubfolder):
            raise
        raise ValueError(
            f"there is no folder {called(source)} here, and no such model could be read from the Hub "
            f"({type(error).__name__}: {shorten(error, 150)}). {WHAT_TO_LOAD}"
        ) from error


def upload_remedy(error: Exception) -> str:
    """What to do about an upload that failed, as the end of its message."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, (LocalTokenNotFoundError, ValueError)) or status in (401, 403, 404):
        return ". Log in with `hf auth login` (or pass token=...) as someone who may write there"
    if status is not None or isinstance(error, OfflineModeIsEnabled):  # the error says what to do
        return ""
    return ". See that this machine reaches the network"


class _NoSubfolder(ValueError):
    """A model's repository lacks the folder that was asked for."""


def _below(subfolder: str | None) -> PurePosixPath:
    """``subfolder`` as a path that stays inside. Raises ValueError for one that leads out."""
    below = PurePosixPath(subfolder or "")
    if below.is_absolute() or ".." in below.parts or "\0" in str(below) or re.search(r"[*?\[]", str(below)):
        raise ValueError(f"subfolder={quote(subfolder)}: must be the name of a folder inside the model's, such as 'last'")
    return below


def _inside(folder: Path, below: PurePosixPath, source: str) -> Path:
    if below.parts and not (folder / below).is_dir():
        raise _NoSubfolder(f"{called(source)} has no folder {quote(str(below))}: leave subfolder out or name one that it has")
    return folder / below
