"""The models that commands are given by name."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.hub import find_latest_run
from hbll_seq.models.hub_source import find_folder
from hbll_seq.models.model_files import CONFIG_NAME
from hbll_seq.utils.console import say
from hbll_seq.utils.reading import quote

#: names that stand for a model wherever one is asked for
NAMES = ("bundled", "latest")


def find_model(name: str) -> str:
    """The folder or Hub id that a name stands for; of "latest" the folder is named on stderr.

    Raises:
        ValueError: there is no such run; or the name looks like a folder beside others, and one of these is meant.
    """
    if name == "latest":
        name = os.fspath(find_latest_run())
        say(f"hbll-seq: model from {name}")
    elif name not in NAMES and not os.path.isdir(os.path.expanduser(name)):
        parent, own = os.path.split(name)
        near = difflib.get_close_matches(own, [*_models_of(parent or "."), *(NAMES if not parent else ())], n=1,
                                         cutoff=0.5 if parent else 0.6)
        if near:  # before the Hub is asked for a name that it cannot have
            raise ValueError(f"there is no model {quote(name)} here; did you mean {os.path.join(parent, near[0])}?")
    return name


def open_model(name: str, device: str = "cpu") -> HBLLForCausalLM:
    """The model of a name. Raises ValueError as :func:`find_model` and ``HBLLForCausalLM.from_pretrained``."""
    return HBLLForCausalLM.from_pretrained(find_model(name), device=device)


def model_folder(name: str) -> Path:
    """The folder that holds the files of a model; one of the Hub is the local copy. Raises ValueError as above."""
    return find_folder(find_model(name), None, None, None, False)


def _models_of(folder: str) -> list[str]:
    """Names of the folders in one that hold a model."""
    try:
        return sorted(entry.name for entry in os.scandir(folder) if (Path(entry.path) / CONFIG_NAME).is_file())
    except OSError:
        return []


def chosen_paths(model: HBLLForCausalLM, args: Any) -> dict[str, tuple[int, ...]] | None:
    """The paths that ``--depth`` and ``--path`` name, by the names of a report; None for the default ones.

    Raises:
        ValueError: one of them is not possible in this model.
    """
    named = {f"depth {k}": model.resolve_path(k) for k in args.depth or ()}
    named |= {f"path {','.join(map(str, p))}": model.resolve_path(path=p) for p in args.path or ()}
    return named or None
