"""What becomes of images before a model reads them: random crops and flips, missing patches, wrong labels.

All of it is a pure function of a seed, on whatever device the images are: a run that is repeated, or goes on from a step,
sees the same. Random numbers are drawn on the CPU, so that a GPU gives the same ones.

Shapes: B images, C channels, H x W pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hbll_seq.utils.reading import quote
from hbll_seq.utils.values import as_whole, number_or_none


def crop_and_flip(images: Tensor, seed: int, padding: int = 4) -> Tensor:
    """A random part of every image after ``padding`` black pixels were put on each side, and half of them mirrored.

    Args:
        images: [B, C, H, W] of any dtype, 0 being black.
        seed: of the draw, best mixed of the run's seed and the step.
        padding: largest shift in pixels; 0 flips alone.

    Returns:
        Images of the same shape and dtype.

    Raises:
        ValueError: the padding is below 0.
    """
    padding = as_whole("padding", padding, 0)
    n, _, height, width = images.shape
    generator = torch.Generator().manual_seed(seed)
    down, right = torch.randint(2 * padding + 1, (2, n), generator=generator).to(images.device)
    is_mirrored = torch.rand(n, generator=generator).to(images.device) < 0.5
    rows = down[:, None] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    columns = right[:, None] + torch.where(is_mirrored[:, None], columns.flip(0), columns)
    padded = F.pad(images, (padding,) * 4)
    every = torch.arange(n, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[every, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def hide_patches(images: Tensor, share: float, patch_size: int, fill: Tensor, seed: int) -> Tensor:
    """Images with this share of their patches missing: a draw of its own for every image.

    Args:
        images: [B, C, H, W] of floating point.
        share: of the patches that are missing, 0 to 1; their number is rounded.
        patch_size: height and width of a patch in pixels; must divide H and W.
        fill: [C], what a missing pixel is: the mean, which a model's normalisation makes zero.
        seed: of the draw.

    Raises:
        ValueError: the share is out of range, the patches do not fit, or the images are of whole numbers.
    """
    check_share("share", share)
    patch_size = as_whole("patch_size", patch_size, 1)
    if not images.is_floating_point():  # a mean of 0 to 1 would become black
        raise ValueError(f"images of {images.dtype}: must be of floating point, as ``fill`` is; images.float() / 255")
    n, _, height, width = images.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"patch_size={patch_size} with images of {height} x {width} pixels: must divide both")
    grid = (height // patch_size, width // patch_size)
    n_patches = grid[0] * grid[1]
    n_missing = round(share * n_patches)
    order = torch.rand(n, n_patches, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    is_missing = torch.zeros(n, n_patches, dtype=torch.bool).scatter_(1, order[:, :n_missing], True).to(images.device)
    of_pixels = is_missing.view(n, 1, *grid).repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)
    return torch.where(of_pixels, fill.to(images)[:, None, None], images)


def with_wrong_labels(labels: Tensor, share: float, n_classes: int, seed: int) -> Tensor:
    """Labels of which this share is wrong: another class, all others alike.

    Args:
        labels: [n] of int64, in 0 .. ``n_classes`` - 1.
        share: of wrong ones, 0 to 1; their number is rounded.
        n_classes: at least 2.
        seed: of the draw.

    Raises:
        ValueError: the share or the number of classes is out of range.
    """
    check_share("share", share)
    n, n_classes = len(labels), as_whole("n_classes", n_classes, 2)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(n, generator=generator)[: round(share * n)]
    wrong = labels.cpu().clone()
    wrong[chosen] = (wrong[chosen] + torch.randint(1, n_classes, chosen.shape, generator=generator)) % n_classes
    return wrong.to(labels.device)


def check_share(name: str, share: float) -> None:
    """Raises ValueError unless the share is a number of 0 to 1."""
    value = number_or_none(share)
    if value is None or not 0 <= value <= 1:
        raise ValueError(f"{name}={quote(share)}: must be a number from 0 to 1, such as 0.5 for half of them")
