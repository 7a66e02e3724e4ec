"""The comparison script: resumable, its table and ratio, and that both sides start from the same weights."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "train" / "compare.py"
TINY = ["--n-level", "2", "--n-embd", "16", "--n-head", "2", "--block-size", "16", "--batch-size", "2", "--steps", "3",
        "--depths", "1", "3", "--lrs", "1e-3", "1e-2", "--seeds", "0", "1", "--eval-batches", "1",
        "--threads", "1"]  # fmt: skip


@pytest.fixture()
def compare():
    spec = importlib.util.spec_from_file_location("compare", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


def test_comparison_is_resumable_and_ends_with_the_ratio(compare, tmp_path, capsys, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("The town lies on the river , and the river runs to the sea .\n" * 300)
    output = tmp_path / "results.json"
    argv = [*TINY, "--data", str(text), "--output", str(output)]
    monkeypatch.setenv("HBLL_CACHE", str(tmp_path / "cache"))
    compare.main(argv)
    first = capsys.readouterr().out
    runs = json.loads(output.read_text())["runs"]
    tried = {side: {run["lr"] for run in runs if run["side"] == side} for side in ("tree", "backprop-1", "backprop-3")}
    assert all({1e-3, 1e-2} < lrs for lrs in tried.values())  # the best of two rates lies at an edge
    assert sum(run["seed"] == 1 for run in runs) == 3  # each side's best rate is kept for the second seed
    assert [row["depth"] for row in runs[0]["test"]] == [1, 2, 3]
    assert first.splitlines()[-1].startswith("ratio to 3-block backprop at equal steps: best path ")
    assert (tmp_path / "results.png").stat().st_size > 5000

    monkeypatch.setattr(compare, "run", lambda *a: pytest.fail("a finished run was done again"))
    compare.main(argv)
    assert capsys.readouterr().out == first
    with pytest.raises(ValueError, match="other settings \\(steps\\).*--output"):
        compare.main([*argv, "--steps", "4"])


def test_tuning_goes_past_the_edge_and_stops(compare):
    assert compare.tune(lambda lr: abs(lr - 4.5), [2, 4, 8]) == 4
    assert compare.tune(lambda lr: abs(lr - 16), [1, 2, 4]) == 16
    assert compare.tune(lambda lr: lr, [4, 8]) == 0.5  # three steps past the grid, and no further
    assert compare.tune(lambda lr: lr, [4]) == 4


def test_both_sides_start_from_the_same_weights(compare):
    args = compare.parse(TINY)
    sides = [compare.make_side(side, args, 50, seed=3)[0].model.state_dict() for side in ("tree", "backprop-1")]
    assert all(torch.equal(a, b) for a, b in zip(*(side.values() for side in sides)))
