"""The benchmark over time: its sides compute one loss, and a run at tiny shapes that goes on where it was stopped."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from hbll_seq.layers.cells import make_cell

SCRIPT = Path(__file__).resolve().parents[2] / "train" / "bench_rnn.py"
EXACT = "sweeps:sweeps=7,corrections=7,linearization=zero,chunk=1"
TINY = ["--device", "cpu", "--hidden-size", "6", "--repeats", "1", "--warmup", "1", "--sides", EXACT,
        "tree+sweeps:sweeps=1,corrections=1"]  # fmt: skip


@pytest.fixture()
def bench():
    spec = importlib.util.spec_from_file_location("bench_rnn", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


def run(bench, output, *argv):
    return bench.main([*TINY, *argv, "--output", str(output)])


def gradients(bench, side, args):
    model = bench.make_model(8, args)
    objective = bench.make_objective(bench.parse_side(side), model, 8, args).double()
    x, labels = bench.make_batch(8, 3, args)
    output = objective(x.double(), labels)
    output.loss.backward()
    named = dict(objective.named_parameters())
    if side == "fused":
        named |= {f"model.cell.{name.removesuffix('_l0')}": p for name, p in objective.layer.named_parameters()}
    return output.metrics["ce"].item(), {name: p.grad for name, p in named.items() if name.startswith("model.")}


@pytest.mark.parametrize("cell", ["gru", "elman"])
@pytest.mark.parametrize("side", [EXACT, f"tree+{EXACT},max_symbols=2", "fused"])
def test_exact_sides_compute_the_loss_and_gradients_of_bptt(bench, cell, side):
    args = bench.parse([*TINY, "--cell", cell, "--baselines", "bptt"])
    expected, reference = gradients(bench, "bptt", args)
    loss, ours = gradients(bench, side, args)
    assert abs(loss - expected) < 1e-12 and ours.keys() == reference.keys() and len(ours) == 6
    assert max((ours[name] - reference[name]).abs().max().item() for name in ours) < 1e-12


def test_inexact_sides_do_not(bench):
    args = bench.parse(TINY)
    expected, reference = gradients(bench, "bptt", args)
    loss, ours = gradients(bench, "sweeps:sweeps=6,corrections=6,linearization=zero,chunk=1", args)
    assert abs(loss - expected) > 1e-9  # after six sweeps and the differentiated call seven states of eight are exact
    assert max((ours[name] - reference[name]).abs().max().item() for name in ours) > 1e-12


def test_writes_table_json_and_figure_and_resumes(bench, tmp_path, capsys, monkeypatch):
    output = tmp_path / "new" / "bench.json"
    points = run(bench, output, "--steps", "8", "4", "--batch-sizes", "2")
    written = json.loads(output.read_text())
    assert written["points"] == points and [point["steps"] for point in points] == [4, 8]
    assert written["setting"]["hidden_size"] == 6 and written["setting"]["torch"] == torch.__version__
    for point in points:
        assert list(point["sides"]) == ["bptt", "fused", *TINY[-2:]]
        for row in point["sides"].values():
            assert row["rounds"] == 1 and 0 < row["wall"]["min"] <= row["wall"]["median"] and row["processor"]["min"] > 0
        exact = [point["sides"][name]["ce"] for name in ("bptt", "fused", EXACT)]
        assert max(exact) - min(exact) < 1e-5
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 * 4 + 2 + 1 and lines[-1].startswith("crossover N, best of our sides, against batch 2: bptt ")
    assert output.with_suffix(".png").stat().st_size > 5000

    measured, measure = [], bench.measure
    monkeypatch.setattr(bench, "measure", lambda *a: measured.append(a[:2]) or measure(*a))
    assert run(bench, output, "--steps", "4", "8", "--batch-sizes", "2") == points and not measured
    more = run(bench, output, "--steps", "8", "--batch-sizes", "1", "2")
    assert measured == [(8, 1)] and more[1] == points[1]
    assert len(json.loads(output.read_text())["points"]) == 3
    again = run(bench, output, "--steps", "8", "--batch-sizes", "1", "--sides", "paper:sweeps=0")  # a side that is new
    assert measured[1:] == [(8, 1)] and list(again[0]["sides"]) == ["bptt", "fused", "paper:sweeps=0", *TINY[-2:]]


def test_refuses_a_file_of_another_setting(bench, tmp_path):
    output = tmp_path / "bench.json"
    run(bench, output, "--steps", "2", "--batch-sizes", "1")
    before = output.read_text()
    with pytest.raises(ValueError, match="another setting .hidden_size 6, here 5.*another --output, or remove it"):
        run(bench, output, "--steps", "2", "--batch-sizes", "1", "--hidden-size", "5")
    assert output.read_text() == before
    output.write_text("{}")
    with pytest.raises(ValueError, match="holds no results of this script: choose another --output"):
        run(bench, output)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--sides", "sweep"], "side 'sweep': allowed are bptt, one-step, fused, sweeps, tree.sweeps, paper; options follow"),
        (["--sides", "sweeps:K=1"], "option 'K=1': allowed are sweeps, corrections, linearization, .*; write name=value, as"),
        (["--sides", "sweeps:sweeps="], "option 'sweeps=': allowed are sweeps"),
        (["--sides", "sweeps:max_symbols=8"], "option 'max_symbols=8': allowed are sweeps"),  # there is no tree
        (["--sides", "bptt:sweeps=1"], "option 'sweeps=1': allowed are none"),
        (["--sides", "sweeps:sweeps=-1"], "sweeps=-1: must be a whole number of at least 0"),
        (["--sides", "sweeps:linearization=full"], "linearization='full': allowed are zero, diagonal"),
        (["--sides", "paper:share=some"], "share='some': allowed are none, capped, all"),
        (["--baselines", "gru"], "baseline 'gru': allowed are bptt, one-step, fused; settings of ours go to --sides"),
        (["--cell", "mingru"], "side 'fused': torch has layers for the cells gru and elman alone; leave it out"),
        (["--steps", "0"], "steps=0: must be at least 1"),
        (["--repeats", "0"], "repeats=0: must be at least 1"),
        (["--device", "meta", "--clock", "processor"], "clock='processor' with device='meta': .*pass --clock wall"),
        (["--device", "nowhere"], "device='nowhere' cannot be used .*: pass --device cpu"),
    ],
)
def test_refuses(bench, argv, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(bench, tmp_path / "bench.json", *argv)
    assert not list(tmp_path.iterdir())


def test_options_are_those_of_the_objective(bench):
    side = bench.parse_side("tree+sweeps:sweeps=2,clip=0.5,init=zeros,max_symbols=4")
    assert side.options == {"sweeps": 2, "clip": 0.5, "init": "zeros"} and side.tree == {"max_symbols": 4, "share": "capped"}
    assert bench.parse_side("paper").tree == {"max_symbols": None, "share": "none"}


def test_crossover_is_where_a_side_stays_faster(bench):
    points = [
        {"steps": n, "batch_size": 4, "sides": {"bptt": {"wall": {"min": 1.0}}, "ours": {"wall": {"min": seconds}}}}
        for n, seconds in ((2, 0.9), (4, 1.1), (8, 0.8), (16, 0.5))
    ]
    assert bench.crossover(points, "ours", "bptt", "wall") == 8
    assert bench.crossover(points[:2], "ours", "bptt", "wall") is None
    assert bench.crossover(points, "ours", "fused", "wall") is None  # not timed


def test_bf16_one_step_and_optimizer_run(bench, tmp_path):
    points = run(bench, tmp_path / "bench.json", "--steps", "4", "--batch-sizes", "2", "--bf16", "--optimizer", "--baselines",
                 "bptt", "one-step")  # fmt: skip
    assert list(points[0]["sides"]) == ["bptt", "one-step", *TINY[-2:]]


def test_fused_copies_the_weights(bench):
    args = bench.parse(TINY)
    model = bench.make_model(4, args)
    fused = bench.FusedObjective(model)
    copy = fused.layer.weight_hh_l0
    assert torch.equal(copy, model.cell.weight_hh) and copy is not model.cell.weight_hh
    model.cell = make_cell("elman-sigmoid", 4, 6)
    with pytest.raises(ValueError, match="gru and elman alone"):
        bench.FusedObjective(model)
