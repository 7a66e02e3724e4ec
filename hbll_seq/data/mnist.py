"""MNIST digits from a folder of idx files or from the Hub."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hbll_seq.data.hub_datasets import load_hub_dataset
from hbll_seq.utils.reading import quote
from hbll_seq.utils.values import check_choice

_FILES = {"train": "train", "test": "t10k"}


def read_idx(path: Path) -> np.ndarray:
    """An array of bytes in idx format, compressed or not.

    Raises:
        ValueError: the file is not idx, not of bytes, or shorter than its header says.
    """
    raw = path.read_bytes()
    try:
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
        zeros, kind, n_dims = struct.unpack(">HBB", raw[:4])
        shape = struct.unpack(f">{n_dims}I", raw[4 : 4 + 4 * n_dims])
    except (struct.error, OSError, EOFError) as error:
        raise ValueError(f"{path} is not a complete idx file ({error}): fetch it again") from None
    if zeros or kind != 8:
        raise ValueError(f"{path} is not an idx file of bytes: it must start with 00 00 08")
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * n_dims)
    if values.size != np.prod(shape):
        raise ValueError(f"{path} holds {values.size} values where its header says {shape}: fetch it again")
    return values.reshape(shape)


def load_mnist(source: str = "ylecun/mnist", split: str = "train") -> tuple[Tensor, Tensor]:
    """Digits as pixels in [0, 1] and their labels: float32 [n, 784], int64 [n].

    Args:
        source: a folder that holds ``train-images-idx3-ubyte`` and so on (``.gz`` or not), or a Hub id.
        split: ``"train"`` (60,000) or ``"test"`` (10,000).

    Raises:
        ValueError: the split is unknown, a file is missing or damaged, or the Hub cannot be reached.
    """
    check_choice("split", split, _FILES)
    if Path(source).is_dir():
        images, labels = (
            read_idx(_find(Path(source), f"{_FILES[split]}-{kind}-ubyte")) for kind in ("images-idx3", "labels-idx1")
        )
    else:
        try:
            dataset = load_hub_dataset(source, split=split)
        except Exception as error:
            raise ValueError(
                f"MNIST could not be had from {quote(source)}, which is no folder here, nor from the Hub under that id "
                f"({type(error).__name__}): give a folder with the four idx files"
            ) from error
        images = np.stack([np.asarray(image) for image in dataset["image"]])
        labels = np.asarray(dataset["label"])
    pixels = torch.from_numpy(images.reshape(len(images), -1).astype(np.float32) / 255)
    return pixels, torch.from_numpy(labels.astype(np.int64))


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise ValueError(f"{folder} holds neither {name} nor {name}.gz: give the folder with the four idx files")
