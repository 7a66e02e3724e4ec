"""Images from folders, CIFAR's binary files and the Hub: the same pixels from all of them, kept once, mistakes named."""

import os
import shutil

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hbll_seq.data import images as module
from hbll_seq.data.images import load_images

CLASSES = ("ant", "bee", "cow")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("HBLL_CACHE", str(folder))
    return folder


def pictures(n, size=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Two images of every class and split; returns the pixels by split too."""
    made = {}
    for seed, split in enumerate(("train", "test")):
        made[split] = pictures(2 * len(CLASSES), seed=seed)
        for i, pixels in enumerate(made[split]):
            path = tmp_path / "data" / split / CLASSES[i // 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return tmp_path / "data", made


def write_binary(folder, n_labels, names):
    """CIFAR's own layout, of few images: files, each with its labels (the last one counts) before the pixels."""
    folder.mkdir()
    made = {}
    for seed, name in enumerate(names):
        pixels, labels = pictures(4, seed=seed), np.arange(4 * n_labels, dtype=np.uint8).reshape(4, n_labels)
        rows = np.concatenate((labels, pixels.transpose(0, 3, 1, 2).reshape(4, -1)), axis=1)
        rows.tofile(folder / name)
        made[name] = pixels, labels[:, -1]
    return made


# ------------------------------------------------------------------------------------------------------------- sources


def test_a_folder_of_classes(folder):
    path, made = folder
    for split, pixels in made.items():
        found = load_images(str(path), split)
        assert found.classes == CLASSES and found.labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert found.pixels.dtype == torch.uint8
        assert np.array_equal(found.pixels.permute(0, 2, 3, 1).numpy(), pixels)


def test_grey_images_and_other_files_of_a_folder(folder):
    path, made = folder
    Image.fromarray(made["train"][0]).convert("L").save(path / "train" / "ant" / "0.png")
    (path / "train" / "ant" / "notes.txt").write_text("x")
    (path / "train" / ".hidden").mkdir()
    found = load_images(str(path), "train")
    assert found.pixels.shape == (6, 3, 32, 32) and torch.equal(found.pixels[0, 0], found.pixels[0, 2])


def test_the_official_files_of_cifar_10(tmp_path):
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    made = write_binary(tmp_path / "c", 1, names)
    train, test = (load_images(str(tmp_path / "c"), split) for split in ("train", "test"))
    assert train.pixels.shape == (20, 3, 32, 32) and test.pixels.shape == (4, 3, 32, 32)
    assert np.array_equal(train.pixels[4:8].permute(0, 2, 3, 1).numpy(), made["data_batch_2.bin"][0])
    assert train.labels.tolist() == 5 * [0, 1, 2, 3] and train.classes == tuple(map(str, range(10)))
    told = "airplane automobile bird cat deer dog frog horse ship truck".split()
    (tmp_path / "c" / "batches.meta.txt").write_text("\n".join([*told, "", ""]))
    assert load_images(str(tmp_path / "c"), "test").classes == tuple(told)


def test_the_official_files_of_cifar_100_hold_the_coarse_label_before_the_fine_one(tmp_path):
    write_binary(tmp_path / "c", 2, ["train.bin", "test.bin"])
    assert load_images(str(tmp_path / "c"), "train").labels.tolist() == [1, 3, 5, 7]


@pytest.mark.parametrize("image, label", [("img", "fine_label"), ("image", "label")])
def test_the_hub_gives_the_same(monkeypatch, image, label):
    pixels = pictures(3)
    features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=list(CLASSES))})
    dataset = datasets.Dataset.from_dict({image: [Image.fromarray(p) for p in pixels], label: [2, 0, 1]}, features)
    asked = []
    monkeypatch.setattr(module, "load_hub_dataset", lambda name, **options: asked.append((name, options)) or dataset)
    found = load_images("me/pictures", "test")
    assert asked == [("me/pictures", {"split": "test"})]
    assert found.classes == CLASSES and found.labels.tolist() == [2, 0, 1]
    assert np.array_equal(found.pixels.permute(0, 2, 3, 1).numpy(), pixels)


# --------------------------------------------------------------------------------------------------------------- cache


def test_images_are_read_once_until_a_file_changes(folder, monkeypatch, own_cache):
    path, made = folder
    first = load_images(str(path), "train")
    with monkeypatch.context() as patch:
        patch.setattr(module, "_pixels", lambda path: pytest.fail("a file was read again"))
        again = load_images(str(path), "train")
    assert again.classes == first.classes and again.fingerprint == first.fingerprint
    assert torch.equal(again.pixels, first.pixels) and torch.equal(again.labels, first.labels)
    changed = path / "train" / "bee" / "2.png"
    Image.fromarray(made["test"][0]).save(changed)
    os.utime(changed, (1, 1))
    assert load_images(str(path), "train").fingerprint != first.fingerprint


