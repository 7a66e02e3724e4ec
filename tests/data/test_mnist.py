"""The idx reader."""

import numpy as np
import pytest
from helpers.digits import synthetic

from hbll_seq.data.mnist import load_mnist


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
