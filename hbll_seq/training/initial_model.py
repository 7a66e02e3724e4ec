"""The model that a run starts from (``--init-from``): its shape and tokenizer become the run's, its weights the first ones.

They are read once, at the start. Every checkpoint holds what a resume needs of them, so that the model may move or go.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import typing
from typing import Any, NamedTuple

import torch

from hbll_seq.data.tokenizer import Tokenizer
from hbll_seq.distributed.blocks import whole_tensors
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.config import HBLLConfig
from hbll_seq.models.stored_model import StoredModel
from hbll_seq.training.checkpoint import CheckpointError
from hbll_seq.training.checkpoint_contents import check_module
from hbll_seq.training.option_values import coerce, expand_path
from hbll_seq.training.settings import LEFT_OPEN, TrainingSettings
from hbll_seq.utils.reading import quote, shorten
from hbll_seq.utils.tensors import module_tensors

#: settings that a model's weights decide; dropout has none
SHAPE = tuple(f.name for f in dataclasses.fields(TrainingSettings) if f.metadata["group"] == "model" and f.name != "dropout")
_HINTS = typing.get_type_hints(TrainingSettings)
_KEYS = {"sha256": str, "vocab_size": int}  # of what a checkpoint holds of it, beside tokenizer_model


class InitialModel(NamedTuple):
    """``name``: folder or Hub id that it is read from; ``stored``: what lies there."""

    name: str
    stored: StoredModel

    @property
    def model(self) -> HBLLForCausalLM:
        """Its configuration and tokenizer; on the meta device."""
        return self.stored.model

    @property
    def fingerprint(self) -> str:
        """SHA-256 of its weights, with their names, types and shapes."""
        return self.stored.fingerprint

    def record(self, settings: TrainingSettings) -> dict[str, Any]:
        """What checkpoints hold of it: a resume needs no more."""
        record = {"sha256": self.fingerprint, "vocab_size": self.model.config.vocab_size}
        if settings.tokenizer == "model":
            record["tokenizer_model"] = base64.b64encode(self.model.tokenizer.model_proto).decode()
        return record


def named_model(preset: dict[str, Any], given: dict[str, Any]) -> str | None:
    """The value of ``init_from`` in the layers of settings, the later one wins."""
    name = coerce("init_from", given.get("init_from", preset.get("init_from")), _HINTS["init_from"])
    return None if name is None else expand_path("init_from", name)


def read_initial_model(name: str) -> InitialModel:
    """The model of a folder or of the Hub. Raises ValueError where there is none that can be trained on."""
    try:
        return InitialModel(name, StoredModel(HBLLForCausalLM, name))
    except ValueError as error:
        raise ValueError(f"init_from={quote(name)}: {shorten(error, 350)}") from None


def layers_from(initial: InitialModel, preset: dict[str, Any], given: dict[str, Any]) -> list[dict[str, Any]]:
    """Layers of settings in which shape and tokenizer are the model's; a preset's own are passed over.

    Raises:
        ValueError: the command line names another shape or another tokenizer.
    """
    own = {name: _as_setting(initial.model.config, name) for name in SHAPE}
    for name in SHAPE:
        asked = coerce(name, given[name], _HINTS[name]) if name in given else None
        if asked is not None and asked != own[name] and LEFT_OPEN.get(name, own[name]) != asked:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{name}={quote(asked)} contradicts init_from={quote(initial.name)}, whose model has {name}="
                             f"{quote(own[name])}: leave {flag} out, or train anew without --init-from")
    if initial.model.tokenizer is not None:
        own["tokenizer"] = _tokenizer_setting(initial, given)
    return [preset, own, {name: value for name, value in given.items() if name not in own}]


def _as_setting(config: HBLLConfig, name: str) -> Any:
    value = getattr(config, name)
    return ",".join(value) if name == "cell" and not isinstance(value, str) else value


def _tokenizer_setting(initial: InitialModel, given: dict[str, Any]) -> str:
    own, default = initial.model.tokenizer, Tokenizer.default()
    asked = given.get("tokenizer")
    if asked not in (None, "model"):
        other = None if asked == "train" else default if asked == "default" else Tokenizer.from_file(
            expand_path("tokenizer", coerce("tokenizer", asked, str)))
        if other is None or other.fingerprint != own.fingerprint:
            raise ValueError(f"tokenizer={quote(asked)} contradicts init_from={quote(initial.name)}, whose model reads text "
                             "in its own tokenizer alone: leave --tokenizer out, or train anew without --init-from")
    return "default" if own.fingerprint == default.fingerprint else "model"


def take_weights(model: HBLLForCausalLM, initial: InitialModel) -> None:
    """Copy the weights into ``model``, in its own dtypes; of a model that holds a rank's blocks alone, theirs.

    Raises:
        ValueError: they are those of another shape, the text is in another tokenizer, or the files have changed since they
            were checked.
    """
    size, wanted = model.tokenizer.vocab_size, initial.model.config.vocab_size
    if initial.model.tokenizer is None and size != wanted:
        raise ValueError(f"init_from={quote(initial.name)} brings no tokenizer and knows {wanted} pieces, but the text's "
                         f"tokenizer has {size}: give the one that the model was trained with by --tokenizer")
    wanted, where = whole_tensors(model), f"init_from={quote(initial.name)}"
    stored = {name: tensor.to(wanted[name].dtype) if name in wanted else tensor
              for name, tensor in module_tensors(initial.model).items()}
    check_module(wanted, stored, where)
    targets = module_tensors(model)
    try:
        with torch.no_grad():
            for name, tensor in initial.stored.weights(targets):
                targets[name].copy_(tensor)
    except ValueError as error:
        raise ValueError(f"{where}: {shorten(error, 350)}") from None


def check_record(state: dict[str, Any]) -> None:
    """Raises CheckpointError where what a checkpoint holds of the initial model is nothing that a run has written."""
    record = state.get("initial_model")
    if record is None:
        return
    if not isinstance(record, dict) or any(type(record.get(key)) is not kind for key, kind in _KEYS.items()):
        raise CheckpointError(f"the checkpoint's state.json is damaged: initial_model is {quote(record)}; it must give "
                              f"{' and '.join(_KEYS)}")
    recorded_tokenizer(record)


def recorded_tokenizer(record: dict[str, Any] | None) -> Tokenizer | None:
    """The tokenizer that a checkpoint holds of the initial model; None where the settings name it. Raises CheckpointError."""
    if record is None or "tokenizer_model" not in record:
        return None
    try:
        return Tokenizer(base64.b64decode(record["tokenizer_model"], validate=True))
    except (ValueError, TypeError, binascii.Error) as error:
        raise CheckpointError(f"the checkpoint's state.json is damaged: the tokenizer of its initial_model is unusable "
                              f"({shorten(error, 150)})") from None


def check_same_model(name: str, state: dict[str, Any]) -> None:
    """Raises ValueError where ``name``, given again at a resume, is another model than the one that the run started from."""
    record = state.get("initial_model")
    if record is None:
        raise ValueError(f"init_from={quote(name)}: this run did not start from a model; leave --init-from out, or start a "
                         "new run in another --output-dir")
    if read_initial_model(name).fingerprint != record["sha256"]:
        raise ValueError(f"init_from={quote(name)} is another model than the one that this run started from: leave "
                         "--init-from out (its weights are not needed again), or start a new run in another --output-dir")
