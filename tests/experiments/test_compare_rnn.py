"""The comparison over time: what is learned, that a state is carried, that the script resumes and ends with the ratio."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import compare_rnn
from comparisons import plots, time_methods
from comparisons import runs as training
from comparisons.results import Results
from comparisons.runs import TimeShape, train_time
from comparisons.tasks import Copying, Stream
from comparisons.time_methods import TimeMethod
from hbll_seq.layers.cells import make_cell
from hbll_seq.models.recurrent import RecurrentLM
from hbll_seq.tree.posterior import IGNORE_INDEX

STORED = sorted((Path(__file__).resolve().parents[2] / "train" / "results").glob("compare-rnn*.json"))
TINY = ["--n-embd", "4", "--hidden", "8", "--batch-size", "2", "--steps", "4", "--lrs", "1e-2",
        "--seeds", "0", "1", "--eval-batches", "1", "--eval-every", "2", "--alignment-every", "2",
        "--threads", "1"]  # fmt: skip


def stream(n=3000, vocab_size=11):
    ids = np.arange(n) % vocab_size
    return Stream({s: ids.astype(np.uint8) for s in ("train", "validation", "test")}, vocab_size, 12, "counting")


def test_a_row_goes_on_where_it_stopped():
    task = stream()
    windows = [task.batch(step, 3, seed=5)[0] for step in range(300)]  # more than once around the text
    for before, after in zip(windows, windows[1:]):
        assert torch.equal(before[:, -1], after[:, 0]) and before.shape == (3, 13)
    assert not torch.equal(windows[0], task.batch(0, 3, seed=6)[0])
    starts = [w[:, 0] for w in windows[:1]]
    assert len(set(starts[0].tolist())) == 3  # each row has a part of its own


def test_evaluation_is_the_deployed_network_token_by_token():
    torch.manual_seed(0)
    task, model = stream(64 * 12 * 3), RecurrentLM(11, make_cell("gru", 4, 8))
    (found,) = task.evaluate(model, "test", n_batches=2)
    text = torch.from_numpy(task.streams["test"].astype(np.int64)).unfold(0, 25, 36)[:64]  # two windows of each stretch
    logits, _ = model(text[:, :-1])
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()).item()
    assert found["loss"] == pytest.approx(nats, abs=1e-5) and found["bits"] == pytest.approx(nats / math.log(2), abs=1e-5)
    with pytest.raises(ValueError, match="test split has 500 tokens: 64 windows of 12.*smaller context length"):
        Stream({"test": np.zeros(500, np.uint8)}, 11, 12, "").evaluate(model, "test", 1)


def test_what_is_copied_stands_in_the_window_once_and_is_not_read_again():
    task = Copying(delay=5, length=3, n_symbols=4)
    tokens, labels = task.batch(0, 50, seed=0)
    assert tokens.shape == labels.shape == (50, task.context_length + 1)
    symbols, read = tokens[:, :3], tokens[:, :-1]  # the model reads all but the last token
    assert torch.equal(labels[:, -3:], symbols) and (labels[:, :-3] == IGNORE_INDEX).all()
    assert (read[:, 3:8] == 4).all() and (read[:, 8] == 5).all() and (read[:, 9:] == 4).all()
    assert torch.equal(tokens, task.batch(0, 50, seed=0)[0]) and not torch.equal(tokens, task.batch(1, 50, seed=0)[0])
    torch.manual_seed(0)
    (chance,) = task.evaluate(RecurrentLM(task.vocab_size, make_cell("gru", 4, 8)), "test", 8)
    assert chance["accuracy"] < 40 and chance["loss"] > 1.2
    with pytest.raises(ValueError, match="delay=0: must be at least 1"):
        Copying(delay=0)


def test_full_sweeps_train_as_bptt_with_the_state_carried():
    shape = TimeShape(cell="gru", n_embd=4, hidden=8, batch_size=2, steps=12, warmup_steps=2, clip=1.0, weight_decay=0.0,
                           eval_batches=1, eval_every=6, alignment_every=4)  # fmt: skip
    runs = {}
    for name in ("bptt", "sweeps:forward=2,backward=3,chunk_size=4,init=state", "one-step", "tree"):
        runs[name] = train_time(TimeMethod.named(name), 1e-2, 0, stream(), shape)
    exact, sweeps, truncated, tree = runs.values()
    assert sweeps["curve"][-1][1] == pytest.approx(exact["curve"][-1][1], abs=1e-4)
    assert abs(truncated["curve"][-1][1] - exact["curve"][-1][1]) > 1e-4
    assert [row[0] for row in sweeps["alignment"]] == [4, 8, 12] and all(p[1] > 0.9999 for p in sweeps["alignment"])
    afresh = stream()
    afresh.carry_state = False
    fresh = train_time(TimeMethod.named("bptt"), 1e-2, 0, afresh, shape)
    assert abs(fresh["curve"][-1][1] - exact["curve"][-1][1]) > 1e-4  # the state that was carried makes a difference
    assert [step for step, _ in exact["evaluations"]] == [6, 12] and math.isfinite(tree["test"][0]["bits"])


def test_the_script_resumes_and_ends_with_the_difference(tmp_path, capsys, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("The town lies on the river , and the river runs to the sea .\n" * 1000)
    argv = [*TINY, "--context-length", "12", "--data", str(text), "--output", str(tmp_path / "results.json")]
    with pytest.raises(ValueError, match="holds no run"):
        compare_rnn.main([*argv, "--report-only"])
    compare_rnn.main(argv)
    first = capsys.readouterr().out
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [(run["method"], run["seed"]) for run in runs] == [(name, seed) for seed in (0, 1) for name in compare_rnn.METHODS]
    assert first.splitlines()[-1].startswith("bits minus BPTT's at equal steps: one-step ")
    assert (tmp_path / "results.png").stat().st_size > 5000
    monkeypatch.setattr(compare_rnn, "train_time", lambda *a: pytest.fail("a finished run was done again"))
    compare_rnn.main(argv)
    assert capsys.readouterr().out == first
    compare_rnn.main([*argv, "--report-only"])
    said = capsys.readouterr()
    assert said.out == first and "results.png stays as it is" in said.err
    monkeypatch.setattr(compare_rnn, "METHODS", [])
    (tmp_path / "results.png").unlink()
    compare_rnn.main([*argv, "--report-only"])  # all that is stored
    assert capsys.readouterr().out == first and (tmp_path / "results.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="other settings"):
        compare_rnn.main([*argv, "--hidden", "9"])


def test_a_method_may_have_a_rate_of_its_own(tmp_path):
    output = tmp_path / "own.json"
    methods = ["--methods", "bptt", "sweeps:lr=3e-3"]
    compare_rnn.main([*TINY, "--task", "copy-64", "--seeds", "0", *methods, "--output", str(output)])
    runs = json.loads(output.read_text())["runs"]
    assert [(run["method"], run["lr"]) for run in runs] == [("bptt", 1e-2), ("sweeps:lr=3e-3", 3e-3)]


def test_the_copy_task_by_script(tmp_path, capsys):
    methods = ["--methods", "bptt", "sweeps"]
    compare_rnn.main([*TINY, "--task", "copy-64", "--seeds", "0", *methods, "--output", str(tmp_path / "copy.json")])
    assert "accuracy minus BPTT's at equal steps: sweeps " in capsys.readouterr().out
    short = ["--task", "copy-64", "--steps", "1", "--seeds", "0"]
    compare_rnn.main([*TINY, *short, *methods, "--output", str(tmp_path / "short.json")])
    assert (tmp_path / "short.png").exists()  # too short for a curve
    setting = json.loads((tmp_path / "copy.json").read_text())["setting"]
    with pytest.raises(ValueError, match="context-length=12 with task='copy-64'.*leave it out"):
        compare_rnn.main([*TINY, "--task", "copy-64", "--context-length", "12"])
    assert setting["context_length"] == 70 and setting["cell"] == "gru"


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_stored_runs_are_still_those_of_the_methods_that_they_name(path):
    """A changed default would let another method stand under the name of a stored run."""
    stored = json.loads(path.read_text())
    sweeps = compare_rnn.default_sweeps(stored["setting"]["task"], stored["setting"]["cell"])
    runs = Results(path, stored["setting"], "time").runs
    assert runs
    for run, old in zip(runs, stored["runs"], strict=True):
        for name in (run["method"], old.get("side", run["method"])):
            method = compare_rnn.method_named(name, sweeps)
            assert (method.name, method.description) == (run["method"], run["description"])
        assert [old[key] for key in ("lr", "seed", "test")] == [run[key] for key in ("lr", "seed", "test")]


def test_the_fused_layer_trains_the_cell_as_bptt_does(tmp_path):
    output = tmp_path / "fused.json"
    argv = [*TINY, "--task", "copy-64", "--seeds", "0", "--methods", "bptt", "fused", "one-step", "--output", str(output)]
    compare_rnn.main(argv)
    bptt, fused, truncated = json.loads(output.read_text())["runs"][:3]
    assert (fused["method"], fused["description"]) == ("fused", "fused {}")
    assert fused["curve"][-1][1] == pytest.approx(bptt["curve"][-1][1], abs=2e-5)
    assert fused["test"][0]["loss"] == pytest.approx(bptt["test"][0]["loss"], abs=1e-5)  # of the deployed cell
    assert truncated["test"][0]["loss"] != pytest.approx(bptt["test"][0]["loss"], abs=1e-4)  # or that would say nothing
    with pytest.raises(ValueError, match="'fused' with cell='mingru': torch has fused layers of gru, elman; leave"):
        compare_rnn.main([*argv[:-1], str(tmp_path / "other.json"), "--cell", "mingru"])


def test_small_is_a_setting_of_copying_with_a_file_of_its_own():
    args = compare_rnn.parse(["--task", "copy-256", "--small"])
    assert args.output.name == "compare-rnn-copy-256-gru-small.json" and args.memory == 256
    assert all(getattr(args, name) == value for name, value in compare_rnn.SMALL.items()) and args.n_embd == 16
    assert compare_rnn.parse(["--task", "copy-256", "--small", "--seeds", "5"]).seeds == [5]
    with pytest.raises(ValueError, match="small=True with task='bytes'.*--task copy-256"):
        compare_rnn.parse(["--small"])


def test_chunks_of_default_sweeps_grow_with_the_delay():
    defaults = {task: compare_rnn.default_sweeps(task, "gru") for task in ("copy-64", "copy-256", "bytes")}
    assert {task: (sweeps["linearization"], sweeps["chunk_size"]) for task, sweeps in defaults.items()} == {
        "copy-64": ("shared_matrix", 8), "copy-256": ("shared_matrix", 32), "bytes": ("zero", 8)}  # fmt: skip
    assert compare_rnn.default_sweeps("copy-256", "mingru")["linearization"] == "diagonal"


@pytest.mark.parametrize(
    "name, message",
    [
        ("adjoint", "method 'adjoint': allowed are bptt, one-step, truncated, sweeps, tree"),
        ("sweeps:chunk_size=0", "chunk.*=0.*at least 1"),
        ("truncated:window=0", "window=0.*at least 1"),
        ("bptt:chunk_size=2", "bptt has no option 'chunk_size'"),
        ("sweeps:forward=x", "forward='x' must be a number"),
    ],
)
def test_bad_methods_are_refused_before_any_run(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        compare_rnn.main([*TINY, "--task", "copy-64", "--methods", "bptt", name, "--output", str(tmp_path / "none.json")])
    assert not (tmp_path / "none.json").exists()


@pytest.mark.parametrize("cell, linearization, memory", [("gru", "shared_matrix", 64.0), ("mingru", "diagonal", 64.0),
                                                         ("elman", "shared_matrix", None)])  # fmt: skip
def test_copying_has_defaults_and_a_memory_of_its_own(tmp_path, cell, linearization, memory):
    output = tmp_path / "copy.json"
    argv = [*TINY, "--task", "copy-64", "--cell", cell, "--seeds", "0", "--methods", "sweeps"]
    compare_rnn.main([*argv, "--output", str(output)])
    found = json.loads(output.read_text())
    assert found["setting"]["memory"] == memory
    assert f"'linearization': '{linearization}'" in found["runs"][0]["description"]


def test_memory_reaches_the_cells_of_all_methods(tmp_path, monkeypatch):
    seen = []
    for module in (training, time_methods):
        make = module.make_cell
        record = lambda *a, make=make, name=module.__name__: seen.append((name, *a[2:])) or make(*a)
        monkeypatch.setattr(module, "make_cell", record)
    for memory, expected in (("9", 9.0), ("0", None)):
        seen.clear()
        output = tmp_path / f"{memory}.json"
        compare_rnn.main([*TINY, "--memory", memory, "--seeds", "0", "--methods", "tree", "--output", str(output)])
        trained = [(name, given) for name, hidden, *given in seen if hidden == 8]  # others only check the options
        assert {name for name, _ in trained} == {training.__name__, time_methods.__name__}
        assert all(given == [expected] for _, given in trained)


def test_measuring_the_gradient_teaches_a_method_nothing():
    shape = dict(cell="gru", n_embd=4, hidden=8, batch_size=4, steps=12, warmup_steps=1, clip=1.0, weight_decay=0.0,
                 eval_batches=1, eval_every=99)  # fmt: skip
    method = TimeMethod.named("sweeps:forward=2,backward=2,chunk_size=4,linearization=shared_matrix,init=state")
    runs = [train_time(method, 1e-2, 0, Copying(6), TimeShape(**shape, alignment_every=n)) for n in (1, 99)]
    assert len(runs[0]["alignment"]) == 12 and not runs[1]["alignment"]
    assert runs[0]["curve"] == runs[1]["curve"] and runs[0]["test"] == runs[1]["test"]


def test_a_run_with_one_evaluation_is_seen_in_the_figure(monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    run = {"evaluations": [[10, 3.0]], "curve": [[20, 2.0]], "seconds": 4.0}
    plots.plot_time(Path("unused.png"), {"bptt": [run]}, "bits")
    plots.plot_time(Path("unused.png"), {"bptt": [{**run, "evaluations": []}]}, "bits")
    one, none = figures
    assert [axes.lines[0].get_marker() for axes in one.axes] == ["o", "o"]
    assert list(one.axes[1].lines[0].get_xdata()) == [2.0]  # seconds
    assert none.axes[1].get_title() == "no evaluation before the end"
