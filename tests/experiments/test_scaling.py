"""The scaling model: its spans in units of a forward pass, its fit, and what it prints of stored costs."""

import json
from dataclasses import replace

import pytest

import scaling
from comparisons.parallel_methods import Shape
from comparisons.scaling_costs import Costs, Wires, Work, fitted, measure_costs
from comparisons.scaling_model import Model, errors

FREE = Wires(0.0, 0.0, 0.0)
#: a block takes 1 forth, 1 back for its input and 1 for its parameters, of four rows; nothing else takes anything
UNITS = Costs({rows: Work(rows / 4, rows / 4, rows / 4, rows / 2, 0.0, 0.0) for rows in (1, 2, 4)}, 0.0, 100, 50, 1000.0,
              0.0, 10.0, FREE)  # fmt: skip
N = 64


def test_spans_are_those_of_the_method():
    model = Model(UNITS, 4)
    assert model.backprop(N).seconds == 3 * N
    assert model.exact(N, 2).seconds == 2.5 * N
    for r in (2, 4, 8):
        assert model.exact(N, r).seconds == N + (r - 1) / r * N + 2 * N / r
        assert model.local(N, r).seconds == N + 2 * N / r
        assert model.ahead(N, r).seconds == 3 * N / r
        assert model.ahead_with_exits(N, r).seconds == 3 * (N / r + 1)
    # 16 blocks' three units come as late as the other 48 blocks' products by their weights
    assert model.exact(N, 2, (1, 3)).seconds == N + 48 + max(3 * 16 - 16, 48) == N + 96
    assert model.exact(N, 2, (1, 3)).activation_bytes == 48 * 1000 + 4 * 10
    assert model.of_method("exact:shares=1+3", N, 2) == model.exact(N, 2, (1, 3)) != model.of_method("exact", N, 2)
    assert model.sweeps(N, 8, 1, 1).seconds == 5 * N / 8
    assert model.sweeps(N, 8, 2, 0).seconds == 5 * N / 8
    assert model.sweeps(N, 2, 1, 1) == model.exact(N, 2)
    assert model.pipeline(N, 2, 4).seconds == pytest.approx(3 * N * (4 + 2 - 1) / (4 * 2))
    assert model.pipeline(N, 4, 4, "zero-bubble").seconds == pytest.approx(3 * N / 4 + 3 / 2 * N / 16)
    assert model.ddp(N, 4).seconds == model.fsdp(N, 4).seconds == 3 * N / 4


def test_who_is_ahead_embeds_while_others_score():
    of_ends = {rows: Work(rows / 4, rows / 4, rows / 4, rows / 2, rows / 8, rows / 2) for rows in (1, 2, 4)}
    model = Model(replace(UNITS, work=of_ends, wires=Wires(1.0, 0.5, 3.0)), 4)
    sums = model.costs.wires.reduction(4, 4 * 50) + model.costs.wires.reduction(4, 16)
    assert model.ahead(N, 4).seconds == 3 * N / 4 + 2 + sums  # the head's time; the embedding takes less, and no message
    assert model.of_method("ahead", N, 4) == model.ahead(N, 4)
    exits = model.ahead_with_exits(N, 4)  # the first rank embeds and scores
    assert exits.seconds == 3 * (N / 4 + 1) + 2 + 0.5 + sums and exits.activation_bytes == (N / 4 + 1) * 1000 + 6 * 10
    assert exits.held_bytes == model.ahead(N + 4, 4).held_bytes


def test_refuses_what_the_others_refuse():
    model = Model(UNITS, 4)
    assert model.pipeline(N, 8, 4) is None and model.pipeline(N, 8, 8) is None and model.pipeline(N, 8, 4, "gpipe")
    assert model.ddp(N, 8) is None and model.fsdp(N, 8) is None


def test_memory():
    model = Model(UNITS, 4)
    assert model.backprop(N).activation_bytes == N * 1000
    assert model.exact(N, 4).activation_bytes == N / 4 * 1000 + 6 * 10
    assert model.pipeline(N, 2, 4).activation_bytes == N / 2 * 1000 * 2 / 4
    assert model.pipeline(N, 2, 4, "gpipe").activation_bytes == N / 2 * 1000
    assert model.exact(N, 4).held_bytes == 12 * (N / 4 * 100 + 50)
    assert model.fsdp(N, 4).held_bytes == 12 * (N * 100 + 50) / 4


