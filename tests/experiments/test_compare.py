"""The comparison script: resumable, its table and ratio, and that all methods start from the same weights."""

import dataclasses
import itertools
import json
import math
import os
from pathlib import Path

import pytest
import torch

import compare
from comparisons import fit, plots
from comparisons.depth_methods import DepthMethod
from comparisons.results import Results
from comparisons.runs import DepthShape, train_depth
from comparisons.tasks import SyntheticTask
from comparisons.words import current_setting
from hbll_seq.data.tasks import make_task
from hbll_seq.evaluation.perplexity import evaluate_paths
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.config import HBLLConfig
from hbll_seq.objectives.backprop import BackpropObjective
from hbll_seq.objectives.local import LocalObjective
from hbll_seq.training import plots as drawing

TRAIN = Path(__file__).resolve().parents[2] / "train"
TINY = ["--n-level", "2", "--n-embd", "16", "--n-head", "2", "--context-length", "16", "--batch-size", "2", "--steps", "3",
        "--lrs", "1e-3", "1e-2", "--seeds", "0", "1", "--eval-batches", "1",
        "--eval-every", "2", "--alignment-every", "2", "--threads", "1"]  # fmt: skip




METHODS = ["tree", "backprop-1", "backprop-3", "sweeps", "mix", "backprop-mix"]


