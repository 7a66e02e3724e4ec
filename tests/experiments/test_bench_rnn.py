"""The benchmark over time: its methods compute one loss, and a run at tiny shapes that goes on where it was stopped."""

import json
from dataclasses import replace

import pytest
import torch

import bench_rnn
from comparisons.fused import FusedObjective
from hbll_seq.layers.cells import make_cell

EXACT = "sweeps:forward=7,backward=7,linearization=zero,chunk_size=1"
TINY = ["--device", "cpu", "--hidden-size", "6", "--repeats", "1", "--warmup", "1", "--methods", EXACT,
        "sweeps:init=tree,forward=1,backward=1"]  # fmt: skip


def run(output, *argv):
    return bench_rnn.main([*TINY, *argv, "--output", str(output)])


def gradients(name, args):
    model = bench_rnn.make_model(8, args)
    objective = bench_rnn.make_objective(bench_rnn.method_of(name, args), model, 8, args).double()
    x, labels = bench_rnn.make_batch(8, 3, args)
    output = objective(x.double(), labels)
    output.loss.backward()
    named = dict(objective.named_parameters())
    if name == "fused":
        named |= {f"model.cell.{key.removesuffix('_l0')}": p for key, p in objective.layer.named_parameters()}
    return output.metrics["ce"].item(), {key: p.grad for key, p in named.items() if key.startswith("model.")}


@pytest.mark.parametrize("cell", ["gru", "elman"])
@pytest.mark.parametrize("name", [EXACT, f"{EXACT},init=tree,max_symbols=2", "fused"])
def test_exact_methods_compute_the_loss_and_gradients_of_bptt(cell, name):
    args = bench_rnn.parse([*TINY, "--cell", cell, "--baselines", "bptt"])
    expected, reference = gradients("bptt", args)
    loss, ours = gradients(name, args)
    assert abs(loss - expected) < 1e-12 and ours.keys() == reference.keys() and len(ours) == 6
    assert max((ours[name] - reference[name]).abs().max().item() for name in ours) < 1e-12


def test_inexact_methods_do_not():
    args = bench_rnn.parse(TINY)
    expected, reference = gradients("bptt", args)
    loss, ours = gradients("sweeps:forward=6,backward=6,linearization=zero,chunk_size=1", args)
    assert abs(loss - expected) > 1e-9  # after six sweeps and the differentiated call seven states of eight are exact
    assert max((ours[name] - reference[name]).abs().max().item() for name in ours) > 1e-12


def test_writes_table_json_and_figure_and_resumes(tmp_path, capsys, monkeypatch):
    output = tmp_path / "new" / "bench.json"
    points = run(output, "--steps", "8", "4", "--batch-sizes", "2")
    written = json.loads(output.read_text())
    assert written["points"] == points and [point["steps"] for point in points] == [4, 8]
    assert written["setting"]["hidden_size"] == 6 and written["setting"]["torch"] == torch.__version__
    for point in points:
        assert list(point["methods"]) == ["bptt", "fused", *TINY[-2:]]
        for row in point["methods"].values():
            assert row["rounds"] == 1 and 0 < row["wall"]["min"] <= row["wall"]["median"] and row["processor"]["min"] > 0
        exact = [point["methods"][name]["ce"] for name in ("bptt", "fused", EXACT)]
        assert max(exact) - min(exact) < 1e-5
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 * 4 + 2 + 1 and lines[-1].startswith("crossover N, best of ours, against batch 2: bptt ")
    assert output.with_suffix(".png").stat().st_size > 5000

    measured, measure = [], bench_rnn.measure
    monkeypatch.setattr(bench_rnn, "measure", lambda *a: measured.append(a[:2]) or measure(*a))
    assert run(output, "--steps", "4", "8", "--batch-sizes", "2") == points and not measured
    more = run(output, "--steps", "8", "--batch-sizes", "1", "2")
    assert measured == [(8, 1)] and more[1] == points[1]
    assert len(json.loads(output.read_text())["points"]) == 3
    again = run(output, "--steps", "8", "--batch-sizes", "1", "--methods", "tree:consistency=0")  # one that is new
    assert measured[1:] == [(8, 1)] and list(again[0]["methods"]) == ["bptt", "fused", "tree:consistency=0", *TINY[-2:]]


