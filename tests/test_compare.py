"""The comparison script: resumable, its table and ratio, and that both sides start from the same weights."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from hbll_seq.tasks import make_task
from hbll_seq.training import comparison
from hbll_seq.training.comparison import Results, Shape, Side, TaskProblem, train, tune
from hbll_seq.training.settings import read_preset

SCRIPT = Path(__file__).resolve().parents[1] / "train" / "compare.py"
TINY = ["--n-level", "2", "--n-embd", "16", "--n-head", "2", "--block-size", "16", "--batch-size", "2", "--steps", "3",
        "--lrs", "1e-3", "1e-2", "--seeds", "0", "1", "--eval-batches", "1",
        "--eval-every", "2", "--probe-every", "2", "--threads", "1"]  # fmt: skip


@pytest.fixture()
def compare():
    spec = importlib.util.spec_from_file_location("compare", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


SIDES = ["tree", "backprop-1", "backprop-3", "sweeps", "mix", "backprop-mix"]


def test_comparison_is_resumable_and_ends_with_the_ratio(compare, tmp_path, capsys, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("The town lies on the river , and the river runs to the sea .\n" * 300)
    output = tmp_path / "results.json"
    argv = [*TINY, "--data", str(text), "--output", str(output), "--sides", *SIDES]
    monkeypatch.setenv("HBLL_CACHE", str(tmp_path / "cache"))
    compare.main(argv)
    first = capsys.readouterr().out
    runs = json.loads(output.read_text())["runs"]
    tried = {side: {run["lr"] for run in runs if run["side"] == side} for side in SIDES}
    assert all({1e-3, 1e-2} < lrs for lrs in tried.values())  # the best of two rates lies at an edge
    assert sum(run["seed"] == 1 for run in runs) == len(SIDES)  # each side's best rate is kept for the second seed
    by_side = {run["side"]: run for run in runs}
    assert [row["depth"] for row in by_side["tree"]["test"]] == [1, 2, 3]
    assert [row["depth"] for row in by_side["sweeps"]["test"]] == [3]
    assert by_side["backprop-3"]["work"] == 9 < by_side["sweeps"]["work"] < by_side["mix"]["work"]
    assert by_side["sweeps"]["probes"][0][1] == pytest.approx(1, abs=1e-3)  # three blocks: three sweeps are exact
    assert [step for step, _ in by_side["mix"]["evaluations"]] == [2]
    for side in ("mix", "backprop-mix"):
        assert [row["path"] for row in by_side[side]["test"]] == [[2], [1, 2], [1, 2, 3]]  # the prefix family
    assert by_side["mix"]["probes"][0][4] == pytest.approx(1, abs=1e-3)  # of the full path alone
    assert first.splitlines()[-1].startswith("ratio of perplexity on the full path to 3-block backprop at equal steps: tree ")
    assert (tmp_path / "results.png").stat().st_size > 5000

    monkeypatch.setattr(compare, "train", lambda *a: pytest.fail("a finished run was done again"))
    compare.main(argv)
    assert capsys.readouterr().out == first
    compare.main([*argv, "--report-only"])
    assert capsys.readouterr().out == first
    with pytest.raises(ValueError, match="other settings \\(steps\\).*--output"):
        compare.main([*argv, "--steps", "4"])


def test_a_synthetic_task(compare, tmp_path, capsys):
    output = tmp_path / "results.json"
    compare.main([*TINY, "--task", "induction", "--output", str(output), "--sides", "backprop-1", "sweeps:sweeps=0",
                  "--seeds", "0", "--lrs", "1e-3"])
    rows = {run["side"]: run["test"] for run in json.loads(output.read_text())["runs"]}
    assert {row["depth"] for row in rows["sweeps:sweeps=0"]} == {3} and 0 <= rows["backprop-1"][0]["accuracy"] <= 100
    assert "test accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, message",
    [
        ("forward", "side 'forward': allowed are backprop-N"),
        ("sweeps:k=3", "sweeps has no option 'k'; it has chunk, corrections"),
        ("sweeps:depth=3", "has no option 'depth'"),
        ("tree:sweeps=2", "tree has no option 'sweeps'; it has graphs, state_weight"),
        ("sweeps:sweeps=x", "sweeps='x' must be a number"),
    ],
)
def test_bad_sides(name, message):
    with pytest.raises(ValueError, match=message):
        Side.parse(name, "random")


def test_tuning_goes_past_the_edge_and_stops():
    assert tune(lambda lr: abs(lr - 4.5), [2, 4, 8]) == 4
    assert tune(lambda lr: abs(lr - 16), [1, 2, 4]) == 16
    assert tune(lambda lr: lr, [4, 8]) == 0.5  # three steps past the grid, and no further
    assert tune(lambda lr: lr, [4]) == 4
    assert tune(lambda lr: float("nan") if lr < 2 else abs(lr - 2), [1, 2, 4]) == 2


def test_sides_start_from_the_same_weights_and_read_the_same_batches(compare, monkeypatch):
    """With a learning rate of next to nothing, one seed is one model, whatever the side."""
    problem = compare.problem_of(compare.parse(["--task", "induction"]))
    shape = Shape(2, 16, 2, 2, steps=2, warmup_steps=1, eval_batches=1, eval_every=9, probe_every=9)
    losses = {name: train(Side.parse(name, "random"), 1e-12, 3, problem, shape) for name in ("tree", "sweeps", "backprop-3")}
    first, *others = ([row["loss"] for row in run["test"] if row["depth"] == 3] for run in losses.values())
    assert all(other == pytest.approx(first, rel=1e-6) for other in others)
    assert losses["sweeps"]["curve"][0][1] == pytest.approx(losses["backprop-3"]["curve"][0][1], abs=1e-4)


def test_a_shared_results_file_keeps_what_the_other_process_added(tmp_path):
    one, two = (Results(tmp_path / "r.json", {"a": 1}) for _ in range(2))
    one.add({"side": "tree", "lr": 1.0, "seed": 0})
    two.add({"side": "mix", "lr": 1.0, "seed": 0})
    assert [run["side"] for run in Results(tmp_path / "r.json", {"a": 1}).runs] == ["tree", "mix"]
    assert one.find("mix", 1.0, 0) is not None
    mix = Side.parse("mix", "octaves")
    assert dict(mix.config) == {"default_paths": "prefix", "readout_rank": 16} and "'mix_weight': 9.0" in mix.method(3)
    preset = read_preset("small", SCRIPT.parent / "presets")
    assert {name: value for name, value in mix.options if name in preset} == {k: preset[k] for k in ("sweeps", "corrections")}
    assert Side.parse("sweeps", "all").method(3) != Side.parse("sweeps:sweeps=4", "all").method(3)
    one.add({"side": "sweeps", "lr": 1.0, "seed": 0, "method": "K = 3"})
    assert one.find("sweeps", 1.0, 0, "K = 4") is None  # another default since then
    one.add({"side": "sweeps", "lr": 1.0, "seed": 0, "method": "K = 4"})
    assert [one.find("sweeps", 1.0, 0, f"K = {k}")["method"] for k in (3, 4)] == ["K = 3", "K = 4"]


STORED = [p for p in sorted(SCRIPT.parent.glob("results/compare*.json")) if not p.stem.startswith("compare-rnn")]


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_stored_runs_are_still_those_of_the_sides_that_they_name(path):
    """Otherwise the README's report would be empty, and a comparison would make all runs anew."""
    stored = json.loads(path.read_text())
    for run in stored["runs"]:
        assert Side.parse(run["side"], stored["setting"]["mix"]).method(stored["setting"]["n_level"]) == run["method"]


