"""The accuracy-span trade-off: exact at its end, less so at its start, cached training, saved models, JSON and PNG."""

import json

import pytest
import torch

import tradeoff
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.config import HBLLConfig

TINY = ["--n-level", "2", "--n-embd", "16", "--n-head", "2", "--context-length", "16", "--batch-size", "2", "--steps", "8",
        "--warmup-steps", "1", "--lr", "3e-2", "--train-forward", "1", "--train-backward", "1", "--eval-batches", "2",
        "--threads", "1"]  # fmt: skip


@pytest.fixture()
def argv(tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("The town lies on the river , and the river runs to the sea .\n" * 300)
    monkeypatch.setenv("HBLL_CACHE", str(tmp_path / "tokens"))
    return [*TINY, "--data", str(text), "--output", str(tmp_path / "results" / "dial.json")]


def test_exact_at_the_end_and_less_so_at_its_start(argv, tmp_path, capsys, monkeypatch):
    argv += ["--cache", str(tmp_path / "models")]
    tradeoff.main(argv)
    table = capsys.readouterr().out
    results = json.loads((tmp_path / "results" / "dial.json").read_text())
    assert [m["name"] for m in results["models"]] == ["trained by backprop", "trained by sweeps"]
    for measured in results["models"]:
        rows = measured["rows"]
        assert len(rows) == 3 * 3 + 4 * 3  # the grid, and the other forward parts at M = 2
        for row in rows:
            if row["forward"] == row["backward"] == 2:
                assert [row["cosine"], row["cosine_blocks"]] == pytest.approx([1, 1], abs=1e-5)
                assert row["norm_ratio"] == pytest.approx(1, abs=1e-4) and row["state_error"] < 1e-5
        first = rows[0]
        assert (first["forward"], first["backward"]) == (0, 0)
        assert first["cosine"] < 0.9999 and first["cosine_blocks"] < 0.9999 and first["state_error"] > 1e-3
        errors = [row["state_error"] for row in rows if row["forward"] == 0]
        assert max(errors[:3]) == min(errors[:3])  # backward iterations do not change the states
    assert table.count("K=2") == 2 and "validation" in table
    assert (tmp_path / "results" / "dial.png").stat().st_size > 5000

    monkeypatch.setattr(tradeoff, "plot_trade_off", lambda *a: None)
    monkeypatch.setattr(tradeoff, "train", lambda *a: pytest.fail("a cached model was trained again"))
    tradeoff.main(argv)
    assert capsys.readouterr().out == table


def test_saved_model(argv, tmp_path, capsys):
    torch.manual_seed(0)
    model = HBLLForCausalLM(HBLLConfig(vocab_size=4096, n_level=1, n_embd=8, n_head=1, context_length=16))
    model.save_pretrained(tmp_path / "saved")
    (measured,) = tradeoff.main([*argv, "--model", str(tmp_path / "saved")])["models"]  # and nothing is trained
    assert measured["name"] == "saved" and measured["n_blocks"] == 1
    assert [row["forward_span"] for row in measured["rows"]] == [1] * 5
    assert all(row["cosine"] == pytest.approx(1, abs=1e-5) for row in measured["rows"])
    assert str(tmp_path) not in json.dumps(measured)


def test_forward_span():
    variants = tradeoff.VARIANTS.values()
    spans = [[tradeoff.forward_span(k, 3, kind, given["init"]) for k in (0, 1, 6)] for kind, given in variants]
    assert spans == [[2, 3, 7], [2, 3, 7], [1, 2, 7], [4, 5, 10], [4, 8, 28]]


def test_bad_options(tmp_path):
    with pytest.raises(ValueError, match="eval_batches=0: must be at least 1"):
        tradeoff.parse(["--eval-batches", "0"])
    with pytest.raises(ValueError, match="named a, a.*one at a time"):
        tradeoff.parse(["--model", str(tmp_path / "1" / "a"), str(tmp_path / "2" / "a")])
