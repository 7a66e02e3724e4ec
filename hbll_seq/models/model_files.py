"""The files of a saved model: their names, and reading them strictly, whole and compared with their sums.

Nothing is allocated for a model before its config.json and the header of its weights are known to agree.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hbll_seq.data.tokenizer import Tokenizer
from hbll_seq.models.config import ModelConfig
from hbll_seq.models.model_card import may_overwrite
from hbll_seq.models.path_table import PathTable
from hbll_seq.tree.topology import DyadicTree
from hbll_seq.utils import migration
from hbll_seq.utils.atomic import whole_folder
from hbll_seq.utils.console import say
from hbll_seq.utils.integrity import SUMS_NAME, read_sums, sha256
from hbll_seq.utils.reading import open_regular, parse_json, possible_name, quote, read_bytes, shorten
from hbll_seq.utils.tensors import check_finite, check_found, listing

CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
TOKENIZER_NAME, CARD_NAME, PATHS_NAME = "tokenizer.model", "README.md", "paths.json"
#: of a language model that was pushed: what transformers runs with trust_remote_code. It is not one of FILES, which loading
#: fetches: no code is ever loaded.
POINTER_NAME = "modeling_hbll.py"
FILES = (CONFIG_NAME, WEIGHTS_NAME, TOKENIZER_NAME, CARD_NAME, SUMS_NAME, PATHS_NAME)
#: those that SHA256SUMS lists; the model card is not one, since people edit it, on the Hub's web page too.
SUMMED = (CONFIG_NAME, WEIGHTS_NAME, TOKENIZER_NAME, PATHS_NAME)
#: the order in which a save replaces them: new sums fit no mixture, and without config.json a folder is no model.
REPLACED = (SUMS_NAME, CARD_NAME, PATHS_NAME, TOKENIZER_NAME, WEIGHTS_NAME, CONFIG_NAME)
#: written by train/lm.py when a run has ended; what tells a finished run from a checkpoint.
METRICS_NAME = "metrics.json"
#: what marks a folder as a training run's
RECORD_NAME = "run.json"
#: the folder of a run's checkpoints, whether it has ended or not
CHECKPOINTS_NAME = "checkpoints"
#: bytes that may be read; the trained paths of 1,023 blocks take 6 million in config.json.
MAX_CONFIG, MAX_HEADER, MAX_TOKENIZER, MAX_CARD, MAX_PATHS = 1 << 24, 1 << 24, 1 << 26, 1 << 24, 1 << 25
WHAT_TO_LOAD = "Give a folder that save_pretrained or train/lm.py has written, or a Hub id such as 'owner/name'"
#: how often a folder that is being written to is read.
ATTEMPTS = 5

#: as safetensors calls them
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip

T = TypeVar("T")


class ModelFiles:
    """The files of one model, compared with the folder's sums as they are read.

    Args:
        folder: where they are.
        source: what the user calls it.

    Raises:
        ValueError: the list of sums is damaged, or a file that it lists is missing.
    """

    def __init__(self, folder: Path, source: str):
        self.folder, self.source = whole_folder(folder), called(source)
        if self.folder != folder:
            say(f"hbll_seq: the last save to {self.source} did not end: this is the model from before it")
        self.sums = self._read_sums()
        self._sha256: dict[str, str] = {}

    def _read_sums(self) -> dict[str, str] | None:
        if not os.path.lexists(self.folder / SUMS_NAME):
            if self.has(CONFIG_NAME):  # else reading it tells the true error
                say(f"hbll_seq: {self.source} has no {SUMS_NAME}: its files are not checked for damage")
            return None
        try:
            sums = read_sums(self.folder / SUMS_NAME)
        except (ValueError, OSError) as error:
            raise ValueError(f"{self.source}: {SUMS_NAME} is damaged ({shorten(error)}); {_INTACT}") from None
        if not sums:
            raise ValueError(f"{self.source}: {SUMS_NAME} is empty; {_INTACT}")
        if missing := [name for name in SUMMED if name in sums and not os.path.lexists(self.folder / name)]:
            raise ValueError(f"{self.source}: {SUMS_NAME} lists {missing[0]}, which is missing; {_INTACT}")
        if loose := [name for name in SUMMED if name not in sums and os.path.lexists(self.folder / name)]:
            say(f"hbll_seq: {self.source}: {SUMS_NAME} does not list {', '.join(loose)}: not checked for damage")
        return sums

    def has(self, name: str) -> bool:
        """Whether the file is there."""
        return os.path.lexists(self.folder / name)

    def read(self, name: str, limit: int) -> bytes:
        """All bytes of a file, compared with its sum.

        Raises:
            ValueError: it is missing, no regular file, too large, or another one than was saved.
        """
        self._check_there(name)
        try:
            data = read_bytes(self.folder / name, limit)
        except (ValueError, OSError) as error:
            raise ValueError(f"{self.source}: {name} cannot be read: {shorten(error)}; load an intact copy") from None
        self._compare(name, hashlib.sha256(data).hexdigest())
        return data

    def _check_there(self, name: str) -> None:
        if self.has(name):
            return
        if (self.folder / CHECKPOINTS_NAME).is_dir() and not self.has(METRICS_NAME):
            raise ValueError(f"{self.source} holds a run that is not finished, and no {name} yet: go on with it by "
                             "train/lm.py --resume --output-dir and this folder")
        raise ValueError(f"{self.source} has no {name}; it holds {_contents(self.folder)}. {WHAT_TO_LOAD}")

    def _compare(self, name: str, found: str) -> None:
        if self.sums is not None and self.sums.get(name, found) != found:
            raise ValueError(
                f"{self.source}: {name} is not the file that {SUMS_NAME} lists: it was damaged or changed, or "
                f"is another model's; {_INTACT}"
            )

    def config(self, architecture: str, config_class: type[ModelConfig]) -> ModelConfig:
        """The configuration. Raises ValueError unless the file holds exactly one of this class."""
        source, data = f"{self.source}: {CONFIG_NAME}", self.read(CONFIG_NAME, MAX_CONFIG)
        try:
            values = parse_json(data)
        except ValueError as error:
            raise ValueError(f"{source} is not valid JSON ({error}); load an intact copy") from None
        if not isinstance(values, dict):
            raise ValueError(f"{source} must hold an object of config keys, not {type(values).__name__}")
        architectures = values.get("architectures", [architecture])
        if architectures != [architecture]:
            raise ValueError(f"{source} is for {quote(architectures)}, not {architecture}; use that class")
        try:
            values = config_class.migrated(values)
            config = config_class.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        # A default in place of a lost key (n_head, say) could fit the weights and still be another model.
        needed = [field.name for field in fields(config_class) if not field.metadata.get("optional")]
        if missing := [name for name in needed if name not in values]:
            raise ValueError(f"{source} lacks {listing(missing)}; add what the model was trained with")
        return config

    def tokenizer(self, vocab_size: int) -> Tokenizer | None:
        """The tokenizer; None where there is none. Raises ValueError when it is no usable one."""
        if not self.has(TOKENIZER_NAME):
            return None
        data = self.read(TOKENIZER_NAME, MAX_TOKENIZER)
        try:
            tokenizer = Tokenizer(data)
        except ValueError as error:
            raise ValueError(f"{self.source}: tokenizer {TOKENIZER_NAME}: {error}") from error
        is_listed = self.sums is not None and TOKENIZER_NAME in self.sums
        if not is_listed and -(-tokenizer.vocab_size // 1024) * 1024 < vocab_size:  # more than padding explains
            say(
                f"hbll_seq: {self.source}: {TOKENIZER_NAME} has {tokenizer.vocab_size} pieces, the model {vocab_size} "
                "tokens: is it the one that the model was trained with?"
            )
        return tokenizer

    def weights(
        self, expected: Mapping[str, Tensor], names: Collection[str] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """The weights by name, one after the other, once the file is known to hold all that it should.

        Args:
            expected: those that the model needs; without values.
            names: those of them that are read; None is all.

        Raises:
            ValueError: the file is damaged, holds others, or one that is read is NaN or infinite.
        """
        self._check_there(WEIGHTS_NAME)
        path, source = self.folder / WEIGHTS_NAME, f"{self.source}: {WEIGHTS_NAME}"
        limit = sum(own.numel() for own in expected.values()) * 8 + MAX_HEADER  # no dtype has more than 8 bytes
        try:
            with open_regular(path, limit) as file:
                size, header = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        except (ValueError, OSError) as error:
            raise ValueError(f"{source} cannot be read: {shorten(error)}; {_REMEDY}") from None
        if self.sums is not None and WEIGHTS_NAME in self.sums:
            self._compare(WEIGHTS_NAME, self.weights_sha256())
        if header > MAX_HEADER:
            raise ValueError(f"{source} claims a header of {header:,} bytes of at most {MAX_HEADER:,}; {_REMEDY}")
        try:
            with safe_open(path, framework="pt") as file:
                in_file = migration.model_tensors(source, file.keys(), expected)
                slices = {name: file.get_slice(old) for name, old in in_file.items()}
                dtypes = {name: _DTYPES.get(part.get_dtype(), part.get_dtype()) for name, part in slices.items()}
                check_found(source, {name: part.get_shape() for name, part in slices.items()}, dtypes, expected)
                for name in expected if names is None else names:
                    # Cloned: safetensors maps the file into memory, and a later change of the file must not reach the model.
                    tensor = file.get_tensor(in_file[name]).clone()
                    check_finite({name: tensor}, source, _BROKE_DOWN)
                    yield name, tensor
                    del tensor
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{source} ({size:,} bytes) is cut short or damaged ({shorten(error)}); {_REMEDY}") from None

    def weights_sha256(self) -> str:
        """SHA-256 of the file of weights, which is computed once. Raises OSError or ValueError when it cannot be read."""
        if WEIGHTS_NAME not in self._sha256:
            self._sha256[WEIGHTS_NAME] = sha256(self.folder / WEIGHTS_NAME)
        return self._sha256[WEIGHTS_NAME]

    def path_table(self, tree: DyadicTree) -> PathTable | None:
        """Perplexities of the model's paths; None where none are stored. Raises ValueError when the file holds others."""
        if not self.has(PATHS_NAME):
            return None
        data = self.read(PATHS_NAME, MAX_PATHS)
        try:
            return PathTable.read(data, tree)
        except ValueError as error:
            raise ValueError(f"{self.source}: {PATHS_NAME}: {error}; {_INTACT}") from None

    def check(self, name: str) -> None:
        """Compare the file with its sum, without keeping it. Raises ValueError when it is missing or another one."""
        self._check_there(name)
        if self.sums is not None and name in self.sums:
            try:
                found = self.weights_sha256() if name == WEIGHTS_NAME else sha256(self.folder / name)
            except (OSError, ValueError) as error:
                raise ValueError(f"{self.source}: {name} cannot be read: {shorten(error)}; load an intact copy") from None
            self._compare(name, found)

    def card(self) -> str | None:
        """The text of README.md; None where there is none that can be read."""
        try:
            return read_card(self.folder)
        except (OSError, ValueError):
            return None