def test_the_main_path_of_a_mix_is_looked_at_with_what_the_side_has_learned(monkeypatch):
    seen = []

    def look(objective, *_):
        seen.append((objective.mix, objective.secants, int(objective.secants.n_steps)))
        return [1.0, 1.0, 0.0]

    monkeypatch.setattr(comparison, "fidelity", look)
    shape = Shape(2, 16, 2, batch_size=2, steps=4, warmup_steps=1, eval_batches=1, eval_every=9, probe_every=4)
    side = Side.parse("sweeps:linearization=secant,mix=octaves,paths=prefix", "octaves")
    train(side, 1e-3, 0, TaskProblem(make_task("induction", n_symbols=8, block_size=12)), shape)
    (mix, learned, n_steps), (alone, same, _) = seen
    assert (mix, alone, n_steps) == ("octaves", "none", 3) and same is learned


def test_induction_is_learned_by_three_blocks_and_not_by_one():
    """The smallest of the tasks on which depth is needed: sweeps learn it as backprop does, one block does not."""
    problem = TaskProblem(make_task("induction", n_symbols=8, block_size=24))
    shape = Shape(2, 32, 2, batch_size=32, steps=200, warmup_steps=20, eval_batches=4, eval_every=999, probe_every=999)
    reached = {name: train(Side.parse(name, "random"), 5e-3, 0, problem, shape)["test"][-1]["accuracy"]
               for name in ("backprop-1", "backprop-3", "sweeps:sweeps=1,corrections=1")}  # fmt: skip
    assert reached["backprop-1"] < 60 < 85 < min(reached["backprop-3"], reached["sweeps:sweeps=1,corrections=1"]), reached
