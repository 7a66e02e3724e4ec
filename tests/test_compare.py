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
    assert len(runs) == 3 * 2 + 3  # three sides try two rates with the first seed, and keep one for the second
    assert [row["depth"] for row in runs[0]["test"]] == [1, 2, 3]
    assert first.splitlines()[-1].startswith("ratio to 3-block backprop at equal steps: best path ")
    assert (tmp_path / "results.png").stat().st_size > 5000

    monkeypatch.setattr(compare, "run", lambda *a: pytest.fail("a finished run was done again"))
    compare.main(argv)
    assert capsys.readouterr().out == first
    with pytest.raises(ValueError, match="other settings \\(steps\\).*--output"):
        compare.main([*argv, "--steps", "4"])


def test_both_sides_start_from_the_same_weights(compare):
    args = compare.parse(TINY)
    sides = [compare.make_side(side, args, 50, seed=3)[0].model.state_dict() for side in ("tree", "backprop-1")]
    assert all(torch.equal(a, b) for a, b in zip(*(side.values() for side in sides)))