_REMEDY = "copy or download it again, or load an earlier checkpoint"
_BROKE_DOWN = "training broke down before it was saved; load an earlier checkpoint"
_INTACT = f"load an intact copy; if you changed it on purpose, delete {SUMS_NAME}"


def called(path: str | os.PathLike[str]) -> str:
    """A path for a message: quoted, and of a long one the end."""
    text = os.fspath(path)
    return quote(text if len(text) <= 100 else f"...{text[-97:]}")


def read_card(folder: Path) -> str:
    """The text of a folder's README.md, whoever wrote it. Raises as :func:`hbll_seq.utils.reading.read_bytes`."""
    return read_bytes(folder / CARD_NAME, MAX_CARD).decode("utf-8", "replace")


def stored_kind(folder: Path) -> tuple[Any, Any] | None:
    """``architectures`` and ``model_type`` of a folder's config.json, as they stand there, None for one that is missing; None
    alone where the file cannot be read or holds no object, of which loading the model tells."""
    try:
        values = parse_json(read_bytes(whole_folder(folder) / CONFIG_NAME, MAX_CONFIG))
    except (OSError, ValueError):
        return None
    return (values.get("architectures"), values.get("model_type")) if isinstance(values, dict) else None


def read_unchanged(folder: Path, read: Callable[[], T]) -> T:
    """What ``read`` makes of the folder's files, again where another process has written to it meanwhile.

    Raises:
        ValueError: as ``read``; or the folder never stays as it is.
    """
    for _ in range(ATTEMPTS):
        before = folder_state(folder)
        try:
            result = read()
        except (OSError, ValueError) as error:
            if before == folder_state(folder):
                if isinstance(error, OSError):
                    raise ValueError(f"{called(folder)} cannot be read: {shorten(error)}. {WHAT_TO_LOAD}") from None
                raise
        else:
            if before == folder_state(folder):
                return result
    raise ValueError(f"{called(folder)} is being written to all the time; load it when that has ended")