def test_refuses_a_file_of_another_setting(tmp_path):
    output = tmp_path / "bench.json"
    run(output, "--steps", "2", "--batch-sizes", "1")
    before = output.read_text()
    with pytest.raises(ValueError, match="another setting .hidden_size 6, here 5.*another --output, or remove it"):
        run(output, "--steps", "2", "--batch-sizes", "1", "--hidden-size", "5")
    assert output.read_text() == before
    output.write_text("{}")
    with pytest.raises(ValueError, match="holds no results of this script: choose another --output"):
        run(output)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--methods", "sweep"], "method 'sweep': allowed are bptt, one-step, truncated, sweeps, tree; options follow"),
        (["--methods", "sweeps:K=1"], "sweeps has no option 'K'; it has auxiliary_blocks, .*, linearization"),
        (["--methods", "sweeps:forward="], "forward='' must be a number"),
        (["--methods", "sweeps:max_symbols=8"], "max_symbols needs init=tree"),  # there is no tree
        (["--methods", "bptt:forward=1"], "bptt has no option 'forward'"),
        (["--methods", "bptt:lr=1e-3"], "bptt:lr=1e-3': no rate is used"),
        (["--methods", "sweeps:forward=-1"], "forward=-1: must be a whole number of at least 0"),
        (["--methods", "sweeps:linearization=full"], "linearization='full': allowed are zero, identity, diagonal"),
        (["--methods", "tree:share=some"], "share='some': allowed are none, capped, all"),
        (["--baselines", "gru"], "baseline 'gru': allowed are bptt, one-step, fused; settings of ours go to --methods"),
        (["--cell", "mingru"], "method 'fused': torch has layers for the cells gru and elman alone; leave it out"),
        (["--steps", "0"], "steps=0: must be at least 1"),
        (["--repeats", "0"], "repeats=0: must be at least 1"),
        (["--device", "meta", "--clock", "processor"], "clock='processor' with device='meta': .*pass --clock wall"),
        (["--device", "nowhere"], "device='nowhere' cannot be used .*: pass --device cpu"),
    ],
)
def test_refuses(argv, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "bench.json", *argv)
    assert not list(tmp_path.iterdir())


def test_options_are_those_of_the_objective():
    args = bench_rnn.parse(TINY)
    model = bench_rnn.make_model(8, args)
    given = "sweeps:forward=2,clip=0.5,init=tree,max_symbols=4,tolerance=0.25"
    made = bench_rnn.make_objective(bench_rnn.method_of(given, args), model, 8, args)
    assert made.tree.max_symbols == 4 and made.tree.share == "capped" and made.tree.n_level == 3
    defaults = type(made)(model)
    own = replace(defaults.inference, forward=2, clip=0.5, tolerance=0.25, init=made.inference.init)
    assert made.inference == own and made.inference.init.tree is made.tree  # all others are the objective's defaults
    paper = bench_rnn.make_objective(bench_rnn.method_of("tree", args), model, 8, args).tree
    assert paper.max_symbols == 8 and paper.share == "none"  # all of them
    plain = bench_rnn.make_objective(bench_rnn.method_of("sweeps", args), model, 8, args)
    assert plain.inference == defaults.inference


def test_points_of_older_files_are_read(tmp_path):
    """Names of methods are translated; a file that is complete is only reported."""
    output = tmp_path / "bench.json"
    argv = ["--steps", "4", "--batch-sizes", "2", "--methods", EXACT, "sweeps:init=tree,linearization=shared_matrix",
            "tree:consistency=1"]  # fmt: skip
    run(output, *argv)
    new = json.loads(output.read_text())
    names = ["bptt", "fused", "sweeps:sweeps=7,corrections=7,linearization=zero,chunk=1",
             "tree+sweeps:linearization=secant", "paper:sweeps=1"]  # fmt: skip
    (point,) = new["points"]
    old = {"steps": 4, "batch_size": 2, "sides": dict(zip(names, point["methods"].values(), strict=True))}
    output.write_text(json.dumps({"setting": new["setting"], "points": [old]}))
    before = output.read_bytes()
    assert run(output, *argv) == new["points"] and output.read_bytes() == before
    assert run(output, *argv[:-3], *names[2:]) == new["points"]  # also asked for by the old names


def test_crossover_is_where_a_method_stays_faster():
    points = [
        {"steps": n, "batch_size": 4, "methods": {"bptt": {"wall": {"min": 1.0}}, "ours": {"wall": {"min": seconds}}}}
        for n, seconds in ((2, 0.9), (4, 1.1), (8, 0.8), (16, 0.5))
    ]
    assert bench_rnn.crossover(points, "ours", "bptt", "wall") == 8
    assert bench_rnn.crossover(points[:2], "ours", "bptt", "wall") is None
    assert bench_rnn.crossover(points, "ours", "fused", "wall") is None  # not timed


def test_bf16_one_step_and_optimizer_run(tmp_path):
    points = run(tmp_path / "bench.json", "--steps", "4", "--batch-sizes", "2", "--bf16", "--optimizer", "--baselines",
                 "bptt", "one-step")  # fmt: skip
    assert list(points[0]["methods"]) == ["bptt", "one-step", *TINY[-2:]]


def test_fused_copies_the_weights():
    args = bench_rnn.parse(TINY)
    model = bench_rnn.make_model(4, args)
    fused = FusedObjective(model)
    copy = fused.layer.weight_hh_l0
    assert torch.equal(copy, model.cell.weight_hh) and copy is not model.cell.weight_hh
    model.cell = make_cell("elman-sigmoid", 4, 6)
    with pytest.raises(ValueError, match="gru and elman alone"):
        FusedObjective(model)
