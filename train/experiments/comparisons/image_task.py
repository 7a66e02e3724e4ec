"""Images and their classes as what a comparison over depth learns, and generated ones for a first look and for tests.

Shapes: B images of a batch, C channels, H x W pixels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from comparisons.depth_methods import DepthMethod
from comparisons.tasks import Classes
from hbll_seq.data.image_changes import check_share, crop_and_flip, hide_patches, with_wrong_labels
from hbll_seq.data.images import Images
from hbll_seq.evaluation.perplexity import logits_of_paths
from hbll_seq.models.hierarchy import DepthHierarchy
from hbll_seq.models.image_classification import HBLLForImageClassification, HBLLImageConfig
from hbll_seq.utils.modules import evaluation_mode
from hbll_seq.utils.seeds import mix_seeds

#: what random numbers are drawn for; of the order of the images and of wrong labels all runs have the same
_ORDER, _WRONG, _MISSING, _CHANGED = range(4)
#: images at once where a model is evaluated
BATCH = 500
#: classes from which on the share of images whose class is among the five most likely is worth telling
MANY_CLASSES = 20


def divide(train: Images, test: Images, n_train: int | None, n_validation: int) -> dict[str, Images]:
    """The images of ``"train"``, ``"validation"`` and ``"test"``: the first two are drawn from the training images, in an
    order that is shuffled once, since those of a folder come class after class.

    Raises:
        ValueError: there are fewer than were asked for, or those of the test have another size or other classes.
    """
    if test.classes != train.classes:
        ours, theirs = (", ".join(part.classes[:20]) for part in (train, test))
        raise ValueError(f"test has the classes {theirs}, training images have {ours}: give both the same in the same order")
    sizes = [" x ".join(map(str, part.pixels.shape[2:])) for part in (test, train)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"test images of {sizes[0]} pixels, training images of {sizes[1]}: resize all of them to one size")
    n = len(train.labels)
    if not 1 <= n_validation < n:
        raise ValueError(f"validation-images={n_validation} of {n} training images: choose 1 to {n - 1}; without any, "
                         "nothing can choose between learning rates")  # fmt: skip
    n_train = n - n_validation if n_train is None else n_train
    if not 1 <= n_train <= n - n_validation:
        raise ValueError(f"train-images={n_train}: of {n} images {n_validation} are held out; choose at least 1 and at most "
                         f"{n - n_validation}")  # fmt: skip
    order = torch.randperm(n, generator=torch.Generator().manual_seed(mix_seeds(_ORDER)))
    parts = {"train": order[:n_train], "validation": order[n - n_validation :]}
    found = {split: Images(train.pixels[index], train.labels[index], train.classes) for split, index in parts.items()}
    return {**found, "test": test}


class ImageTask(Classes):
    """Classes of images; the figure of a path is its accuracy in percent.

    Args:
        images: ``"train"``, ``"validation"`` and ``"test"``.
        patch_size, pooling: of the model; patches are also what is missing.
        missing: share of the patches that an image lacks: in training others at each reading, elsewhere always the same.
        wrong_labels: share of the training images that have another class's label.
        augment: training images are shifted and mirrored at random.
        device: where they go.

    Raises:
        ValueError: a share is out of range.
    """

    def __init__(
        self, images: Mapping[str, Images], patch_size: int, pooling: str = "mean", missing: float = 0.0,
        wrong_labels: float = 0.0, augment: bool = True, device: str = "cpu",
    ):  # fmt: skip
        for name, share in (("missing", missing), ("wrong-labels", wrong_labels)):
            check_share(name, share)
        self.classes, self.patch_size, self.pooling = images["train"].classes, patch_size, pooling
        self.missing, self.augment = missing, augment
        digest = hashlib.sha256("".join(part.fingerprint for part in images.values()).encode()).hexdigest()
        data = {split: (part.pixels.to(device), part.labels.to(device)) for split, part in images.items()}
        pixels, labels = data["train"]
        shown = pixels.transpose(0, 1).flatten(1).float() / 255
        self.mean, self.std = (tuple(round(float(v), 4) for v in by) for by in (shown.mean(1), shown.std(1)))
        data["train"] = pixels, with_wrong_labels(labels, wrong_labels, len(self.classes), mix_seeds(_WRONG))
        super().__init__(data, digest[:16])

    def model(self, method: DepthMethod, n_level: int, **sizes: Any) -> HBLLForImageClassification:
        """A new model of a method for these images; sizes: of its configuration."""
        return HBLLForImageClassification(HBLLImageConfig(
            image_size=self.data["train"][0].shape[-1], patch_size=self.patch_size, pooling=self.pooling,
            n_classes=len(self.classes), n_level=n_level, pixel_mean=self.mean, pixel_std=self.std, class_names=self.classes,
            **sizes, **dict(method.config),
        ))  # fmt: skip

    def batch(self, step: int, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
        """See :meth:`Task.batch`."""
        pixels, labels = super().batch(step, batch_size, seed)
        if self.augment:
            pixels = crop_and_flip(pixels, mix_seeds(seed, step, _CHANGED))
        return self._read(pixels, mix_seeds(seed, step, _MISSING)), labels

    def _read(self, pixels: Tensor, seed: int) -> Tensor:
        """Pixels of 0 to 1, of which some are missing."""
        pixels = pixels.float() / 255
        if not self.missing:
            return pixels
        return hide_patches(pixels, self.missing, self.patch_size, torch.tensor(self.mean), seed)

    def evaluate(
        self, model: DepthHierarchy, split: str, n_batches: int | None = None, *, paths: Mapping[str, Sequence[int]]
    ) -> list[dict]:
        """A row per path; of the first batches of ``BATCH`` images. ``top5``, where there are ``MANY_CLASSES``: the
        percentage of images whose class is among the five most likely."""
        pixels, labels = self.data[split]
        totals = {name: torch.zeros(3, dtype=torch.float64) for name in paths}
        n = 0
        with evaluation_mode(model):
            for i, (part, answers) in enumerate(list(zip(pixels.split(BATCH), labels.split(BATCH)))[:n_batches]):
                x, answers = model.prepare(self._read(part, mix_seeds(i, _MISSING)), answers)
                for name, logits in logits_of_paths(model, model.calls, x, paths):
                    totals[name] += _figures(logits, answers)
                n += len(answers)
        rows = []
        for name, path in paths.items():
            nats, right, among = (totals[name] / n).tolist()
            row = {"name": name, "path": list(path), "depth": len(path), "loss": nats, "accuracy": 100 * right}
            rows.append({**row, "top5": 100 * among} if len(self.classes) >= MANY_CLASSES else row)
        return rows


def _figures(logits: Tensor, answers: Tensor) -> Tensor:
    """Sums over a batch: nats, images that are classified right, and those whose class is among the first five."""
    among = (logits.topk(min(5, logits.shape[1])).indices == answers[:, None]).any(1)  # not by rank: NaN has none
    nats = F.cross_entropy(logits.float(), answers, reduction="sum")
    return torch.stack((nats.double(), (logits.argmax(1) == answers).sum().double(), among.sum().double())).cpu()


def generated(n: int, seed: int, n_classes: int = 10, size: int = 32) -> Images:
    """Stripes of random phase and contrast in noise on a ground; the class is their direction and the colours. For a first
    look and for tests.

    Args:
        n: images, the classes in turn.
        seed: of phases, contrasts and noise.
        n_classes, size: how many classes, and H = W.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % n_classes
    angle = math.pi * labels / n_classes
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    along = angle.cos()[:, None, None] * rows + angle.sin()[:, None, None] * columns
    phase, contrast = (torch.rand(n, generator=generator)[:, None, None] for _ in range(2))
    stripes = (2 * math.pi * (along / 8 + phase)).sin() * (0.3 + 0.7 * contrast)
    colour = 0.5 + 0.5 * torch.stack([(angle + 2 * math.pi * k / 3).cos() for k in range(3)], dim=1)
    noise = torch.randn(n, 3, size, size, generator=generator)
    pixels = 128 + 60 * (colour[:, :, None, None] - 0.5) + 60 * stripes[:, None] * colour[:, :, None, None] + 40 * noise
    return Images(pixels.round().clamp(0, 255).byte(), labels, tuple(f"class {k}" for k in range(n_classes)))
