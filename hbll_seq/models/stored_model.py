"""A saved model whose weights stay in their file, for whoever needs a part of them, or each for a moment."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

from hbll_seq.models.hub import HubMixin
from hbll_seq.models.hub_source import as_dtype, as_source, find_folder
from hbll_seq.models.model_files import ModelFiles, called, folder_state, read_unchanged
from hbll_seq.utils.tensors import module_tensors, on_meta


class StoredModel:
    """What ``kind.from_pretrained(name)`` loads, in the dtypes that it has there, without the memory for it.

    Every weight is read once and checked, none is kept.

    Args:
        kind: class of the model.
        name: a folder, ``"bundled"`` or a Hub id.

    Attributes:
        model: on the meta device: configuration, tokenizer, and names and shapes of the weights.
        fingerprint: SHA-256 of the weights, with their names, types and shapes.

    Raises:
        ValueError: as :meth:`HubMixin.from_pretrained`.
    """

    def __init__(self, kind: type[HubMixin], name: str):
        self.source = as_source(name)
        self._kind, self._dtype = kind, as_dtype("auto", self.source)
        self._folder = find_folder(self.source, None, None, None, False)
        self._files, self.model, self.fingerprint, self._state = read_unchanged(self._folder, self._checked)

    def _checked(self) -> tuple[ModelFiles, HubMixin, str, list]:
        state, files = folder_state(self._folder), ModelFiles(self._folder, self.source)
        config = files.config(self._kind.__name__, self._kind.config_class)
        model = on_meta(lambda: self._kind(config))
        found = hashlib.sha256()
        for name, tensor in self._read(files, dict(sorted(module_tensors(model).items()))):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            found.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
        model.adopt(files)
        return files, model, found.hexdigest(), state

    def _read(
        self, files: ModelFiles, expected: Mapping[str, Tensor], names: Collection[str] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in files.weights(expected, names):
            yield name, tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    def weights(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """These weights by name, on the CPU, one after the other.

        Raises:
            ValueError: the files are no longer those that were checked.
        """
        self._check_unchanged()
        yield from self._read(self._files, module_tensors(self.model), names)
        self._check_unchanged()

    def _check_unchanged(self) -> None:
        if folder_state(self._folder) != self._state:
            raise ValueError(f"{called(self.source)} was written to while it was being read: try again when that has ended")
