"""MNIST for comparisons: images that are held out to choose learning rates, and the accuracy of a network by its depth."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping, Sequence

import torch

from comparisons.tasks import Classes
from hbll_seq.data.mnist import load_mnist
from hbll_seq.models.hierarchy import DepthHierarchy


class ClassesByDepth(Classes):
    """The same for a hierarchy of blocks, whose paths are networks of their own."""

    @torch.no_grad()
    def evaluate(
        self, model: DepthHierarchy, split: str, n_batches: int | None = None, *, paths: Mapping[str, Sequence[int]],
        batch_size: int = 1000,
    ) -> dict[str, float]:  # fmt: skip
        """Percentage of all images that each path gets right, by the name of the path."""
        values, labels = self.data[split]
        found = {}
        for name, path in paths.items():
            predicted = torch.cat([model(batch, path).argmax(-1) for batch in values.split(batch_size)[:n_batches]])
            found[name] = round(100.0 * (predicted == labels[: len(predicted)]).double().mean().item(), 4)
        return found


def load_digits(source: str, train_images: int | None, validation_images: int) -> Classes:
    """Pixels and labels by split, with a fingerprint of all of them.

    Args:
        source: folder of the four idx files, or a Hub id.
        train_images: the first so many are trained on; None takes all that are not held out.
        validation_images: the last so many of the training set are held out.

    Raises:
        ValueError: they cannot be had, or there are fewer than were asked for.
    """
    train, test = (load_mnist(source, split) for split in ("train", "test"))
    digest = hashlib.sha256()
    for pixels, labels in (train, test):
        digest.update((pixels * 255).round().byte().numpy())
        digest.update(labels.numpy())
    (pixels, labels), n_held = train, validation_images
    if not 0 <= n_held < len(labels):
        raise ValueError(f"validation-images={n_held} of {len(labels)} training images: choose 0 to {len(labels) - 1}")
    rest = len(labels) - n_held
    n_train = rest if train_images is None else train_images
    if not 1 <= n_train <= rest:
        raise ValueError(
            f"train-images={n_train}: of {len(labels)} images {n_held} are held out; choose at least 1 and at most {rest}"
        )
    data = {"train": (pixels[:n_train], labels[:n_train]), "test": test}
    if n_held:
        data["validation"] = (pixels[rest:], labels[rest:])
    return Classes(data, digest.hexdigest()[:16])


def steps_of(args: argparse.Namespace, n_train: int) -> int:
    """Steps of a run: ``args.steps``, or those of ``args.epochs`` passes over so many images in whole batches.

    Raises:
        ValueError: batch size or number of epochs is out of range.
    """
    if not 1 <= args.batch_size <= n_train:
        raise ValueError(f"batch-size={args.batch_size} of {n_train} training images: choose 1 to {n_train}")
    if args.epochs is None:
        return args.steps
    if args.epochs < 1:
        raise ValueError(f"epochs={args.epochs}: must be a whole number of at least 1")
    return args.epochs * (n_train // args.batch_size)


def check_choosing(name: str, rates: Sequence[float], validation_images: int) -> None:
    """Raises ValueError where several learning rates are given, and no images are held out to choose between them.

    Args:
        name: of the option that gives the rates.
        rates, validation_images: as given.
    """
    if len(rates) > 1 and not validation_images:
        raise ValueError(f"{name} of {len(rates)} rates with validation-images=0: nothing can choose between them; hold "
                         "images out, such as 5000, or give one rate")  # fmt: skip
