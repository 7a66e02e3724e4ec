"""Models as folders and on the Hub: save_pretrained, from_pretrained, push_to_hub. Strict, atomic, nothing pickled.

A thin layer over huggingface_hub and safetensors rather than ``PyTorchModelHubMixin``, which (version 2.4) drops
unknown config keys, leaves missing weights random by default, falls back to a pickle file, and writes in place.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import save_file
from torch import Tensor

from hbll_seq.data.tokenizer import Tokenizer
from hbll_seq.models.config import ModelConfig
from hbll_seq.models.hub_source import (
    HUB_ERRORS,
    as_device,
    as_dtype,
    as_source,
    check_hub_options,
    find_folder,
    refuse_unknown,
    upload_remedy,
)
from hbll_seq.models.model_card import (
    CardText,
    check_metadata,
    code_pointer,
    is_model_card,
    model_card,
    with_location,
    with_pictures_of,
)
from hbll_seq.models.model_files import (
    CARD_NAME,
    CONFIG_NAME,
    FILES,
    MAX_CONFIG,
    METRICS_NAME,
    PATHS_NAME,
    POINTER_NAME,
    REPLACED,
    SUMMED,
    TOKENIZER_NAME,
    WEIGHTS_NAME,
    ModelFiles,
    find_latest_run,
    has_readme_of_user,
    read_unchanged,
)
from hbll_seq.models.path_table import PathTable
from hbll_seq.models.save_checks import as_folder, have_values_of, refuse_run
from hbll_seq.utils.atomic import atomic_folder
from hbll_seq.utils.integrity import SUMS_NAME, format_sums
from hbll_seq.utils.reading import quote, shorten, to_json
from hbll_seq.utils.tensors import WithoutValues, check_finite, module_tensors, on_meta, tensors_to_save

__all__ = ["FILES", "METRICS_NAME", "POINTER_NAME", "HubMixin", "find_latest_run"]

T = TypeVar("T", bound="HubMixin")


class HubMixin:
    """Gives a model with a ``config`` its Hugging Face layout: config.json, model.safetensors and README.md (the model
    card), and tokenizer.model where it has a tokenizer.

    Attributes:
        config_class: of ``config``; the model is made by ``cls(config)``.
        has_tokenizer: whether the model takes ``tokenizer=`` as well.
        has_path_table: whether it is a language model, whose folder may hold ``paths.json``.
        auto_classes: transformers' Auto class -> the class in ``hbll_seq.integrations.transformers`` that it stands for.
    """

    config_class: ClassVar[type[ModelConfig]]
    has_tokenizer: ClassVar[bool] = False
    has_path_table: ClassVar[bool] = False
    auto_classes: ClassVar[dict[str, str]] = {}
    config: ModelConfig
    tokenizer: Tokenizer | None = None
    #: perplexities of the model's paths, from the folder it was loaded from; None where none are stored
    path_table: PathTable | None = None
    _card: str | None = None  # of that folder
    _loaded_sha256: str | None = None  # of that folder's weights: what card and table were written for

    def card_text(self) -> CardText:
        """What the model card says of this kind of model."""
        raise NotImplementedError

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        data: str | None = None,
        settings: dict[str, Any] | None = None,
        perplexity: list[dict[str, Any]] | dict[str, list[dict[str, Any]]] | None = None,
        **metadata: Any,
    ) -> None:
        """Write the model into a folder, which is made where it is missing. Other files in it are left alone.

        The new version takes the old one's place in one step: whatever ends a save, the whole old or the whole new model
        loads. A README.md that this library has not written, or whose marker line was removed, is left alone. Without any
        metadata the card that the model was loaded with is kept, as long as the weights are still those it was written for,
        also in a wider dtype. SHA256SUMS lists the other files, and loading checks them; not README.md, which people edit,
        on the Hub's web page too.

        Args:
            save_directory: the folder; ``~`` is the user's home.
            data: what the model was trained on.
            settings: the run's options, name -> value.
            perplexity: of a language model, rows as ``evaluation.evaluate_paths`` makes them: ``{"validation": rows, "test":
                rows}`` or one of the two; rows alone are those of the validation split. They go to the card, and to
                ``paths.json``, by which ``depth="best"`` and ``model.paths()`` know them. Rows alone that are no such rows
                go to the card alone. Without them those that the model was loaded with are kept, as the card is.
            metadata: anything more to list in the model card; ``license``, ``language``, ``datasets`` (Hub ids) and
                ``model_name`` go to its header, ``pictures`` (names of .png files in the folder) are shown.

        Raises:
            ValueError: the folder cannot be written, is a file or a training run's (run.json); metadata of a wrong type; a
                weight is NaN or infinite; or what would be written could not be loaded: weights of other names, shapes,
                dtypes or ties than those of a new model of this config.
        """
        metadata = {"data": data, "settings": settings, "perplexity": perplexity, **metadata}
        folder = as_folder(save_directory)
        refuse_run(folder)
        self.write_into(folder, {name: value for name, value in metadata.items() if value is not None})

    def write_into(self, folder: Path, metadata: dict[str, Any], location: str | None = None) -> None:
        """What :meth:`save_pretrained` does, in whatever folder: a run writes its own results so."""
        check_metadata(metadata)
        table = self._new_path_table(metadata.get("perplexity"))
        weights = self._tensors_to_save()
        config = {
            "model_type": self.config.model_type,
            "architectures": [type(self).__name__],
            "dtype": str(next(iter(weights.values())).dtype).removeprefix("torch."),
            **self.config.to_dict(),
        }
        if self.tokenizer is not None:
            config["eos_token_id"] = self.tokenizer.eos_id
        if location is not None and self.auto_classes:  # on the Hub
            config["auto_map"] = {auto: f"{Path(POINTER_NAME).stem}.{name}" for auto, name in self.auto_classes.items()}
        config_text = to_json(config, indent=2) + "\n"
        if len(config_text) > MAX_CONFIG:
            raise ValueError(
                f"the config of this {type(self).__name__} would take {len(config_text):,} bytes of at most "
                f"{MAX_CONFIG:,}: give fewer trained_paths, or 'all'. Nothing was written"
            )
        is_of_user = has_readme_of_user(folder)
        keep = (CARD_NAME,) if is_of_user else ()
        with atomic_folder(folder, REPLACED, keep) as aside:
            save_file(weights, aside / WEIGHTS_NAME, metadata={"format": "pt"})
            if self.tokenizer is not None:
                self.tokenizer.save(aside / TOKENIZER_NAME)
            unchanged = have_values_of(self._loaded_sha256, weights, aside / WEIGHTS_NAME)
            if table is None and unchanged and "perplexity" not in metadata:
                table = self.path_table
            if table is not None:
                (aside / PATHS_NAME).write_text(table.text(), encoding="utf-8")
            if not is_of_user:
                kept = not metadata and self._card is not None and unchanged
                told = {} if table is None else {"perplexity": table.splits}
                text = self._card if kept else model_card(self, {**told, **metadata})
                card = with_pictures_of(with_location(text, location or _portable(folder)), folder)
                (aside / CARD_NAME).write_text(card, encoding="utf-8", errors="backslashreplace")
            (aside / CONFIG_NAME).write_text(config_text, encoding="utf-8")
            if "auto_map" in config:
                (aside / POINTER_NAME).write_text(code_pointer(self.auto_classes.values()), encoding="utf-8")
            summed = [name for name in SUMMED if (aside / name).exists()]
            (aside / SUMS_NAME).write_text(format_sums(aside, summed), encoding="utf-8")

    def _tensors_to_save(self) -> dict[str, Tensor]:
        """The weights, after checking that they would load. Raises ValueError."""
        name = type(self).__name__
        try:
            fresh = on_meta(lambda: type(self)(self.config))
        except Exception as error:  # whatever a subclass's constructor raises
            raise ValueError(
                f"this {name} cannot be saved: {name}(config), by which it is loaded again, fails ({type(error).__name__}: "
                f"{shorten(error, 150)}); give its further arguments defaults. Nothing was written"
            ) from error
        try:
            weights = tensors_to_save(self, fresh)
        except ValueError as error:
            raise ValueError(f"this {name} would not load again: {error}. Nothing was written") from None
        check_finite(weights, f"this {name}", "nothing was written; restore weights that are finite")
        return weights

    @classmethod
    def from_pretrained(
        cls: type[T],
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        subfolder: str | None = None,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "auto",
        **unknown: Any,
    ) -> T:
        """The model of a folder or of the Hub, in evaluation mode.

        A folder may hold anything else beside the files of :meth:`save_pretrained`: a training output folder is fine.
        Files are compared with SHA256SUMS; where there is none, or a file is not in it, one line on stderr says so. The
        global random state is left as it was.

        Args:
            pretrained_model_name_or_path: a folder, ``"bundled"`` for the language model in this package, else a Hub id such
                as ``owner/name``.
            revision: branch, tag or commit of the Hub repository.
            token, cache_dir, local_files_only: as in ``huggingface_hub.snapshot_download``.
            subfolder: the folder inside that holds the model; parts divided by "/".
            device: where the model goes.
            dtype: of its floating weights, a torch dtype or its name, such as ``"bfloat16"``; ``"auto"`` as saved, but
                of the bundled model float32: it is saved in bfloat16 for its size, which a CPU is slow in.
            unknown: refused; transformers has more arguments.

        Raises:
            ValueError: there is no such model, an argument is unknown or of a wrong type, or the files do not hold exactly
                this model: a damaged file, an unknown or missing config key, a missing or unexpected weight, a wrong shape,
                a file cut short, a NaN or infinite weight, several dtypes.
        """
        refuse_unknown(unknown)
        source = as_source(pretrained_model_name_or_path)
        check_hub_options(revision=revision, token=token, local_files_only=local_files_only, cache_dir=cache_dir)
        check_hub_options(subfolder=subfolder)
        device, dtype = as_device(device), as_dtype(dtype, source)
        folder = find_folder(source, revision, token, cache_dir, local_files_only, subfolder)
        source = f"{source}/{subfolder}" if subfolder else source
        return read_unchanged(folder, lambda: cls._read(folder, source)).to(device=device, dtype=dtype).eval()

    @classmethod
    def _read(cls: type[T], folder: Path, source: str) -> T:
        """The model of a folder that no process writes to meanwhile."""
        files = ModelFiles(folder, source)
        config = files.config(cls.__name__, cls.config_class)
        tokenizer = files.tokenizer(config.vocab_size) if cls.has_tokenizer else None
        make = lambda: cls(config) if tokenizer is None else cls(config, tokenizer=tokenizer)
        weights = dict(files.weights(module_tensors(on_meta(make))))
        with WithoutValues(), torch.random.fork_rng(devices=[]):  # the values drawn here are all replaced
            model = make()
        for name, own in module_tensors(model).items():
            own.data = weights[name]  # not copy_: the dtype of the file is kept; tied names share this one Parameter
        model._adopt_card(files)
        return model

    def adopt(self, files: ModelFiles) -> None:
        """Take on what lies beside the weights of a folder: tokenizer, model card and path table. For those who load the
        weights themselves. Raises ValueError for a tokenizer that is none, or that has more pieces than the model tokens.
        """
        if self.has_tokenizer:
            self.tokenizer = files.tokenizer(self.config.vocab_size)
            if self.tokenizer is not None and self.tokenizer.vocab_size > self.config.vocab_size:
                raise ValueError(f"{files.source}: tokenizer {TOKENIZER_NAME} has {self.tokenizer.vocab_size} pieces but "
                                 f"vocab_size={self.config.vocab_size}; load an intact copy")
        self._adopt_card(files)

    def _adopt_card(self, files: ModelFiles) -> None:
        card = files.card()
        self._card = card if card is not None and is_model_card(card) else None
        self.path_table = files.path_table(self.tree) if self.has_path_table else None
        if self._card is not None or self.path_table is not None:
            self._loaded_sha256 = files.weights_sha256()

    def _new_path_table(self, perplexity: Any) -> PathTable | None:
        """What is to be stored of the paths' perplexities. Raises ValueError where splits are named, but hold other rows."""
        if not perplexity or not self.has_path_table:
            return None
        try:
            table = PathTable.of(perplexity, self.tree, self.n_parameters)
        except ValueError as error:
            if isinstance(perplexity, dict):
                raise ValueError(f"perplexity: {error}. Nothing was written") from None
            return None
        return table if table.splits else None

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
            ValueError: the id is not valid, the Hub refuses or cannot be reached; or as :meth:`save_pretrained`.
        """
        check_hub_options(repo_id=repo_id, revision=revision, token=token, private=private)
        check_hub_options(create_pr=create_pr, commit_message=commit_message)
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise ValueError(f"repo_id={quote(repo_id)}: {shorten(error)}; give one such as 'owner/name'") from None
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "model"
            self.write_into(folder, metadata, location=repo_id)
            try:
                api = HfApi(token=token)
                repo_id = api.create_repo(repo_id=repo_id, private=private, exist_ok=True).repo_id
                options = dict(commit_message=commit_message, revision=revision, create_pr=create_pr)
                commit = api.upload_folder(repo_id=repo_id, folder_path=folder, **options)
            except HUB_ERRORS as error:
                raise ValueError(
                    f"the Hub did not take {quote(repo_id)}: {shorten(error).rstrip('. ')}{upload_remedy(error)}"
                ) from error
        return str(commit)


def _portable(folder: Path) -> str:
    """A name for the folder that tells nothing about the machine it is on."""
    return folder.name if folder.is_absolute() else folder.as_posix()