def test_comparison_is_resumable_and_ends_with_the_ratio(tmp_path, capsys, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("The town lies on the river , and the river runs to the sea .\n" * 300)
    output = tmp_path / "results.json"
    argv = [*TINY, "--data", str(text), "--output", str(output), "--methods", *METHODS]
    monkeypatch.setenv("HBLL_CACHE", str(tmp_path / "cache"))
    compare.main(argv)
    first = capsys.readouterr().out
    runs = json.loads(output.read_text())["runs"]
    tried = {name: {run["lr"] for run in runs if run["method"] == name} for name in METHODS}
    assert all({1e-3, 1e-2} < lrs for lrs in tried.values())  # the best of two rates lies at an edge
    assert sum(run["seed"] == 1 for run in runs) == len(METHODS)  # each method's best rate is kept for the second seed
    by_method = {run["method"]: run for run in runs}
    assert [row["depth"] for row in by_method["tree"]["test"]] == [1, 2, 3]
    assert [row["depth"] for row in by_method["sweeps"]["test"]] == [3]
    assert by_method["backprop-3"]["work"] == 9 == by_method["sweeps"]["work"] < by_method["mix"]["work"]  # one segment
    assert by_method["sweeps"]["alignment"][0][1] == pytest.approx(1, abs=1e-3)  # three blocks in one segment: exact
    assert [step for step, _ in by_method["mix"]["evaluations"]] == [2, 3]
    assert all(run["step_seconds"] > 0 for run in runs)
    assert "validation perplexity at equal time" in first and "step time / backprop-3's" in first
    for name in ("mix", "backprop-mix"):
        assert [row["path"] for row in by_method[name]["test"]] == [[2], [1, 2], [1, 2, 3]]  # the prefix family
    assert by_method["mix"]["alignment"][0][4] == pytest.approx(1, abs=1e-3)  # of the full path alone
    assert first.splitlines()[-1].startswith("ratio of perplexity on the full path to 3-block backprop at equal steps: tree ")
    assert (tmp_path / "results.png").stat().st_size > 5000

    monkeypatch.setattr(compare, "train_depth", lambda *a: pytest.fail("a finished run was done again"))
    compare.main(argv)
    assert capsys.readouterr().out == first
    (tmp_path / "results.png").write_bytes(b"of another version of Matplotlib")
    compare.main([*argv, "--report-only"])
    said = capsys.readouterr()
    assert said.out == first and "results.png stays as it is; --figure FILE draws one" in said.err
    assert (tmp_path / "results.png").read_bytes() == b"of another version of Matplotlib"
    compare.main([*argv, "--report-only", "--figure", str(tmp_path / "asked.png")])
    (tmp_path / "results.png").unlink()
    compare.main([*argv, "--report-only"])
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("asked.png", "results.png"))
    said = capsys.readouterr()
    assert said.out == first * 2 and "stays" not in said.err
    compare.main([*argv, "--report-only", "--methods", "sweeps", "mix"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "the file also holds, for --methods: tree backprop-1 backprop-3 backprop-mix"
    with pytest.raises(ValueError, match="other settings \\(steps\\).*--output"):
        compare.main([*argv, "--steps", "4"])


def test_a_synthetic_task(tmp_path, capsys):
    output = tmp_path / "results.json"
    compare.main([*TINY, "--task", "induction", "--output", str(output), "--methods", "backprop-1", "sweeps:forward=0",
                  "--seeds", "0", "--lrs", "1e-3"])
    rows = {run["method"]: run["test"] for run in json.loads(output.read_text())["runs"]}
    assert {row["depth"] for row in rows["sweeps:forward=0"]} == {3} and 0 <= rows["backprop-1"][0]["accuracy"] <= 100
    assert "test accuracy" in capsys.readouterr().out


def test_what_cannot_be_counted_fails_before_its_run(tmp_path, monkeypatch):
    def work(method):
        raise ZeroDivisionError

    monkeypatch.setattr(DepthMethod, "work", work)
    monkeypatch.setattr("comparisons.runs.fit", lambda *a, **k: pytest.fail("trained first"))
    with pytest.raises(ZeroDivisionError):
        compare.main([*TINY, "--task", "induction", "--output", str(tmp_path / "results.json"), "--methods", "backprop-1"])


@pytest.mark.parametrize(
    "name, message",
    [
        ("forward", "method 'forward': allowed are backprop-N"),
        ("sweeps:k=3", "sweeps has no option 'k'; it has auxiliary_blocks, auxiliary_exits, backward, chunk_size"),
        ("sweeps:depth=3", "has no option 'depth'"),
        ("tree:forward=2", "tree has no option 'forward'; it has clean_inputs, recompute, state_weight"),
        ("sweeps:forward=x", "forward='x' must be a number"),
        ("sweeps:sweeps=x", "method 'sweeps:forward=x': forward='x' must be a number"),
        ("sweeps:recompute=1", "recompute='1' must be true or false"),
    ],
)
def test_bad_names(name, message):
    with pytest.raises(ValueError, match=message):
        DepthMethod.named(name, "random")


def test_methods_start_from_the_same_weights_and_read_the_same_batches():
    """With a learning rate of next to nothing, one seed is one model, whatever the method."""
    task = compare.task_of(compare.parse(["--task", "induction"]))
    shape = DepthShape(2, 16, 2, 2, steps=2, warmup_steps=1, eval_batches=1, eval_every=9, alignment_every=9)
    losses = {name: train_depth(DepthMethod.named(name, "random"), 1e-12, 3, task, shape)
              for name in ("tree", "sweeps", "backprop-3")}  # fmt: skip
    first, *others = ([row["loss"] for row in run["test"] if row["depth"] == 3] for run in losses.values())
    assert all(other == pytest.approx(first, rel=1e-6) for other in others)
    assert losses["sweeps"]["curve"][0][1] == pytest.approx(losses["backprop-3"]["curve"][0][1], abs=1e-4)


def test_the_short_name_mix_is_what_the_results_were_measured_with():
    """The preset "small" was that until it became one of fewer exits a step."""
    mix = DepthMethod.named("mix", "octaves")
    assert list(dict(mix.config).values()) == ["prefix", 16] and "'depth_mix_weight': 9.0" in mix.description
    assert [dict(mix.options)[name] for name in ("forward", "backward")] == [2, 3]
    assert DepthMethod.named("sweeps").description != DepthMethod.named("sweeps:forward=4").description


STORED = [p for p in sorted(TRAIN.glob("results/compare*.json")) if not p.stem.startswith("compare-rnn")]


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_stored_runs_are_still_those_of_the_methods_that_they_name(path):
    """Otherwise the README's report would be empty, and a comparison would make all runs anew."""
    stored = json.loads(path.read_text())
    setting = stored["setting"]
    for run, old in zip(Results(path, setting, "depth").runs, stored["runs"], strict=True):
        shape = {name: setting[name] for name in ("n_level", "cell") if name in setting}
        asked = old.get("side", run["method"])
        if run["method"].startswith("sweeps:forward=3,backward=4"):  # a bare "sweeps" has another meaning by now
            asked = run["method"]
        for name in (run["method"], asked):
            method = DepthMethod.named(name, current_setting(setting)["depth_mix"], **shape)
            assert (method.name, method.description) == (run["method"], run["description"])
        assert [old[key] for key in ("lr", "seed", "test")] == [run[key] for key in ("lr", "seed", "test")]


@pytest.mark.parametrize("path", [p for p in STORED if "-tree-" not in p.stem], ids=lambda path: path.stem)
def test_stored_settings_are_still_those_of_the_same_command(path):
    """A setting that came later is written only where it is not what every run before it had."""
    stored = json.loads(path.read_text())["setting"]
    options = {k: v for k, v in current_setting(stored).items() if k != "text"}
    argv = [text for k, v in options.items() for text in (f"--{k.replace('_', '-')}", str(v))]
    argv = ["--carry-state" if text == "True" else text for text in argv if text != "--carry-state"]
    Results(path, {**compare.setting_of(compare.parse(argv)), "text": stored["text"]}, "depth")
    with pytest.raises(ValueError, match="other settings \\(cell\\)"):
        Results(path, {**stored, "cell": "elman"}, "depth")


def test_the_main_path_of_a_mix_is_measured_with_what_the_method_has_learned(monkeypatch):
    seen = []

    def look(objective, *_):
        seen.append((objective.depths.name, objective.secants, int(objective.secants.n_steps)))
        return [1.0, 1.0, 0.0]

    monkeypatch.setattr(fit, "gradient_alignment", look)
    shape = DepthShape(2, 16, 2, batch_size=2, steps=4, warmup_steps=1, eval_batches=1, eval_every=9, alignment_every=4)
    method = DepthMethod.named("sweeps:linearization=low_rank,depth_mix=octaves,paths=prefix")
    train_depth(method, 1e-3, 0, SyntheticTask(make_task("induction", n_symbols=8, context_length=12)), shape)
    (mix, learned, n_steps), (alone, same, _) = seen
    assert (mix, alone, n_steps) == ("octaves", "none", 3) and same is learned


# ---------------------------------------------------------------------------------------------- recurrent stacks

#: every iteration that there can be, over 3 blocks and 8 tokens; taken one by one along time
EXACT = "sweeps:forward=2,backward=2,time_forward=7,time_backward=7,time_chunk_size=1,time_linearization=zero"
GRU = DepthShape(2, 16, 2, batch_size=2, steps=5, warmup_steps=1, eval_batches=3, eval_every=1, alignment_every=3, cell="gru")


@pytest.fixture()
def stretches(tmp_path, monkeypatch):
    """The task of a recurrent stack, given further options: a text in windows of 8 tokens."""
    text = tmp_path / "text.txt"
    text.write_text("The town lies on the river , and the river runs to the sea , past nine more towns .\n" * 300)
    monkeypatch.setenv("HBLL_CACHE", str(tmp_path / "cache"))
    options = ["--data", str(text), "--context-length", "8", "--cell", "gru", "--n-level", "2"]
    return lambda *more: compare.task_of(compare.parse([*options, *more]))


def test_methods_of_a_recurrent_stack_start_from_the_same_weights(stretches):
    shape = dataclasses.replace(GRU, steps=2)
    names = ("backprop-3", "sweeps", "sweeps:time_forward=0,time_chunk_size=2", "mix")
    runs = [train_depth(DepthMethod.named(name, "random"), 1e-12, 3, stretches(), shape) for name in names]
    losses = [run["test"][-1]["loss"] for run in runs]
    assert losses == pytest.approx([losses[0]] * len(names), rel=1e-6)


@pytest.mark.parametrize("cell", ["gru", "elman", "gru,transformer,mingru"])
def test_sweeps_without_end_learn_what_backprop_learns(stretches, cell):
    shape = dataclasses.replace(GRU, steps=9, eval_every=2, cell=cell)
    names = ("backprop-3", EXACT, EXACT.replace("=7", "=0"))
    backprop, exact, less = (train_depth(DepthMethod.named(name, "random"), 2e-2, 0, stretches(), shape) for name in names)
    curves = [[row["depth 3"] for _, row in run["evaluations"]] for run in (backprop, exact, less)]
    assert len(curves[0]) == 5 and curves[0][-1] < 0.3 * curves[0][0]
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert exact["test"][0]["loss"] == pytest.approx(backprop["test"][0]["loss"], rel=1e-5)
    assert [row[1] for row in exact["alignment"]] == pytest.approx([1] * 3, abs=1e-5)  # at carried states, by both
    assert curves[2] != pytest.approx(curves[0], rel=2e-4)  # or the comparison above would say nothing
    assert all(row[1] < 1 - 5e-5 for row in less["alignment"])


@pytest.mark.parametrize("name, objective", [("sweeps", LocalObjective), ("mix", LocalObjective),
                                             ("backprop-3", BackpropObjective)])  # fmt: skip
def test_a_window_starts_from_the_state_of_the_one_before(stretches, monkeypatch, name, objective):
    seen, looks, forward, align = [], [], objective.forward, fit.gradient_alignment

    def spy(self, inputs, labels=None, step=0, states=None):
        given = {p: s.clone() for p, s in (states or {}).items()}
        output = forward(self, inputs, labels, step, states)
        if len(inputs) == GRU.batch_size and not looking:  # neither a measurement nor what counts the work
            seen.append((inputs, given, output.states))
        return output

    looking = []

    def look(*args, **carried):
        looking.append(True)
        before = {p: s.clone() for p, s in carried["states"].items()}
        found = align(*args, **carried)
        looking.pop()
        looks.append((before, carried["states"]))
        return found

    monkeypatch.setattr(objective, "forward", spy)
    monkeypatch.setattr(fit, "gradient_alignment", look)
    train_depth(DepthMethod.named(name, "random"), 1e-3, 0, stretches(), GRU)
    assert len(seen) == GRU.steps and seen[0][1] == {} and (1, 2, 3) in seen[1][1]
    for (inputs, _, ends), (following, starts, _) in itertools.pairwise(seen):
        assert torch.equal(inputs[:, -1], following[:, 0])  # each row reads on
        assert starts.keys() == ends.keys() and all(torch.equal(starts[p], ends[p]) for p in ends)
    assert len(looks) == {"sweeps": 1, "mix": 2, "backprop-3": 0}[name]
    for before, after in looks:
        assert before.keys() == after.keys() == seen[2][1].keys()
        assert all(torch.equal(before[p], after[p]) and torch.equal(before[p], seen[2][1][p]) for p in before)


def test_looks_at_the_gradient_change_nothing_with_states(stretches):
    shapes = (dataclasses.replace(GRU, alignment_every=n) for n in (1, 99))
    often, never = (train_depth(DepthMethod.named("mix", "random"), 1e-3, 0, stretches(), shape) for shape in shapes)
    assert len(often["alignment"]) == GRU.steps and often["test"] == never["test"]


def test_the_work_of_recurrent_blocks_is_counted_on_real_ones():
    """One for an evaluation, whatever it does over time; sweeps also refine the last block, whose output they do not need."""

    def work(name, cell):
        return DepthMethod.named(name, n_level=2, cell=cell).work()

    assert work("backprop-3", "gru") == work("backprop-3", "transformer") == 9
    plain = work("sweeps:forward=1,backward=1", "transformer")
    assert work("sweeps:forward=1,backward=1", "gru") == plain + 1
    assert work("sweeps:forward=1,backward=1", "gru,gru,transformer") == plain
    assert work("sweeps:forward=1,backward=1,time_forward=3,time_backward=3", "gru") == plain + 1


def test_evaluation_reads_on_where_training_does(stretches):
    """Trained alike (not at all), evaluated as deployed: with what was read before, or without."""
    shape = dataclasses.replace(GRU, steps=1)
    rows = {}
    for options in ((), ("--no-carry-state",)):
        task = stretches(*options)
        torch.manual_seed(0)
        model = HBLLForCausalLM(HBLLConfig(vocab_size=task.vocab_size, n_level=2, n_embd=16, cell="gru", context_length=8))
        carry = task.carry_state
        expected = evaluate_paths(model, task.windows["test"], {"full": (1, 2, 3)}, max_batches=3, carry_state=carry)
        rows[carry] = task.evaluate(model, "test", 3, paths={"full": (1, 2, 3)})
        assert rows[carry] == expected
        run = train_depth(DepthMethod.named("sweeps", "random"), 1e-3, 0, task, shape)
        assert run["test"][0]["tokens"] == expected[0]["tokens"]
    assert rows[True][0]["loss"] != rows[False][0]["loss"]


def test_a_comparison_of_recurrent_stacks(tmp_path, capsys, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("The town lies on the river , and the river runs to the sea .\n" * 300)
    monkeypatch.setenv("HBLL_CACHE", str(tmp_path / "cache"))
    output = tmp_path / "results.json"
    argv = [*TINY, "--data", str(text), "--output", str(output), "--cell", "gru", "--lrs", "1e-2", "--seeds", "0"]
    compare.main(argv)
    stored = json.loads(output.read_text())
    assert stored["setting"]["cell"] == "gru" and stored["setting"]["carry_state"] is True
    runs = {run["method"]: run for run in stored["runs"]}
    assert list(runs) == ["backprop-3", "sweeps", "mix"]  # what a recurrent stack compares of itself
    assert "'time_chunk_size': 8" in runs["sweeps"]["description"] and "time" not in runs["backprop-3"]["description"]
    assert runs["mix"]["work"] > DepthMethod.named("mix", "octaves", n_level=2).work()  # estimates of the last block too
    shown = capsys.readouterr().out
    assert "states carried from window to window" in shown
    bits = {name: math.log2(run["test"][-1]["perplexity"]) for name, run in runs.items()}
    for name in ("sweeps", "mix"):
        assert f"{name} {bits[name]:.4f}" in shown and f"{name} {bits[name] - bits['backprop-3']:+.4f}" in shown
    for more in (["--no-carry-state"], ["--cell", "transformer"]):  # left out is not the same as equal
        with pytest.raises(ValueError, match="other settings \\(.*carry_state"):
            compare.main([*argv, *more, "--methods", "sweeps"])


def test_names_and_defaults_of_recurrent_stacks():
    def name(*argv):
        return compare.parse(argv).output.name

    assert name() == "compare.json" and name("--n-level", "2") == "compare-2.json" and name("--quick") == "compare-quick.json"
    assert name("--cell", "gru") == "compare-gru-3.json"
    assert name("--cell", "gru, transformer,gru", "--n-level", "2", "--quick") == "compare-gru+transformer+gru-2-quick.json"
    carried = {cell: compare.parse(["--cell", cell, "--n-level", "2"]).carry_state
               for cell in ("transformer", "gru", "gru,gru,elman", "gru,transformer,gru")}  # fmt: skip
    assert list(carried.values()) == [False, True, True, False]
    assert compare.parse(["--cell", "gru,transformer,gru", "--n-level", "2", "--carry-state"]).carry_state
    assert not compare.parse(["--cell", "gru", "--task", "induction"]).carry_state


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--carry-state"], "carry_state=True with cell='transformer'"),
        (["--cell", "gru", "--task", "induction", "--carry-state"], "carry_state=True with task='induction'"),
        (["--cell", "lstm"], "cell='lstm'"),
        (["--cell", "gru,gru", "--n-level", "2"], "names 2 blocks"),
        (["--methods", "sweeps:time_chunk_size=4"], "time_chunk_size.*cell='transformer'"),
        (["--cell", "gru", "--methods", "tree"], "tree.*carry_state"),
        (["--cell", "gru", "--methods", "v_cycles"], "v_cycles"),
        (["--cell", "gru", "--methods", "sweeps:time_linearization=identity"], "identity. over the time inside of blocks"),
    ],
)
def test_recurrent_stacks_that_cannot_be_compared(tmp_path, monkeypatch, argv, message):
    monkeypatch.setattr(compare, "train_depth", lambda *a: pytest.fail("told only after the first run"))
    with pytest.raises(ValueError, match=message):
        compare.main([*argv, "--output", str(tmp_path / "r.json"), "--threads", "1"])


@pytest.mark.slow
def test_induction_is_learned_by_three_blocks_and_not_by_one():
    """The smallest of the tasks on which depth is needed: sweeps learn it as backprop does, one block does not."""
    task = SyntheticTask(make_task("induction", n_symbols=8, context_length=24))
    shape = DepthShape(2, 32, 2, batch_size=32, steps=200, warmup_steps=20, eval_batches=4, eval_every=999,
                       alignment_every=999)  # fmt: skip
    reached = {name: train_depth(DepthMethod.named(name, "random"), 5e-3, 0, task, shape)["test"][-1]["accuracy"]
               for name in ("backprop-1", "backprop-3", "sweeps:forward=1,backward=1")}  # fmt: skip
    assert reached["backprop-1"] < 60 < 85 < min(reached["backprop-3"], reached["sweeps:forward=1,backward=1"]), reached


def test_a_run_with_one_evaluation_is_seen_in_the_figure(monkeypatch):
    figures = []
    monkeypatch.setattr(drawing, "save_figure", lambda figure, path: figures.append(figure))
    run = {"test": [{"depth": 3, "accuracy": 50.0}], "evaluations": [[10, {"depth 3": 40.0}]], "work": 9.0}
    plots.plot_depth("unused.png", {"sweeps": [run]}, "accuracy")
    _, by_step, by_work = figures[0].axes
    assert by_step.lines[0].get_marker() == by_work.lines[0].get_marker() == "o"
    assert list(by_work.lines[0].get_xdata()) == [90.0]  # block evaluations


def test_names_that_are_no_text_and_gaps_in_a_figure(tmp_path, capsys):
    method = os.fsdecode(b"caf\xe9 $\\frac{1$ \xe4\xb8\xad")
    row = {"depth": 1, "perplexity": None, "name": "_$^", "loss": None}
    run = {"test": [row], "evaluations": [(1, {"depth 1": None}), (2, {"depth 1": 2.0})], "work": 3}
    plots.plot_depth(tmp_path / "c.png", {method: [run], "_": [run]}, "perplexity")
    assert capsys.readouterr().err == "" and (tmp_path / "c.png").exists()
