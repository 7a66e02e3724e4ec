"""Random crops and flips, missing patches and wrong labels: what they do to each image, and that a seed says it all."""

import pytest
import torch
import torch.nn.functional as F

from hbll_seq.data.image_changes import crop_and_flip, hide_patches, with_wrong_labels


def images_of(n=64, size=12):
    """No two pixels are alike and none is black."""
    return 1 + torch.arange(n * 3 * size * size).view(n, 3, size, size)


def test_every_image_is_a_part_of_its_padded_self_mirrored_or_not():
    images, seen = images_of(), set()
    changed = crop_and_flip(images, seed=1, padding=2)
    for before, after in zip(F.pad(images, (2, 2, 2, 2)), changed, strict=True):
        ways = {False: after, True: after.flip(-1)}
        found = [(down, right, mirrored) for down in range(5) for right in range(5) for mirrored, image in ways.items()
                 if torch.equal(image, before[:, down : down + 12, right : right + 12])]  # fmt: skip
        assert len(found) == 1
        seen.add(found[0])
    for place, n in ((0, 5), (1, 5), (2, 2)):
        assert len({each[place] for each in seen}) == n  # every shift, and both ways round
    assert changed.dtype == images.dtype and changed.shape == images.shape


def test_a_seed_says_it_all():
    images = images_of().float()
    fill = torch.zeros(3)
    for change in (lambda seed: crop_and_flip(images, seed), lambda seed: hide_patches(images, 0.5, 4, fill, seed)):
        assert torch.equal(change(3), change(3)) and not torch.equal(change(3), change(4))
    assert torch.equal(crop_and_flip(images, 3, padding=0).sort(-1).values, images)  # mirrored at most


@pytest.mark.parametrize("share, n_missing", [(0.0, 0), (0.5, 4), (0.8, 7), (1.0, 9)])
def test_that_share_of_the_patches_of_every_image_is_the_mean(share, n_missing):
    images, fill = torch.rand(50, 3, 12, 12) + 2, torch.tensor([0.1, 0.2, 0.3])
    found = hide_patches(images, share, 4, fill, seed=0)
    is_fill = (found == fill[:, None, None]).all(1)
    patches = is_fill.view(50, 3, 4, 3, 4).transpose(2, 3).flatten(3)
    assert torch.equal(patches.any(-1), patches.all(-1))  # whole patches
    missing = patches.all(-1).flatten(1)
    assert (missing.sum(1) == n_missing).all()
    assert torch.equal(found[~is_fill[:, None].expand_as(found)], images[~is_fill[:, None].expand_as(found)])
    if 0 < n_missing < 9:
        assert len({tuple(row) for row in missing.tolist()}) > 20  # a draw of its own for every image


@pytest.mark.parametrize("n_classes", [2, 10])
def test_that_share_of_the_labels_is_wrong_and_no_other(n_classes):
    labels = torch.arange(2000) % n_classes
    wrong = with_wrong_labels(labels, 0.2, n_classes, seed=0)
    changed = wrong != labels
    assert changed.sum() == 400 and 0 <= wrong.min() and wrong.max() < n_classes
    if n_classes > 2:  # all other classes alike
        distances = ((wrong - labels) % n_classes)[changed].bincount(minlength=n_classes)
        assert distances[0] == 0 and distances[1:].min() > 20
    assert torch.equal(with_wrong_labels(labels, 0.2, n_classes, seed=0), wrong)
    assert not torch.equal(with_wrong_labels(labels, 0.2, n_classes, seed=1), wrong)
    assert torch.equal(with_wrong_labels(labels, 0.0, n_classes, seed=0), labels)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), "half", True, None])
def test_shares_out_of_range(share):
    for change in (lambda: hide_patches(torch.zeros(1, 3, 8, 8), share, 4, torch.zeros(3), 0),
                   lambda: with_wrong_labels(torch.zeros(4, dtype=torch.int64), share, 2, 0)):  # fmt: skip
        with pytest.raises(ValueError, match="share=.*must be a number from 0 to 1"):
            change()


def test_other_arguments_out_of_range():
    with pytest.raises(ValueError, match="patch_size=3 with images of 8 x 8 pixels: must divide both"):
        hide_patches(torch.zeros(1, 3, 8, 8), 0.5, 3, torch.zeros(3), 0)
    with pytest.raises(ValueError, match="padding=-1"):
        crop_and_flip(torch.zeros(1, 3, 8, 8), 0, padding=-1)
    with pytest.raises(ValueError, match="patch_size=0"):
        hide_patches(torch.zeros(1, 3, 8, 8), 0.5, 0, torch.zeros(3), 0)
    with pytest.raises(ValueError, match="images of torch.uint8: .*images.float.. / 255"):  # a mean of 0.5 would be black
        hide_patches(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 0.5, 4, torch.full((3,), 0.5), 0)
    with pytest.raises(ValueError, match="n_classes=1"):
        with_wrong_labels(torch.zeros(4, dtype=torch.int64), 0.5, 1, 0)
