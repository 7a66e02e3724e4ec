"""The comparison over time: what is learned, that a state is carried, that the script resumes and ends with the ratio."""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from hbll_seq.layers.cells import make_cell
from hbll_seq.models.recurrent import RecurrentLM
from hbll_seq.training import recurrent_comparison, recurrent_sides
from hbll_seq.training.recurrent_comparison import CopyProblem, RecurrentShape, StreamProblem, train_recurrent
from hbll_seq.training.recurrent_sides import RecurrentSide
from hbll_seq.tree.posterior import IGNORE_INDEX

SCRIPT = Path(__file__).resolve().parents[2] / "train" / "compare_rnn.py"
TINY = ["--n-embd", "4", "--hidden", "8", "--batch-size", "2", "--steps", "4", "--lrs", "1e-2",
        "--seeds", "0", "1", "--eval-batches", "1", "--eval-every", "2", "--probe-every", "2", "--threads", "1"]  # fmt: skip


@pytest.fixture()
def script():
    spec = importlib.util.spec_from_file_location("compare_rnn", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


def stream(n=3000, vocab_size=11):
    ids = np.arange(n) % vocab_size
    return StreamProblem({s: ids.astype(np.uint8) for s in ("train", "validation", "test")}, vocab_size, 12, "counting")


def test_a_row_goes_on_where_it_stopped():
    problem = stream()
    windows = [problem.batch(step, 3, seed=5)[0] for step in range(300)]  # more than once around the text
    for before, after in zip(windows, windows[1:]):
        assert torch.equal(before[:, -1], after[:, 0]) and before.shape == (3, 13)
    assert not torch.equal(windows[0], problem.batch(0, 3, seed=6)[0])
    starts = [w[:, 0] for w in windows[:1]]
    assert len(set(starts[0].tolist())) == 3  # each row has a part of its own


def test_evaluation_is_the_deployed_network_token_by_token():
    torch.manual_seed(0)
    problem, model = stream(64 * 12 * 3), RecurrentLM(11, make_cell("gru", 4, 8))
    found = problem.evaluate(model, "test", n_batches=2)
    text = torch.from_numpy(problem.streams["test"].astype(np.int64)).unfold(0, 25, 36)[:64]  # two windows of each stretch
    logits, _ = model(text[:, :-1])
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()).item()
    assert found["loss"] == pytest.approx(nats, abs=1e-5) and found["bits"] == pytest.approx(nats / math.log(2), abs=1e-5)
    with pytest.raises(ValueError, match="test split has 500 tokens: 64 windows of 12.*smaller block size"):
        StreamProblem({"test": np.zeros(500, np.uint8)}, 11, 12, "").evaluate(model, "test", 1)


def test_what_is_copied_stands_in_the_window_once_and_is_not_read_again():
    problem = CopyProblem(delay=5, length=3, n_symbols=4)
    tokens, labels = problem.batch(0, 50, seed=0)
    assert tokens.shape == labels.shape == (50, problem.block_size + 1)
    symbols, read = tokens[:, :3], tokens[:, :-1]  # the model reads all but the last token
    assert torch.equal(labels[:, -3:], symbols) and (labels[:, :-3] == IGNORE_INDEX).all()
    assert (read[:, 3:8] == 4).all() and (read[:, 8] == 5).all() and (read[:, 9:] == 4).all()
    assert torch.equal(tokens, problem.batch(0, 50, seed=0)[0]) and not torch.equal(tokens, problem.batch(1, 50, seed=0)[0])
    torch.manual_seed(0)
    chance = problem.evaluate(RecurrentLM(problem.vocab_size, make_cell("gru", 4, 8)), "test", 8)
    assert chance["accuracy"] < 40 and chance["loss"] > 1.2
    with pytest.raises(ValueError, match="delay=0: must be at least 1"):
        CopyProblem(delay=0)


