"""The models that commands are given by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.hub import find_latest_run
from hbll_seq.models.hub_source import find_folder
from hbll_seq.models.model_files import CONFIG_NAME
from hbll_seq.utils.arguments import did_you_mean
from hbll_seq.utils.console import say

#: names that stand for a model wherever one is asked for
NAMES = ("bundled", "latest")


def find_model(name: str) -> str:
    """The folder or Hub id that a name stands for; of "latest" the folder is told on stderr.

    Raises:
        ValueError: there is no such run; or the name looks like a folder beside others, and one of these is meant.
    """
    if name == "latest":
        name = os.fspath(find_latest_run())
        say(f"hbll-seq: model from {name}")
    elif not os.path.isdir(os.path.expanduser(name)):
        parent = os.path.dirname(name) or "."
        hint = did_you_mean(name, [*NAMES, *_models_of(parent)])
        if hint and (parent != "." or "/" not in name):  # before the Hub is asked for a name that it cannot have
            raise ValueError(f"there is no model {name!r} here{hint}")
    return name


def open_model(name: str, device: str = "cpu") -> HBLLForCausalLM:
    """The model of a name. Raises ValueError as :func:`find_model` and ``HBLLForCausalLM.from_pretrained``."""
    return HBLLForCausalLM.from_pretrained(find_model(name), device=device)


def model_folder(name: str) -> Path:
    """The folder that holds the files of a model; one of the Hub is the local copy. Raises ValueError as above."""
    return find_folder(find_model(name), None, None, None, False)


def _models_of(folder: str) -> list[str]:
    """The folders in one that hold a model, as they would be named."""
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if (Path(entry.path) / CONFIG_NAME).is_file())
    except OSError:
        return []
    return [name if folder == "." else os.path.join(folder, name) for name in names[:1000]]


def chosen_paths(model: HBLLForCausalLM, args: Any) -> dict[str, tuple[int, ...]] | None:
    """The paths that ``--depth`` and ``--path`` name, by the names of a report; None for the default ones.

    Raises:
        ValueError: one of them is not possible in this model.
    """
    named = {f"depth {k}": model.resolve_path(k) for k in args.depth or ()}
    named |= {f"path {','.join(map(str, p))}": model.resolve_path(path=p) for p in args.path or ()}
    return named or None
