"""The benchmark of the presets times what the presets train."""

import json
from collections import Counter
from itertools import pairwise

import pytest

import bench_presets
from hbll_seq.training.presets import PRESETS, read_preset, resolve


def test_a_small_run(tmp_path, capsys):
    output = tmp_path / "bench.json"
    found = bench_presets.main(["--presets", "debug", "--rounds", "2", "--output", str(output)])
    assert list(found) == ["debug"] and found["debug"] > 0 and json.loads(output.read_text())["ms"] == found
    assert "debug: " in capsys.readouterr().out


def test_it_trains_the_preset_with_its_states():
    training = bench_presets.training_of("mingru-small")
    assert training.carry == "states" and training.model.config.cell == "mingru"
    assert training.batch(0)[0].shape == (8, 65) and training.objective.time.backward == 0
    assert training.clip == resolve(read_preset("mingru-small", PRESETS)).clip > 0
    assert {p for group in training.optimizer.param_groups for p in group["params"]} == set(training.model.parameters())


@pytest.mark.parametrize("preset, cells, carry, tokens", [
    ("small", {"transformer": 7}, None, 512), ("hybrid-small", {"mingru": 4, "transformer": 3}, None, 512),
    ("mingru-small", {"mingru": 7}, "states", 512), ("gru-small", {"gru": 7}, "states", 512),
])  # fmt: skip
def test_what_the_results_compare(preset, cells, carry, tokens):
    """docs/results.md 7: seven blocks, 128 wide, 512 tokens a step, mix few; the hybrid's kinds in turn."""
    training = bench_presets.training_of(preset)
    config, (batch, _) = training.model.config, training.batch(0)
    assert Counter(config.cells) == cells and config.n_embd == 128 and training.carry == carry
    assert preset != "hybrid-small" or all(one != next_ for one, next_ in pairwise(config.cells))
    assert batch[:, 1:].numel() == tokens and training.objective.depths.name == "few"


def test_times_are_in_milliseconds(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_presets, "seconds_by_turns", lambda trainings, rounds: dict.fromkeys(trainings, 0.01234))
    output = tmp_path / "bench.json"
    assert bench_presets.main(["--presets", "debug", "--rounds", "7", "--output", str(output)]) == {"debug": 12.3}
    assert json.loads(output.read_text()) == {"rounds": 7, "threads": 1, "ms": {"debug": 12.3}}
    assert capsys.readouterr().out == "debug: 12 ms a step\n"


@pytest.mark.parametrize("options, named", [(["--rounds", "0"], "rounds=0"), (["--threads", "0"], "threads=0"),
                                            (["--presets", "huge"], "huge")])  # fmt: skip
def test_mistakes_are_named(options, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        bench_presets.main(["--presets", "debug", "--rounds", "1", "--output", str(tmp_path / "no.json"), *options])