def test_what_is_sent_takes_its_time():
    wires = Wires(1.0, 0.5, 3.0)
    model = Model(replace(UNITS, wires=wires), 4)
    assert wires.collective(1, 100) == 0 and wires.gather(4, 10) == 3 + 0.5 * 30 and wires.reduction(4, 8) == 3 + 0.5 * 12
    shared = wires.reduction(4, 4 * 50) + wires.reduction(4, 16)
    assert model.exact(N, 4).seconds == N * 2.25 + 6 * (3 + 0.5 * 10) + wires.gather(4, 10) + shared
    assert model.sweeps(N, 4, 1, 1).seconds == N * 1.25 + 5 * wires.gather(4, 10) + shared
    assert model.ddp(N, 4).seconds == 3 * N / 4 + wires.reduction(4, 4 * (N * 100 + 50))


def test_fit_finds_latency_and_rate():
    true = Wires(2e-4, 3e-9, 1e-4)
    rows = [{"ranks": r, "what": "all_gather", "sent": n, "seconds": true.collective(r, n)}
            for r in (2, 4) for n in (1e3, 1e5, 1e7)]  # fmt: skip
    rows += [{"ranks": 2, "what": "message", "sent": n, "seconds": true.send(n)} for n in (1e3, 1e5, 1e7)]
    found = fitted(rows)
    for name in ("latency", "per_byte", "message"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=1e-6)


def test_errors_are_of_speeds_whatever_the_machine_does():
    slow = {"seconds": [10 * 2.5 * 7], "baseline_seconds": [10 * 3 * 7]}
    point = {"blocks": 7, "ranks": 2, "methods": {
        "backprop": slow, "exact": slow, "1f1b:m=2": {**slow, "seconds": [10 * 1.125 * 7]}, "1f1b:m=1": {"refused": "so"},
        "local:depths=prefixes": slow}}  # fmt: skip
    found = {name: error for name, _, _, error in errors(Model(UNITS, 4), point, lambda row: 210 / row["seconds"][0])}
    assert found == {"exact": pytest.approx(0.0), "1f1b:m=2": pytest.approx(-0.5)}


def test_measures_a_tiny_model():
    shape = Shape(7, 16, 2, 4, 8, 32)
    costs = measure_costs(shape, repeats=1, patience=120, groups=(2,))
    assert sorted(costs.work) == [1, 2, 4] and costs.state_bytes == 4 * 4 * 8 * 16
    assert costs.block_parameters == 2 * 16 + 12 * 16 * 16 and costs.shared_parameters == 32 * 16 + 16
    assert costs.saved_bytes > 3 * costs.state_bytes and costs.head_bytes > 0
    assert Costs.of_json(json.loads(json.dumps(costs.as_json()))) == costs


def test_predicts_from_stored_costs_and_checks_a_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scaling, "measure_costs", lambda *a: UNITS)
    bench = tmp_path / "bench.json"
    row = {"seconds": [2.5], "baseline_seconds": [3.0], "processor_seconds": [2.5]}
    bench.write_text(json.dumps({
        "setting": {"heads": 4, "batch_size": 4, "context_length": 128, "vocab": 4096},
        "points": [{"blocks": 7, "width": 128, "ranks": 2, "methods": {"backprop": row, "exact": row,
                                                                       "local": {**row, "seconds": [1.0]}}}]}))  # fmt: skip
    output = tmp_path / "new" / "scaling.json"
    result = scaling.main(["--check", str(bench), "--output", str(output)])
    assert [round(found["error"], 3) for found in result["check"]] == [0.0, -0.5]
    printed = capsys.readouterr().out
    assert "ours K=1 M=1: 4.80 x backprop at 64 blocks on 8 devices, at least the 4 x that is asked" in printed
    assert "ours exact: slower than ddp at 16 of 16 places (2 devices with any blocks; 4 devices with any blocks)" in printed
    assert "speeds within 20%: 1 of 2" in printed and "beyond 20%" in printed
    assert output.with_suffix(".png").stat().st_size > 5000
    monkeypatch.setattr(scaling, "measure_costs", lambda *a: pytest.fail("measured again"))
    assert scaling.main(["--output", str(output)])["rows"] == json.loads(output.read_text())["rows"]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--repeats", "0"], "repeats=0: must be at least 1"),
        (["--backward", "-1"], "backward=-1: must be at least 0"),
    ],
)
def test_refuses(argv, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        scaling.main([*argv, "--output", str(tmp_path / "scaling.json")])
    assert not list(tmp_path.iterdir())


def test_refuses_a_file_of_something_else(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "measure_costs", lambda *a: UNITS)
    with pytest.raises(ValueError, match="holds no results of bench_parallel.py"):
        scaling.main(["--check", str(tmp_path / "none.json"), "--output", str(tmp_path / "scaling.json")])