def folder_state(folder: Path) -> list[Any]:
    """What changes when a file that counts is replaced or written to."""
    state: list[Any] = [folder := whole_folder(folder)]
    for name in FILES:
        try:
            info = os.stat(folder / name)
            state.append((info.st_ino, info.st_size, info.st_mtime_ns))
        except OSError:
            state.append(None)
    return state


def _contents(folder: Path) -> str:
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    return shorten(listing(names, limit=8), 150) if names else "nothing"


def find_latest_run(root: str | os.PathLike[str] = "runs") -> Path:
    """The newest finished run below ``root``: a folder with config.json, model.safetensors and a metrics.json that holds an
    object. What cannot be read is passed over.

    Raises:
        ValueError: there is none.
    """
    found = []
    for folder, _, names in os.walk(possible_name(root)):
        if METRICS_NAME in names:
            with suppress(OSError):  # a link to nowhere
                found.append((os.stat(os.path.join(folder, METRICS_NAME)).st_mtime_ns, Path(folder)))
    for _, folder in sorted(found, reverse=True):
        files = whole_folder(folder)
        if all((files / name).is_file() for name in (CONFIG_NAME, WEIGHTS_NAME)) and _is_finished(folder):
            return folder
    raise ValueError(
        f"there is no finished run under {quote(os.fspath(root))} (a folder with {CONFIG_NAME}, {WEIGHTS_NAME} and "
        f"{METRICS_NAME}): train one with `accelerate launch train/lm.py`, or name a folder or a Hub id"
    )


def _is_finished(folder: Path) -> bool:
    try:
        return isinstance(parse_json(read_bytes(folder / METRICS_NAME), null_for_non_finite=True), dict)
    except (OSError, ValueError):
        return False


def has_readme_of_user(folder: Path) -> bool:
    """Whether the folder holds a README.md that is not this library's to replace. Raises ValueError when that cannot be
    known."""
    try:
        return not may_overwrite(read_card(folder))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except ValueError:  # no regular file, or too large for a card
        return True
    except OSError as error:
        raise ValueError(
            f"cannot write to {called(folder)}: its {CARD_NAME} cannot be read ({shorten(error)}). Nothing was "
            "changed there; make it readable, or choose another folder"
        ) from error
