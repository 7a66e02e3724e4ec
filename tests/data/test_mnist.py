"""The idx reader, and the claim that deep sigmoid networks learn by local losses where backprop stays at chance."""

import gzip
import importlib.util
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from hbll_seq.data.mnist import load_mnist

ROOT = Path(__file__).resolve().parents[2]
#: where the digits lie when they are at hand: a folder of idx files.
MNIST = Path(os.environ.get("HBLL_MNIST", ROOT.parent / "shared" / "data" / "mnist"))


def script():
    spec = importlib.util.spec_from_file_location("mnist_mlp", ROOT / "train" / "mnist_mlp.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_idx(path, array):
    raw = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def synthetic(folder, n_train=640, n_test=200):
    """Digits anyone can tell apart: class k lights up its own two rows."""
    rng = np.random.default_rng(0)
    for name, n in (("train", n_train), ("t10k", n_test)):
        labels = rng.integers(0, 10, n).astype(np.uint8)
        images = rng.integers(0, 60, (n, 28, 28)).astype(np.uint8)
        for image, label in zip(images, labels):
            image[2 * label : 2 * label + 2] += 180
        write_idx(folder / f"{name}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{name}-labels-idx1-ubyte", labels)
    return images, labels


def test_idx_files_are_read_compressed_or_not(tmp_path):
    images, labels = synthetic(tmp_path)
    pixels, read = load_mnist(str(tmp_path), "test")
    assert pixels.shape == (200, 784) and pixels.min() >= 0 and pixels.max() <= 1
    np.testing.assert_allclose(pixels.numpy().reshape(-1, 28, 28) * 255, images, atol=1e-3)
    np.testing.assert_array_equal(read.numpy(), labels)


def test_damaged_and_missing_files_are_named(tmp_path):
    synthetic(tmp_path)
    labels = tmp_path / "t10k-labels-idx1-ubyte"
    whole = labels.read_bytes()
    floats = b"\x00\x00\x0d" + whole[3:]
    for raw, message in [(whole[:-3], "holds 197 values"), (whole[:2], "not a complete idx"), (floats, "00 00 08")]:
        labels.write_bytes(raw)
        with pytest.raises(ValueError, match=f"t10k-labels.*{message}"):
            load_mnist(str(tmp_path), "test")
    labels.unlink()
    with pytest.raises(ValueError, match="neither t10k-labels-idx1-ubyte nor"):
        load_mnist(str(tmp_path), "test")
    with pytest.raises(ValueError, match="split='validation'"):
        load_mnist(str(tmp_path), "validation")


def test_script_trains_both_sides_and_reports_every_depth(tmp_path, capsys):
    synthetic(tmp_path)
    runs = script().main(["--data", str(tmp_path), "--layers", "4", "--width", "20", "--epochs", "8", "--lr", "1e-2"])
    backprop, tree = runs
    assert list(backprop["accuracy_by_blocks"]) == [3] and list(tree["accuracy_by_blocks"]) == [1, 2, 3]
    assert min(tree["accuracy_by_blocks"].values()) > 60  # chance is 10
    assert "4 layers,     tree: 1 blocks" in capsys.readouterr().out
    with pytest.raises(ValueError, match="layers=6"):
        script().main(["--layers", "6"])


@pytest.mark.slow
@pytest.mark.skipif(not MNIST.is_dir(), reason="needs MNIST as idx files (HBLL_MNIST=folder)")
def test_sixteen_sigmoid_layers_learn_by_local_losses_and_not_by_backprop():
    backprop, tree = script().main(["--data", str(MNIST), "--layers", "16", "--epochs", "2"])
    assert backprop["accuracy_by_blocks"][15] < 15
    assert tree["accuracy_by_blocks"][15] > 75