@pytest.mark.parametrize("remedy", ["touch", "delete"])
def test_a_change_that_keeps_size_and_time_is_not_noticed_until_the_user_says_so(tmp_path, own_cache, remedy):
    """As the docstring says, with its two remedies."""
    assert remedy in load_images.__doc__
    for split in ("train", "test"):
        for name, pixels in zip(("ant", "bee"), pictures(2)):
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(pixels).save(tmp_path / split / name / "0.bmp")  # of one size, whatever it shows
    first, path = load_images(str(tmp_path), "train"), tmp_path / "train" / "bee" / "0.bmp"
    info, (other,) = path.stat(), pictures(1, seed=1)
    Image.fromarray(other).save(path)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert path.stat().st_size == info.st_size and load_images(str(tmp_path), "train").fingerprint == first.fingerprint
    if remedy == "touch":
        (tmp_path / "train" / "ant" / "0.bmp").touch()  # of any file
    else:
        shutil.rmtree(own_cache / "images")
    assert np.array_equal(load_images(str(tmp_path), "train").pixels[1].permute(1, 2, 0), other)


def test_a_broken_entry_is_read_again_and_a_cache_that_cannot_be_written_is_done_without(folder, own_cache, capsys):
    path, made = folder
    first = load_images(str(path), "train")
    (entry,) = (own_cache / "images").iterdir()
    raw = bytearray(entry.read_bytes())
    raw[-20] ^= 1  # of a label
    entry.write_bytes(raw)
    assert load_images(str(path), "train").fingerprint == first.fingerprint
    assert "in the cache are broken" in capsys.readouterr().err
    (own_cache / "a file").write_text("x")
    assert load_images(str(path), "test", cache_dir=own_cache / "a file").pixels.shape[0] == 6
    assert "are not kept for the next time" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- mistakes


def test_mistakes_of_a_folder_are_named(folder, tmp_path):
    path, _ = folder
    cow = path / "train" / "cow"
    Image.fromarray(pictures(1, size=16)[0]).save(cow / "9.png")
    with pytest.raises(ValueError, match="several sizes: .*9.png' has 16 x 16 pixels, .*0.png' has 32 x 32; resize all"):
        load_images(str(path))
    (cow / "9.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="cow/9.png' is no image that can be read.*take it out"):
        load_images(str(path))
    for file in cow.iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="class folder '.*cow' holds no image .*leave the class out of both splits"):
        load_images(str(path))
    cow.rmdir()
    for split in ("train", "test"):
        with pytest.raises(ValueError, match="the class 'cow' is in test alone .1 such classes.*same class folders"):
            load_images(str(path), split)
    with pytest.raises(ValueError, match="has no folder train; give a folder with train/CLASS/"):
        load_images(str(tmp_path))
    with pytest.raises(ValueError, match="split='validation': allowed are train, test"):
        load_images(str(path), "validation")
    for split in ("train", "test"):
        (tmp_path / "one" / split / "ant").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds one class, 'ant': there is nothing to tell apart"):
        load_images(str(tmp_path / "one"))


def test_mistakes_of_binary_files_are_named(tmp_path):
    folder = tmp_path / "c"
    write_binary(folder, 1, ["data_batch_1.bin", "test_batch.bin"])
    with pytest.raises(ValueError, match="lacks data_batch_2.bin: unpack the whole archive"):
        load_images(str(folder), "train")
    whole = (folder / "test_batch.bin").read_bytes()
    (folder / "test_batch.bin").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="test_batch.bin' of 12,291 bytes: must be a multiple of 3,073; fetch it again"):
        load_images(str(folder), "test")
    (folder / "test_batch.bin").write_bytes(b"\x0a" + whole[1:])
    with pytest.raises(ValueError, match="test_batch.bin': class 10 of 10; fetch the file again"):
        load_images(str(folder), "test")


def test_what_the_hub_lacks_is_named(monkeypatch):
    def offline(name, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(module, "load_hub_dataset", offline)
    with pytest.raises(ValueError, match="from 'me/none', which is no folder here, nor from.*ConnectionError.*cifar10"):
        load_images("me/none")
    dataset = datasets.Dataset.from_dict({"text": ["a"], "label": [0]})
    monkeypatch.setattr(module, "load_hub_dataset", lambda name, **options: dataset)
    with pytest.raises(ValueError, match="'me/none' has the columns text, label: there must be img or image"):
        load_images("me/none")


@pytest.mark.parametrize(
    "feature, labels, message",
    [
        (datasets.ClassLabel(names=list(CLASSES)), [-1, 0], "classes -1 to 0 of 3"),  # answers are kept back
        (datasets.Value("string"), ["ant", "bee"], "label is no class number"),
        (datasets.Value("float32"), [0.0, 1.0], "label is no class number"),
        (datasets.Value("int64"), [-1, 0], "classes -1 to 0 of 1"),
    ],
)
def test_labels_of_the_hub_that_are_no_classes_are_named(monkeypatch, feature, labels, message):
    features = datasets.Features({"img": datasets.Image(), "label": feature})
    dataset = datasets.Dataset.from_dict({"img": [Image.fromarray(p) for p in pictures(2)], "label": labels}, features)
    monkeypatch.setattr(module, "load_hub_dataset", lambda name, **options: dataset)
    with pytest.raises(ValueError, match=f"'me/pictures'.*{message}"):
        load_images("me/pictures", "test")


def test_images_of_more_than_a_byte_a_pixel_are_refused_rather_than_cut_off(folder):
    path, _ = folder
    deep = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    Image.fromarray(deep).save(path / "train" / "ant" / "0.png")  # Pillow makes white of nearly all of it
    with pytest.raises(ValueError, match="0.png' is no image that can be read .*of mode I;16.*convert it again"):
        load_images(str(path), "train")
