"""The claim that deep sigmoid networks learn by local losses where backprop stays at chance."""

import os
from pathlib import Path

import pytest
import torch
from helpers.digits import synthetic

import mnist_mlp

#: where the digits lie when they are at hand: a folder of idx files.
MNIST = Path(os.environ.get("HBLL_MNIST", Path(__file__).resolve().parents[3] / "shared" / "data" / "mnist"))


def test_an_epoch_holds_every_image_once_and_all_of_them():
    values = torch.arange(10)
    batches = mnist_mlp.Batches(values, values, batch_size=4, seed=1)
    order = [batches(step)[0] for step in range(6)]
    assert [len(batch) for batch in order] == [4, 4, 2, 4, 4, 2] and len(batches) == 3
    first, second = torch.cat(order[:3]).tolist(), torch.cat(order[3:]).tolist()
    assert sorted(first) == sorted(second) == values.tolist() and first != second


def test_script_trains_by_both_and_reports_every_depth(tmp_path, capsys):
    synthetic(tmp_path)
    runs = mnist_mlp.main(["--data", str(tmp_path), "--layers", "4", "--width", "20", "--epochs", "8", "--lr", "1e-2"])
    backprop, tree = runs
    assert list(backprop["accuracy_by_blocks"]) == [3] and list(tree["accuracy_by_blocks"]) == [1, 2, 3]
    assert min(tree["accuracy_by_blocks"].values()) > 60  # chance is 10
    assert "4 layers,     tree: 1 blocks" in capsys.readouterr().out
    with pytest.raises(ValueError, match="layers=6"):
        mnist_mlp.main(["--layers", "6"])


@pytest.mark.slow
@pytest.mark.skipif(not MNIST.is_dir(), reason="needs MNIST as idx files (HBLL_MNIST=folder)")
def test_sixteen_sigmoid_layers_learn_by_local_losses_and_not_by_backprop():
    backprop, tree = mnist_mlp.main(["--data", str(MNIST), "--layers", "16", "--epochs", "2"])
    assert backprop["accuracy_by_blocks"][15] < 15
    assert tree["accuracy_by_blocks"][15] > 75
