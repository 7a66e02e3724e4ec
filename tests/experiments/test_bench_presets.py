"""The benchmark of the presets times what the presets train."""

import json

import pytest

import bench_presets


def test_a_small_run(tmp_path, capsys):
    output = tmp_path / "bench.json"
    found = bench_presets.main(["--presets", "debug", "--rounds", "2", "--output", str(output)])
    assert list(found) == ["debug"] and found["debug"] > 0 and json.loads(output.read_text())["ms"] == found
    assert "debug: " in capsys.readouterr().out


def test_it_trains_the_preset_with_its_states():
    training = bench_presets.training_of("mingru-small")
    assert training.carry == "states" and training.model.config.cell == "mingru"
    assert training.batch(0)[0].shape == (8, 65) and training.objective.time.backward == 0


@pytest.mark.parametrize("options, named", [(["--rounds", "0"], "rounds=0"), (["--threads", "0"], "threads=0"),
                                            (["--presets", "huge"], "huge")])  # fmt: skip
def test_mistakes_are_named(options, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        bench_presets.main(["--presets", "debug", "--rounds", "1", "--output", str(tmp_path / "no.json"), *options])