def test_full_sweeps_train_as_bptt_with_the_state_carried():
    shape = RecurrentShape(cell="gru", n_embd=4, hidden=8, batch_size=2, steps=12, warmup_steps=2, clip=1.0, weight_decay=0.0,
                           eval_batches=1, eval_every=6, probe_every=4)  # fmt: skip
    runs = {}
    for name in ("bptt", "sweeps:sweeps=2,corrections=3,chunk=4,init=state", "one-step", "tree"):
        runs[name] = train_recurrent(RecurrentSide.parse(name), 1e-2, 0, stream(), shape)
    exact, sweeps, truncated, tree = runs.values()
    assert sweeps["curve"][-1][1] == pytest.approx(exact["curve"][-1][1], abs=1e-4)
    assert abs(truncated["curve"][-1][1] - exact["curve"][-1][1]) > 1e-4
    assert [probe[0] for probe in sweeps["probes"]] == [4, 8, 12] and all(p[1] > 0.9999 for p in sweeps["probes"])
    afresh = stream()
    afresh.is_continuous = False
    fresh = train_recurrent(RecurrentSide.parse("bptt"), 1e-2, 0, afresh, shape)
    assert abs(fresh["curve"][-1][1] - exact["curve"][-1][1]) > 1e-4  # the state that was carried makes a difference
    assert [step for step, _ in exact["evaluations"]] == [6] and math.isfinite(tree["test"][0]["bits"])


