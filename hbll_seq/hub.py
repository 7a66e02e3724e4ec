"""Models as folders and on the Hub: save_pretrained, from_pretrained, push_to_hub. Strict, atomic, nothing pickled.

A thin layer over huggingface_hub and safetensors rather than ``PyTorchModelHubMixin``, which (version 2.4) drops
unknown config keys, leaves missing weights random by default, falls back to a pickle file, and writes in place.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hbll_seq.atomic import atomic_folder
from hbll_seq.config import ModelConfig
from hbll_seq.integrity import sha256
from hbll_seq.model_card import CardText, is_model_card, may_overwrite, model_card, with_location
from hbll_seq.tensors import first_not_finite, module_tensors
from hbll_seq.tokenizer import Tokenizer

CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
TOKENIZER_NAME, CARD_NAME = "tokenizer.model", "README.md"
FILES = (CONFIG_NAME, WEIGHTS_NAME, TOKENIZER_NAME, CARD_NAME)
#: written by train/lm.py when a run has ended; what tells a finished run from a checkpoint.
METRICS_NAME = "metrics.json"

T = TypeVar("T", bound="HubMixin")


class HubMixin:
    """Gives a model with a ``config`` its Hugging Face layout: config.json, model.safetensors and README.md (the model
    card), and tokenizer.model where it has a tokenizer.

    Attributes:
        config_class: of ``config``; the model is made by ``cls(config)``.
        has_tokenizer: whether the model takes ``tokenizer=`` as well.
    """

    config_class: ClassVar[type[ModelConfig]]
    has_tokenizer: ClassVar[bool] = False
    config: ModelConfig
    tokenizer: Tokenizer | None = None
    _card: tuple[str, str] | None = None  # (text, SHA-256 of the weights it was written for), from from_pretrained

    def card_text(self) -> CardText:
        """What the model card says of this kind of model."""
        raise NotImplementedError

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        data: str | None = None,
        settings: dict[str, Any] | None = None,
        perplexity: list[dict[str, Any]] | None = None,
        **metadata: Any,
    ) -> None:
        """Write the model into a folder, which is made where it is missing. Other files in it are left alone.

        Everything is written aside first and then renamed, so that a failure leaves the folder as it was. A README.md
        that this library has not written, or whose marker line was removed, is left alone. Without any metadata the
        card that the model was loaded with is kept, as long as the weights are still those it was written for.

        Args:
            save_directory: the folder.
            data: what the model was trained on.
            settings: the run's options, name -> value.
            perplexity: of a language model, rows as ``evaluation.evaluate_paths`` makes them.
            metadata: anything more to list in the model card; ``license``, ``language``, ``datasets`` (Hub ids) and
                ``model_name`` go to its header.

        Raises:
            ValueError: the folder cannot be written or is a file, or a weight is NaN or infinite.
        """
        metadata = {"data": data, "settings": settings, "perplexity": perplexity, **metadata}
        self._save(Path(save_directory), {name: value for name, value in metadata.items() if value is not None})

    def _save(self, folder: Path, metadata: dict[str, Any], location: str | None = None) -> None:
        weights = {name: tensor.detach().contiguous() for name, tensor in module_tensors(self).items()}
        _check_finite(weights, f"this {type(self).__name__}", "nothing was written; restore weights that are finite")
        config = {
            "model_type": self.config.model_type,
            "architectures": [type(self).__name__],
            "dtype": str(next(iter(weights.values())).dtype).removeprefix("torch."),
            **self.config.to_dict(),
        }
        if self.tokenizer is not None:
            config["eos_token_id"] = self.tokenizer.eos_id
        # An old tokenizer goes with its model; config.json comes last, since without it a folder is no model.
        with atomic_folder(folder, last=CONFIG_NAME, stale=TOKENIZER_NAME) as aside:
            save_file(weights, aside / WEIGHTS_NAME, metadata={"format": "pt"})
            if self.tokenizer is not None:
                self.tokenizer.save(aside / TOKENIZER_NAME)
            if not (folder / CARD_NAME).exists() or may_overwrite(_read_text(folder / CARD_NAME)):
                kept = not metadata and self._card is not None and sha256(aside / WEIGHTS_NAME) == self._card[1]
                card = self._card[0] if kept else model_card(self, metadata)
                card = with_location(card, location or _portable(folder))
                (aside / CARD_NAME).write_text(card, encoding="utf-8")
            (aside / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls: type[T],
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        device: str | torch.device = "cpu",
    ) -> T:
        """The model of a folder or of the Hub, in evaluation mode, with the dtypes it was saved in.

        A folder may hold anything else beside the files of :meth:`save_pretrained`: a training output folder is fine.
        The global random state is left as it was.

        Args:
            pretrained_model_name_or_path: a folder, else a Hub id such as ``owner/name``.
            revision: branch, tag or commit of the Hub repository.
            token, cache_dir, local_files_only: as in ``huggingface_hub.snapshot_download``.
            device: where the model goes.

        Raises:
            ValueError: there is no such model, or its files do not hold exactly this model: an unknown or missing
                config key, a missing or unexpected weight, a wrong shape, a file cut short, a NaN or infinite weight.
        """
        source = os.fspath(pretrained_model_name_or_path)
        folder = _find_folder(source, revision, token, cache_dir, local_files_only)
        config = _read_config(folder, source, cls.__name__, cls.config_class)
        parts = {}
        if cls.has_tokenizer and (folder / TOKENIZER_NAME).exists():
            parts["tokenizer"] = Tokenizer.from_file(folder / TOKENIZER_NAME)
        weights = _read_weights(folder, source)
        with torch.random.fork_rng(devices=[]):  # the values drawn here are all replaced
            model = cls(config, **parts)
        _load_weights(model, weights, source)
        if (folder / CARD_NAME).exists() and is_model_card(card := _read_text(folder / CARD_NAME)):
            model._card = (card, sha256(folder / WEIGHTS_NAME))
        return model.to(device).eval()

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload model",
        create_pr: bool = False,
        **metadata: Any,
    ) -> str:
        """Upload what :meth:`save_pretrained` writes, in one commit; the repository is made where it is missing.

        Args:
            repo_id: such as ``owner/name``.
            private, token, create_pr: as in ``huggingface_hub.HfApi``.
            revision: branch to write to; None is the main one.
            metadata: as in :meth:`save_pretrained`.

        Returns:
            Address of the commit.

        Raises:
            ValueError: the id is not valid, the Hub refuses, or a weight is NaN or infinite.
        """
        validate_repo_id(repo_id)
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "model"
            self._save(folder, metadata, location=repo_id)
            api = HfApi(token=token)
            try:
                repo_id = api.create_repo(repo_id=repo_id, private=private, exist_ok=True).repo_id
                commit = api.upload_folder(
                    repo_id=repo_id, folder_path=folder, commit_message=commit_message, revision=revision,
                    create_pr=create_pr,
                )  # fmt: skip
            except (HfHubHTTPError, LocalTokenNotFoundError) as error:
                raise ValueError(
                    f"the Hub did not take {repo_id!r}: {error}. Log in with `hf auth login` (or pass token=...) as "
                    "someone who may write there"
                ) from error
        return str(commit)


def find_latest_run(root: str | os.PathLike[str] = "runs") -> Path:
    """The newest finished run below ``root``: a folder with config.json, model.safetensors and metrics.json.

    Raises:
        ValueError: there is none.
    """
    finished = [
        metrics
        for metrics in Path(root).rglob(METRICS_NAME)
        if all((metrics.parent / name).is_file() for name in (CONFIG_NAME, WEIGHTS_NAME))
    ]
    if not finished:
        raise ValueError(
            f"there is no finished run under {os.fspath(root)!r} (a folder with {CONFIG_NAME}, {WEIGHTS_NAME} and "
            f"{METRICS_NAME}): train one with `accelerate launch train/lm.py`, or name a folder or a Hub id"
        )
    return max(finished, key=lambda metrics: (metrics.stat().st_mtime_ns, metrics)).parent


def _check_finite(tensors: dict[str, Tensor], source: str, remedy: str) -> None:
    name = first_not_finite(tensors)
    if name is not None:
        tensor = tensors[name]
        count = tensor.numel() - int(torch.isfinite(tensor).sum())
        raise ValueError(f"{source}: weight {name!r} has {count} of {tensor.numel()} values NaN or infinite; {remedy}")


def _load_weights(model: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Put ``weights`` in place of the model's own, after checking that they are exactly those it needs."""
    expected = module_tensors(model)
    source = f"{source!r}: {WEIGHTS_NAME}"
    remedy = "use the config.json that was saved with these weights, or load an intact copy"
    if missing := [name for name in expected if name not in weights]:
        raise ValueError(f"{source} lacks {_listing(missing)} of {len(expected)} weights; {remedy}")
    if unexpected := [name for name in weights if name not in expected]:
        raise ValueError(f"{source} holds {_listing(unexpected)}, which this configuration does not have; {remedy}")
    for name, own in expected.items():
        found = weights[name]
        if found.shape != own.shape:
            raise ValueError(
                f"{source}: weight {name!r} has shape {list(found.shape)}, config.json asks for {list(own.shape)}; "
                f"{remedy}"
            )
        if found.is_floating_point() != own.is_floating_point():
            raise ValueError(f"{source}: weight {name!r} is {found.dtype}, but must be like {own.dtype}; {remedy}")
    _check_finite(weights, source, "training broke down before it was saved; load an earlier checkpoint")
    for name, own in expected.items():
        own.data = weights[name]  # not copy_: the dtype of the file is kept; tied names share this one Parameter


