"""Images and their classes: CIFAR from the Hub, from its binary files, or any folder of class folders, which is kept in the
cache.

Shapes: n images, C = 3 channels, H x W pixels.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from hbll_seq.data.hub_datasets import load_hub_dataset
from hbll_seq.data.tokens import cache_folder
from hbll_seq.utils.atomic import atomic_write
from hbll_seq.utils.console import say
from hbll_seq.utils.reading import possible_name, quote, shorten
from hbll_seq.utils.values import check_choice

SPLITS = ("train", "test")
#: names of an image file, whatever their case
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".webp")
#: the official binary files: for each split its files, bytes of labels before an image, and the file of the classes' names
_BINARY = {
    "CIFAR-10": ({"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}, 1, "batches.meta.txt"),
    "CIFAR-100": ({"train": ["train.bin"], "test": ["test.bin"]}, 2, "fine_label_names.txt"),
}
_N_CLASSES = {"CIFAR-10": 10, "CIFAR-100": 100}
_SIZE = 32  # of their images
_LAYOUTS = (
    "give a folder with train/CLASS/*.png and test/CLASS/*.png, one with CIFAR's binary files (data_batch_1.bin .. "
    "test_batch.bin, or train.bin and test.bin), or a Hub id such as uoft-cs/cifar10"
)


class Images(NamedTuple):
    """pixels: [n, 3, H, W] of uint8. labels: [n] of int64. classes: their names, in the order of their numbers."""

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """Identifies pixels and labels: 16 hexadecimal digits."""
        return _sum_of(self.pixels, self.labels)[:16]


def load_images(
    source: str = "uoft-cs/cifar10", split: str = "train", *, cache_dir: str | os.PathLike[str] | None = None
) -> Images:
    """The images of a split, in the order of their files: of a folder of class folders, class after class.

    Reading tens of thousands of files takes seconds, so that what was read of class folders is kept in the cache, by the
    files' paths, sizes and times of change. A file that was changed and kept both its size and its time is not noticed: the
    images of before are returned. ``touch`` one file of the split, or delete the folder ``images`` of the cache, and all are
    read again. Of CIFAR's binary files and of the Hub nothing is kept here.

    Args:
        source: a folder ``train/CLASS/*.png``, ``test/CLASS/*.png``; one of CIFAR's binary files; or a Hub id with columns
            ``img`` or ``image``, and ``label`` or ``fine_label``.
        split: one of ``SPLITS``.
        cache_dir: default $HBLL_CACHE, else $XDG_CACHE_HOME/hbll_seq, else ~/.cache/hbll_seq.

    Raises:
        ValueError: the split is unknown, there are no such images, a file is no image, cut short, or of more than a byte
            a pixel, the images have several sizes, a class has no image, labels are no classes, or train and test have
            different classes.
    """
    check_choice("split", split, SPLITS)
    folder = possible_name(source)
    if not folder.is_dir():
        return _of_hub(source, split)
    for name, (files, n_labels, names) in _BINARY.items():
        if (folder / files[split][0]).is_file():
            return _of_binary_files(folder, [folder / file for file in files[split]], n_labels, names, _N_CLASSES[name])
    classes = _classes_of(folder, split)
    paths = [_files_of(folder / split / name) for name in classes]
    return _cached(sum(paths, []), cache_folder(cache_dir), lambda: _read_folders(folder, classes, paths))


# ---------------------------------------------------------------------------------------------------------------- folders


def _classes_of(folder: Path, split: str) -> list[str]:
    """The names of the class folders, in alphabetical order, after checking that train and test have the same."""
    found = {}
    for each in SPLITS:
        if not (folder / each).is_dir():
            raise ValueError(f"{quote(str(folder))} holds no images that can be read: it has no folder {each}; {_LAYOUTS}")
        found[each] = sorted(e.name for e in os.scandir(folder / each) if e.is_dir() and not e.name.startswith("."))
    if not found[split]:
        raise ValueError(f"{quote(str(folder / split))} holds no class folders; {_LAYOUTS}")
    if other := sorted(set(found["train"]) ^ set(found["test"])):
        where = "train" if other[0] in found["train"] else "test"
        raise ValueError(f"{quote(str(folder))}: the class {quote(other[0])} is in {where} alone ({len(other)} such classes)"
                         "; give both splits the same class folders")
    if len(found[split]) < 2:
        raise ValueError(f"{quote(str(folder))} holds one class, {quote(found[split][0])}: there is nothing to tell apart; "
                         "give two class folders or more")
    return found[split]


def _files_of(folder: Path) -> list[Path]:
    """The image files of a class. Raises ValueError where there is none."""
    paths = sorted(Path(e.path) for e in os.scandir(folder) if e.is_file() and e.name.lower().endswith(SUFFIXES))
    if not paths:
        raise ValueError(f"the class folder {quote(str(folder))} holds no image ({', '.join(SUFFIXES)}): fill it, or leave "
                         "the class out of both splits")
    return paths


def _read_folders(folder: Path, classes: Sequence[str], paths: Sequence[Sequence[Path]]) -> Images:
    labelled = [(path, label) for label, of_class in enumerate(paths) for path in of_class]
    bar = tqdm(labelled, "reading images", leave=False, disable=None, delay=2)
    pixels = _stacked((_pixels(path, str(path)), str(path)) for path, _ in bar)
    return Images(pixels, torch.tensor([label for _, label in labelled]), tuple(classes))


def _pixels(source, name: str) -> np.ndarray:
    """[H, W, 3] of an image file or of Pillow's image. Raises ValueError where it is none, or of more than a byte a pixel."""
    from PIL import Image  # not needed for anything else

    try:
        with source if isinstance(source, Image.Image) else Image.open(source) as image:
            if image.mode.startswith(("I", "F")):  # convert would cut off what is above 255
                raise ValueError(f"it is of mode {image.mode}, grey of more than 8 bits")
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises for files that are broken
        raise ValueError(f"{quote(name)} is no image that can be read ({shorten(error)}): fetch or convert it again, or "
                         "take it out") from None


def _stacked(images) -> Tensor:
    """Images [H, W, 3], each with a name for messages, as one tensor [n, 3, H, W] of uint8."""
    found: list[np.ndarray] = []
    first = ""
    for pixels, name in images:
        if found and pixels.shape != found[0].shape:
            (height, width), (h, w) = pixels.shape[:2], found[0].shape[:2]
            raise ValueError(f"images of several sizes: {quote(name)} has {height} x {width} pixels, {quote(first)} has "
                             f"{h} x {w}; resize all of them to one size")
        found.append(pixels)
        first = first or name
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).contiguous()


# ----------------------------------------------------------------------------------------------------------- other sources


def _of_binary_files(folder: Path, paths: Sequence[Path], n_labels: int, names: str, n_classes: int) -> Images:
    """CIFAR's own files: an image is its labels, a byte each, of which the last one counts, and 3 x 32 x 32 bytes."""
    length = n_labels + 3 * _SIZE**2
    parts = []
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{quote(str(folder))} lacks {path.name}: unpack the whole archive")
        raw = np.fromfile(path, np.uint8)
        if not raw.size or raw.size % length:
            raise ValueError(f"{quote(str(path))} of {raw.size:,} bytes: must be a multiple of {length:,}; fetch it again")
        parts.append(raw.reshape(-1, length))
    rows = torch.from_numpy(np.concatenate(parts))
    labels = rows[:, n_labels - 1].long()
    if labels.max() >= n_classes:
        raise ValueError(f"{quote(str(paths[0]))}: class {int(labels.max())} of {n_classes}; fetch the file again")
    classes = tuple(map(str, range(n_classes)))
    if (folder / names).is_file():
        told = (folder / names).read_text("utf-8", "replace").split()
        classes = tuple(told) if len(told) == n_classes else classes
    return Images(rows[:, n_labels:].reshape(-1, 3, _SIZE, _SIZE).contiguous(), labels, classes)


def _of_hub(source: str, split: str) -> Images:
    try:
        dataset = load_hub_dataset(source, split=split)
    except Exception as error:
        raise ValueError(f"images could not be had from {quote(source)}, which is no folder here, nor from the Hub under "
                         f"that id ({type(error).__name__}): {_LAYOUTS}") from error
    columns = [next((c for c in wanted if c in dataset.features), None) for wanted in
               (("img", "image"), ("fine_label", "label"))]  # fmt: skip
    if None in columns:
        raise ValueError(f"{quote(source)} has the columns {', '.join(dataset.features)}: there must be img or image, and "
                         "label or fine_label; choose another data set")
    image, label = columns
    labels = dataset[label][:]
    if not labels or not all(type(each) is int for each in labels):
        raise ValueError(f"{quote(source)}: the column {label} is no class number ({quote(labels[:3])}, ..); choose another "
                         "data set, or write its images to class folders")
    names = tuple(getattr(dataset.features[label], "names", None) or map(str, range(max(labels) + 1)))
    if min(labels) < 0 or max(labels) >= len(names):
        raise ValueError(f"{quote(source)}: the split {split} has classes {min(labels)} to {max(labels)} of {len(names)}; "
                         "choose a data set whose labels are not kept back")
    bar = tqdm(dataset[image], "reading images", leave=False, disable=None, delay=2)
    named = ((each, f"{source}, image {i}") for i, each in enumerate(bar))
    pixels = _stacked((_pixels(each, name), name) for each, name in named)
    return Images(pixels, torch.tensor(labels), names)


# ------------------------------------------------------------------------------------------------------------------ cache


def _cached(paths: Sequence[Path], cache: Path, read: Callable[[], Images]) -> Images:
    """What ``read`` makes of these files, or what it made of them before."""
    key = hashlib.sha256()
    for path in paths:
        info = path.stat()
        key.update(f"{path.absolute()}\0{info.st_size}\0{info.st_mtime_ns}\n".encode(errors="surrogateescape"))
    file = cache / "images" / f"{key.hexdigest()[:32]}.safetensors"
    if file.is_file():
        try:
            return _open(file)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            say(f"hbll_seq: the images in the cache are broken ({shorten(error)}) and are read again")
    images = read()
    told = {"classes": json.dumps(images.classes), "sha256": _sum_of(images.pixels, images.labels)}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, safetensors.torch.save({"pixels": images.pixels, "labels": images.labels}, told))
    except OSError as error:
        say(f"hbll_seq: the images are not kept for the next time ({shorten(error)}): set HBLL_CACHE to a folder that can be "
            "written and has room")
    return images


def _open(file: Path) -> Images:
    with safe_open(file, "pt") as stored:
        told = stored.metadata()
        images = Images(stored.get_tensor("pixels"), stored.get_tensor("labels"), tuple(json.loads(told["classes"])))
    if _sum_of(images.pixels, images.labels) != told["sha256"]:
        raise ValueError("its bytes are not those that were written")
    return images


def _sum_of(pixels: Tensor, labels: Tensor) -> str:
    digest = hashlib.sha256(repr(tuple(pixels.shape)).encode())
    for tensor in (pixels, labels):
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()
