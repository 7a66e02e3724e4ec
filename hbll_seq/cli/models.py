"""The models that commands are given by name."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.hub import HubMixin, find_latest_run
from hbll_seq.models.hub_source import find_folder
from hbll_seq.models.image_classification import HBLLForImageClassification
from hbll_seq.models.model_files import CONFIG_NAME, called, stored_kind
from hbll_seq.models.sequence_classification import HBLLForSequenceClassification
from hbll_seq.tree.topology import path_text
from hbll_seq.utils.console import say
from hbll_seq.utils.reading import quote

#: names that stand for a model wherever one is asked for
NAMES = ("bundled", "latest")
#: the kinds of models that ``info`` describes; the first is also what a config.json without a kind is of
KINDS: tuple[type[HubMixin], ...] = (HBLLForCausalLM, HBLLForSequenceClassification, HBLLForImageClassification)


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


def open_model(name: str, device: str = "cpu", kind: type[HubMixin] = HBLLForCausalLM) -> Any:
    """The model of a name, of one kind. Raises ValueError as :func:`find_model` and ``from_pretrained``."""
    return kind.from_pretrained(find_model(name), device=device)


def kind_of(name: str) -> type[HubMixin]:
    """Which of ``KINDS`` the model of a name is; the first where its config.json cannot be read, and loading tells why.

    Raises:
        ValueError: it is of another kind; or as :func:`find_model`.
    """
    architectures, model_type = stored_kind(model_folder(name)) or (None, None)
    if architectures is None and model_type is None:
        return KINDS[0]
    for kind in KINDS:
        if architectures == [kind.__name__] or architectures is None and model_type == kind.config_class.model_type:
            return kind
    found, names = model_type if architectures is None else architectures, [kind.__name__ for kind in KINDS]
    raise ValueError(
        f"{called(name)}: {CONFIG_NAME} is for {quote(found)}: info describes {', '.join(names[:-1])} and {names[-1]}; name "
        "a model of one of these, or load it by the class that wrote it"
    )


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
    named = {f"depth {k}": path_of(model, k) for k in args.depth or ()}
    named |= {f"path {','.join(map(str, p))}": model.resolve_path(path=p) for p in args.path or ()}
    return named or None


def tell_untrained(model: HBLLForCausalLM, paths: Mapping[str, tuple[int, ...]] | None) -> None:
    """Says on stderr which of the paths that were asked for this model was not trained along: their figures are worse."""
    for name, path in (paths or {}).items():
        if not model.config.is_trained(path):
            say(f"hbll-seq: {name} ({path_text(path)}) was not trained; expect worse figures; "
                f"trained: {model.config.trained_depths}")  # fmt: skip


def path_of(model: HBLLForCausalLM, depth: int | str | None, path: Sequence[int] | None = None) -> tuple[int, ...]:
    """The path that ``--depth`` or ``--path`` names; which one a word has taken is told on stderr. Raises as
    ``resolve_path``."""
    found = model.resolve_path(depth, path)
    if isinstance(depth, str):
        say(f"hbll-seq: depth {depth} is depth {len(found)} ({path_text(found)})")
    return found