def _listing(names: list[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + more


def _read_weights(folder: Path, source: str) -> dict[str, Tensor]:
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(f"{source!r} has no {WEIGHTS_NAME}; it holds {_contents(folder)}. {_WHAT_TO_LOAD}")
    try:
        with safe_open(path, framework="pt") as file:
            # Cloned: safetensors maps the file into memory, and a later change of the file must not reach the model.
            return {name: file.get_tensor(name).clone() for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{source!r}: {WEIGHTS_NAME} ({path.stat().st_size:,} bytes) is cut short or damaged ({error}); "
            "copy or download it again, or load an earlier checkpoint"
        ) from error


def _read_config(folder: Path, source: str, architecture: str, config_class: type[ModelConfig]) -> ModelConfig:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"{source!r} has no {CONFIG_NAME}; it holds {_contents(folder)}. {_WHAT_TO_LOAD}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"{source!r}: {CONFIG_NAME} is not valid JSON ({error}); load an intact copy") from error
    if not isinstance(values, dict):
        raise ValueError(f"{source!r}: {CONFIG_NAME} must hold an object of config keys, not {type(values).__name__}")
    architectures = values.get("architectures", [architecture])
    if architectures != [architecture]:
        raise ValueError(f"{source!r}: {CONFIG_NAME} is for {architectures}, not {architecture}; use that class")
    try:
        config = config_class.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{source!r}: {CONFIG_NAME}: {error}") from error
    # A default in place of a lost key (n_head, say) could fit the weights and still be another model.
    if missing := [field.name for field in fields(config_class)
                   if field.name not in values and not field.metadata.get("optional")]:
        raise ValueError(f"{source!r}: {CONFIG_NAME} lacks {_listing(missing)}; add what the model was trained with")
    return config


_WHAT_TO_LOAD = "Give a folder that save_pretrained or train/lm.py has written, or a Hub id such as 'owner/name'"


def _contents(folder: Path) -> str:
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    return _listing(names, limit=8) if names else "nothing"


def _find_folder(
    source: str, revision: str | None, token: str | bool | None, cache_dir: Any, local_files_only: bool
) -> Path:
    if os.path.isdir(source):
        if revision is not None:
            raise ValueError(f"revision={revision!r} with the local folder {source!r}: only Hub models have revisions")
        return Path(source)
    if os.path.exists(source):
        raise ValueError(f"{source!r} is a file. {_WHAT_TO_LOAD}")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        raise ValueError(f"there is no folder {source!r}, and it is no Hub id. {_WHAT_TO_LOAD}")
    try:
        return Path(
            snapshot_download(
                source, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only,
                allow_patterns=list(FILES),
            )  # fmt: skip
        )
    except (OSError, HFValidationError) as error:  # the Hub's errors, and those of the network, are OSErrors
        raise ValueError(
            f"there is no folder {source!r} here, and no such model could be read from the Hub "
            f"({type(error).__name__}: {error}). {_WHAT_TO_LOAD}"
        ) from error


def _portable(folder: Path) -> str:
    """A name for the folder that tells nothing about the machine it is on."""
    return folder.name if folder.is_absolute() else folder.as_posix()


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