def test_the_script_resumes_and_ends_with_the_difference(script, tmp_path, capsys, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("The town lies on the river , and the river runs to the sea .\n" * 1000)
    argv = [*TINY, "--block-size", "12", "--data", str(text), "--output", str(tmp_path / "results.json")]
    with pytest.raises(ValueError, match="holds no run"):
        script.main([*argv, "--report-only"])
    script.main(argv)
    first = capsys.readouterr().out
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [(run["side"], run["seed"]) for run in runs] == [(side, seed) for side in script.SIDES for seed in (0, 1)]
    assert first.splitlines()[-1].startswith("bits minus BPTT's at equal steps: one-step ")
    assert (tmp_path / "results.png").stat().st_size > 5000
    monkeypatch.setattr(script, "train_recurrent", lambda *a: pytest.fail("a finished run was done again"))
    script.main(argv)
    assert capsys.readouterr().out == first
    script.main([*argv, "--report-only"])
    assert capsys.readouterr().out == first
    monkeypatch.setattr(script, "SIDES", [])
    script.main([*argv, "--report-only"])  # all that is stored
    assert capsys.readouterr().out == first
    with pytest.raises(ValueError, match="other settings"):
        script.main([*argv, "--hidden", "9"])


def test_a_side_may_have_a_rate_of_its_own(script, tmp_path):
    output = tmp_path / "own.json"
    script.main([*TINY, "--task", "copy-64", "--seeds", "0", "--sides", "bptt", "sweeps:lr=3e-3", "--output", str(output)])
    runs = json.loads(output.read_text())["runs"]
    assert [(run["side"], run["lr"]) for run in runs] == [("bptt", 1e-2), ("sweeps:lr=3e-3", 3e-3)]


def test_the_copy_task_by_script(script, tmp_path, capsys):
    sides = ["--sides", "bptt", "sweeps"]
    script.main([*TINY, "--task", "copy-64", "--seeds", "0", *sides, "--output", str(tmp_path / "copy.json")])
    assert "accuracy minus BPTT's at equal steps: sweeps " in capsys.readouterr().out
    short = ["--task", "copy-64", "--steps", "1", "--seeds", "0"]
    script.main([*TINY, *short, *sides, "--output", str(tmp_path / "short.json")])
    assert (tmp_path / "short.png").exists()  # too short for a curve
    setting = json.loads((tmp_path / "copy.json").read_text())["setting"]
    with pytest.raises(ValueError, match="block-size=12 with task='copy-64'.*leave it out"):
        script.main([*TINY, "--task", "copy-64", "--block-size", "12"])
    assert setting["block_size"] == 70 and setting["cell"] == "gru"


@pytest.mark.parametrize("path", sorted(SCRIPT.parent.glob("results/compare-rnn*.json")), ids=lambda path: path.stem)
def test_stored_runs_are_still_those_of_the_sides_that_they_name(script, path):
    """A changed default would let another method stand under the name of a stored run."""
    stored = json.loads(path.read_text())
    dial = script.default_dial(stored["setting"]["task"], stored["setting"]["cell"])
    assert stored["runs"]
    for run in stored["runs"]:
        assert RecurrentSide.parse(run["side"], dial).method == run["method"], run["side"]


def test_chunks_of_the_default_dial_grow_with_the_delay(script):
    dials = {task: script.default_dial(task, "gru") for task in ("copy-64", "copy-256", "bytes")}
    assert {task: (dial["linearization"], dial["chunk"]) for task, dial in dials.items()} == {
        "copy-64": ("secant", 8), "copy-256": ("secant", 32), "bytes": ("zero", 8)}  # fmt: skip
    assert script.default_dial("copy-256", "mingru")["linearization"] == "diagonal"


@pytest.mark.parametrize(
    "side, message",
    [
        ("adjoint", "side 'adjoint': allowed are bptt, one-step, truncated, sweeps, tree"),
        ("sweeps:chunk=0", "chunk=0.*at least 1"),
        ("truncated:window=0", "window=0.*at least 1"),
        ("bptt:chunk=2", "bptt has no option 'chunk'"),
    ],
)
def test_bad_sides_are_refused_before_any_run(script, tmp_path, side, message):
    with pytest.raises(ValueError, match=message):
        script.main([*TINY, "--task", "copy-64", "--sides", "bptt", side, "--output", str(tmp_path / "none.json")])
    assert not (tmp_path / "none.json").exists()


@pytest.mark.parametrize("cell, linearization, memory", [("gru", "secant", 64.0), ("mingru", "diagonal", 64.0),
                                                         ("elman", "secant", None)])  # fmt: skip
def test_copying_has_a_dial_and_a_memory_of_its_own(script, tmp_path, cell, linearization, memory):
    output = tmp_path / "copy.json"
    script.main([*TINY, "--task", "copy-64", "--cell", cell, "--seeds", "0", "--sides", "sweeps", "--output", str(output)])
    found = json.loads(output.read_text())
    assert found["setting"]["memory"] == memory
    assert f"'linearization': '{linearization}'" in found["runs"][0]["method"]


def test_memory_reaches_the_cells_of_all_sides(script, tmp_path, monkeypatch):
    seen = []
    for module in (recurrent_comparison, recurrent_sides):
        make = module.make_cell
        record = lambda *a, make=make, name=module.__name__: seen.append((name, *a[2:])) or make(*a)
        monkeypatch.setattr(module, "make_cell", record)
    for memory, expected in (("9", 9.0), ("0", None)):
        seen.clear()
        output = tmp_path / f"{memory}.json"
        script.main([*TINY, "--memory", memory, "--seeds", "0", "--sides", "tree", "--output", str(output)])
        trained = [(name, given) for name, hidden, *given in seen if hidden == 8]  # others only check the options
        assert {name for name, _ in trained} == {recurrent_comparison.__name__, recurrent_sides.__name__}
        assert all(given == [expected] for _, given in trained)


def test_looks_at_the_gradient_teach_a_side_nothing():
    shape = dict(cell="gru", n_embd=4, hidden=8, batch_size=4, steps=12, warmup_steps=1, clip=1.0, weight_decay=0.0,
                 eval_batches=1, eval_every=99)  # fmt: skip
    side = RecurrentSide.parse("sweeps:sweeps=2,corrections=2,chunk=4,linearization=secant,init=state")
    runs = [train_recurrent(side, 1e-2, 0, CopyProblem(6), RecurrentShape(**shape, probe_every=n)) for n in (1, 99)]
    assert len(runs[0]["probes"]) == 12 and not runs[1]["probes"]
    assert runs[0]["curve"] == runs[1]["curve"] and runs[0]["test"] == runs[1]["test"]


def test_a_run_with_one_evaluation_is_seen_in_the_figure(script, monkeypatch):
    figures = []
    monkeypatch.setattr(script, "save_figure", lambda figure, path: figures.append(figure))
    run = {"evaluations": [[10, 3.0]], "curve": [[20, 2.0]], "seconds": 4.0}
    script.plot(Path("unused.png"), {"bptt": [run]}, "bits")
    script.plot(Path("unused.png"), {"bptt": [{**run, "evaluations": []}]}, "bits")
    one, none = figures
    assert [axes.lines[0].get_marker() for axes in one.axes] == ["o", "o"]
    assert list(one.axes[1].lines[0].get_xdata()) == [2.0]  # seconds
    assert none.axes[1].get_title() == "no evaluation before the end"
