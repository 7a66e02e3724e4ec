"""The script on digits pixel by pixel: every method in one run from the same start, resumed, saved, and reported."""

import json
from pathlib import Path

import pytest
import torch
from helpers.digits import synthetic

import seqmnist
from comparisons.results import Results
from comparisons.runs import Length, train_classifier
from comparisons.statistics import told
from comparisons.tasks import Classes
from comparisons.time_methods import DEFAULTS, TimeMethod
from hbll_seq import HBLLClassifierConfig, HBLLForSequenceClassification, RecurrentBackpropObjective, RecurrentTree
from hbll_seq.data.mnist import load_mnist

STORED = sorted((Path(__file__).resolve().parents[2] / "train" / "results").glob("psmnist-*.json"))
METHODS = ["bptt", "one-step", "sweeps", "tree:consistency=0", "tree:consistency=2"]
LABELS = {name: name.replace(":", "-") for name in METHODS} | {"sweeps": "sweeps-backward=1-chunk_size=1-forward=1"}
TINY = ["--n", "4", "--hidden", "16", "--steps", "6", "--batch-size", "32", "--warmup-steps", "2", "--methods", *METHODS,
        "--forward", "1", "--backward", "1", "--threads", "1"]  # fmt: skip


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    synthetic(folder)
    return folder


def runs_of(path):
    return {(run["method"], run["lr"], run["seed"]): run for run in json.loads(path.read_text())["runs"]}


def test_a_comparison_runs_is_resumed_and_ends_with_the_difference(digits, tmp_path, capsys, monkeypatch):
    output, models = tmp_path / "results.json", tmp_path / "models"
    argv = [*TINY, "--data", str(digits), "--permuted", "--output", str(output), "--save", str(models)]
    seqmnist.main([*argv, "--methods", "bptt", "--seeds", "0"])
    kept = output.read_text().splitlines()
    assert capsys.readouterr().out.splitlines()[-1] == "deployed minus BPTT in points: no other method"
    seqmnist.main([*argv, "--seeds", "0", "1"])
    first = capsys.readouterr().out
    assert output.read_text().splitlines()[2].startswith(kept[2])  # results accumulate
    runs = runs_of(output)
    assert list(runs) == [(name, 2e-3, seed) for seed in (0, 1) for name in METHODS]
    for (name, _, _), run in runs.items():
        assert set(run["test"]) == ({"deployed", "tree", "top"} if name.startswith("tree") else {"deployed"})
        assert run["curve"][-1][0] == 6 and run["finite"]
    assert "psMNIST, N = 4 steps of 196 pixels" in first
    shown = first.splitlines()[-1]
    assert shown.startswith("deployed minus BPTT in points: one-step ") and shown.count(";") == 3
    expected = runs["sweeps", 2e-3, 1]["test"]["deployed"] - runs["bptt", 2e-3, 1]["test"]["deployed"]
    assert f"; sweeps {runs['sweeps', 2e-3, 0]['test']['deployed'] - runs['bptt', 2e-3, 0]['test']['deployed']:+.2f}" in shown
    assert f", {expected:+.2f} (mean " in shown

    monkeypatch.setattr(seqmnist, "train_classifier", lambda *a: pytest.fail("a finished run was done again"))
    seqmnist.main([*argv, "--seeds", "0", "1"])
    assert capsys.readouterr().out == first
    seqmnist.main(["--report-only", "--output", str(output), "--methods", *METHODS, "--seeds", "0", "1", "--forward", "1",
                   "--backward", "1", "--data", "nowhere"])  # fmt: skip
    assert capsys.readouterr().out == first
    seqmnist.main(["--report-only", "--output", str(output), "--forward", "1", "--backward", "1"])  # all that is stored
    assert capsys.readouterr().out == first

    pixels, labels = load_mnist(str(digits), "test")
    for (name, _, seed), run in runs.items():
        folder = models / "results" / f"{LABELS[name]}-lr=0.002-seed={seed}"
        loaded = HBLLForSequenceClassification.from_pretrained(folder)
        assert loaded.config == HBLLClassifierConfig(n_steps=4, hidden_size=16, permutation_seed=0)
        assert (loaded.predict(pixels) == labels).double().mean().item() * 100 == pytest.approx(run["test"]["deployed"])
        assert "permuted sequential MNIST" in (folder / "README.md").read_text()

    with pytest.raises(ValueError, match="other settings \\(n_steps\\).*--output"):
        seqmnist.main([*argv, "--n", "8"])
    monkeypatch.undo()
    (models / "results" / "bptt-lr=0.002-seed=0" / "config.json").unlink()
    with pytest.raises(ValueError, match="bptt lr=0.002 seed=0.*was stored without its model.*--output.*--save"):
        seqmnist.main(argv)


def test_learning_rates_are_chosen_on_held_out_images(digits, tmp_path, capsys):
    output = tmp_path / "results.json"
    argv = [*TINY, "--data", str(digits), "--output", str(output), "--methods", "bptt", "one-step:lr=3e-3", "--seeds", "0"]
    with pytest.raises(ValueError, match="--lr of 2 rates with validation-images=0.*such as 5000"):
        seqmnist.main([*argv, "--lr", "1e-3", "2e-3"])
    assert not output.exists()
    seqmnist.main([*argv, "--lr", "1e-3", "2e-3", "--validation-images", "100", "--eval-every", "4"])
    runs = runs_of(output)
    tried = [lr for name, lr, _ in runs if name == "bptt"]
    assert {1e-3, 2e-3} < set(tried)  # the better of two lies at an edge
    assert [lr for name, lr, _ in runs if name.startswith("one-step")] == [3e-3]
    run = runs["bptt", 1e-3, 0]
    assert set(run["validation"]) == {"deployed"} and [step for step, _ in run["evaluations"]] == [4, 6]
    best = min(tried, key=lambda lr: -runs["bptt", lr, 0]["validation"]["deployed"])
    table = capsys.readouterr().out
    assert f"{best:.2g}" in next(line for line in table.splitlines() if line.split()[:1] == ["bptt"]).split()
    seqmnist.main(["--report-only", "--output", str(output)])  # at the rates that were chosen, whatever the default is
    assert capsys.readouterr().out == table
    seqmnist.main(["--report-only", "--output", str(output), "--lr", "1e-3", "--methods", "bptt"])
    assert " 0.001 " in capsys.readouterr().out


def test_steps_come_from_epochs_and_quick_is_short(digits, tmp_path, monkeypatch):
    seen = []

    def fake(method, lr, seed, config, task, length):
        data = task.data
        seen.append((config, length, {split: len(labels) for split, (_, labels) in data.items()}))
        if "validation" in data:  # the last images, and none that is trained on
            assert torch.equal(torch.cat((data["train"][0], data["validation"][0])), load_mnist(str(digits), "train")[0])
        run = {"method": method.name, "description": method.description, "lr": lr, "seed": seed, "seconds": 1.0}
        return None, {**run, "finite": True, "curve": [[length.steps, 1.0]], "alignment": [], "test": {"deployed": 50.0}}

    monkeypatch.setattr(seqmnist, "train_classifier", fake)
    argv = ["--data", str(digits), "--methods", "bptt", "--seeds", "0", "--output"]
    seqmnist.main([*argv, str(tmp_path / "a.json"), "--epochs", "3", "--batch-size", "100", "--validation-images", "40"])
    pixel_by_pixel = ["--n", "784", "--cell", "elman", "--epochs", "1", "--train-images", "256"]
    seqmnist.main([*argv, str(tmp_path / "b.json"), *pixel_by_pixel])
    seqmnist.main([*argv, str(tmp_path / "c.json"), "--quick"])
    seqmnist.main([*argv, str(tmp_path / "d.json"), "--quick", "--epochs", "1"])
    seqmnist.main([*argv, str(tmp_path / "e.json")])
    (_, three, counts), (elman, one, few), (small, quick, _), (_, quick_epoch, _), (_, default, _) = seen
    assert (quick_epoch.steps, default.steps) == (640 // 128, 5 * (640 // 128))
    assert three.steps == 18 and counts == {"train": 600, "test": 200, "validation": 40}
    assert (elman.n_steps, elman.step_size, elman.cell, elman.permutation_seed) == (784, 1, "elman", None)
    assert one.steps == 2 and few == {"train": 256, "test": 200}
    assert quick.steps < 100 and small.hidden_size < 64


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--n", "785"], "n_steps=785 of n_inputs=784.*at most 784"),
        (["--hidden", "0"], "hidden_size=0"),
        (["--train-images", "641"], "train-images=641.*640 images.*at most 640"),
        (["--train-images", "0"], "train-images=0.*at least 1"),
        (["--train-images", "600", "--validation-images", "41"], "train-images=600.*at most 599"),
        (["--validation-images", "640"], "validation-images=640.*639"),
        (["--batch-size", "641"], "batch-size=641.*640 training images: choose 1 to 640"),
        (["--epochs", "0", "--batch-size", "8"], "epochs=0: must be a whole number of at least 1"),
        (["--steps", "0"], "steps=0: must be a whole number of at least 1"),
        (["--lr", "0"], "--lr=0.0: must be a number above 0"),
        (["--warmup-steps", "-1"], "warmup_steps=-1"),
        (["--backward", "-1"], "backward=-1"),
        (["--threads", "0"], "threads=0: must be a whole number of at least 1"),
        (["--methods", "bppt"], "method 'bppt': allowed are bptt, one-step, truncated, sweeps, tree"),
        (["--report-only"], "there is no results file .*leave --report-only out"),
    ],
)
def test_bad_arguments_are_named_before_anything_runs(digits, tmp_path, monkeypatch, argv, message):
    monkeypatch.setattr(seqmnist, "train_classifier", lambda *a: pytest.fail("a run was started"))
    base = ["--data", str(digits), "--output", str(tmp_path / "r.json"), "--batch-size", "32"]
    with pytest.raises(ValueError, match=message):
        seqmnist.main([*base, *argv])
    assert not (tmp_path / "r.json").exists()


# -------------------------------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize(
    "name, message",
    [
        ("sweeps:k=3", "sweeps has no option 'k'; it has auxiliary_blocks, auxiliary_exits, backward, chunk_size, clip"),
        ("bptt:forward=3", "bptt has no option 'forward'; it has lr"),
        ("tree:consistency=x", "consistency='x' must be a number"),
        ("tree:lr=-1", "lr=-1.0: must be a number above 0"),
        ("sweeps:init=full", "init='full': allowed are tree, zeros, state, diagonal"),
        ("sweeps:init=state,share=none", "share needs init=tree"),
        ("tree:share=all", "share='all' needs a deployed cell.*allowed are none, capped"),
        ("sweeps:linearization=identity", "linearization='identity' over time: allowed are zero, diagonal, shared_matrix"),
        ("tree:max_symbols=0", "max_symbols=0"),
        ("tree:share=half", "share='half'"),
    ],
)
def test_bad_methods(name, message):
    with pytest.raises(ValueError, match=message):
        TimeMethod.named(name, cell="gru", n_steps=16).check()


def test_a_method_is_stored_under_all_that_it_does():
    def described(*args):
        return TimeMethod.named(*args).description

    def label(*args):
        return TimeMethod.named(*args).label

    assert described("sweeps") == described("sweeps:forward=4,lr=1") != described("sweeps:forward=2")
    assert described("sweeps", {"forward": 2}) == described("sweeps:forward=2")
    assert described("sweeps:forward=3", {"forward": 2}) == described("sweeps:forward=3")
    assert described("tree", {"forward": 2}) == described("tree:consistency=4") != described("tree:consistency=0")
    assert "max_symbols" not in described("sweeps") and TimeMethod.named("tree:lr=1e-3").lr == 1e-3
    assert "'max_symbols': 8" in described("sweeps:init=tree")
    assert label("sweeps:forward=4,lr=1") == "sweeps" and label("tree:consistency=4") == "tree"
    assert label("sweeps:init=tree", {"forward": 2}) == "sweeps-forward=2-init=tree"


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_stored_runs_are_still_those_of_the_methods_that_they_name(path):
    stored = json.loads(path.read_text())
    runs = Results(path, stored["setting"], "time").runs
    assert runs
    for run, old in zip(runs, stored["runs"], strict=True):
        n_steps, cell = stored["setting"]["n_steps"], stored["setting"]["cell"]
        for name in (run["method"], old.get("side", run["method"])):
            method = TimeMethod.named(name, {**DEFAULTS["sweeps"], "chunk_size": max(1, n_steps // 8)}, cell, n_steps)
            assert (method.name, method.description) == (run["method"], run["description"])
        assert [old[key] for key in ("lr", "seed", "test")] == [run[key] for key in ("lr", "seed", "test")]


def digits_task(digits):
    return Classes({split: load_mnist(str(digits), split) for split in ("train", "test")})


def test_every_method_starts_from_the_same_weights_and_reads_the_same_batches(digits):
    """At a learning rate of next to nothing one seed is one model, whatever the method."""
    config, length = HBLLClassifierConfig(n_steps=4, hidden_size=8), Length(batch_size=32, steps=3)
    models, curves = {}, {}
    for name in (*METHODS, "sweeps:forward=3,backward=3,init=state"):
        model, run = train_classifier(TimeMethod.named(name), 1e-12, 5, config, digits_task(digits), length)
        models[name], curves[name] = model.state_dict(), run["curve"]
    for weights in models.values():
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, models["bptt"][name], atol=1e-8, rtol=0)
    bptt, one_step, *_, full_sweeps = (curve[0][1] for curve in curves.values())
    assert one_step == bptt == pytest.approx(full_sweeps, abs=1e-4)


def test_full_sweeps_train_as_bptt_and_the_truncation_does_not(digits):
    config, length = HBLLClassifierConfig(n_steps=4, hidden_size=8), Length(32, steps=12, warmup_steps=2, alignment_every=6)
    runs = {name: train_classifier(TimeMethod.named(name), 1e-2, 0, config, digits_task(digits), length)[1]
            for name in ("bptt", "sweeps:forward=3,backward=3", "one-step")}  # fmt: skip
    exact, sweeps, truncated = (run["curve"][-1][1] for run in runs.values())
    assert sweeps == pytest.approx(exact, abs=1e-3) and abs(truncated - exact) > 2e-3
    rows = runs["sweeps:forward=3,backward=3"]["alignment"]
    assert [row[0] for row in rows] == [6, 12] and all(row[1] > 0.999 for row in rows)


def test_an_epoch_holds_every_image_once():
    task = Classes({"train": (torch.arange(10.0), torch.arange(10))})
    order = [task.indices(step, 3, seed=1) for step in range(9)]
    first, second = torch.cat(order[:3]), torch.cat(order[3:6])
    assert len(set(first.tolist())) == len(set(second.tolist())) == 9 and first.tolist() != second.tolist()
    again = [task.indices(step, 3, seed=1) for step in range(9)]
    assert all(map(torch.equal, order, again)) and not torch.equal(task.indices(0, 3, seed=2), order[0])
    assert torch.equal(task.indices(4, 3, seed=1), order[4])  # whatever was asked for before
    values, labels = task.batch(4, 3, seed=1)
    assert torch.equal(values.long(), order[4]) and torch.equal(labels, order[4])


def test_the_three_outputs_are_different_networks():
    """With f_0 at zero the deployed network is blind, and f_D, which never calls it, is not."""
    torch.manual_seed(0)
    model = HBLLForSequenceClassification(HBLLClassifierConfig(n_steps=4, hidden_size=12, n_classes=2))
    objective = TimeMethod.named("tree", n_steps=4).objective(model)
    assert isinstance(objective.tree, RecurrentTree) and objective.tree.width(2) == 4
    with torch.no_grad():
        for p in model.cell.parameters():
            p.zero_()
    values = torch.rand(64, 784)
    state = objective.tree.jump(model.cell, model.symbols(model.chunks(values)), model.initial_state(64))
    labels = model.head(state).argmax(-1)
    found = Classes({"test": (values, labels)}).evaluate(model, "test", tree=objective.tree, batch_size=10)
    blind = model.head(torch.zeros(12)).argmax()
    assert found["top"] == 100
    assert found["deployed"] == pytest.approx(100 * (labels == blind).double().mean().item(), abs=1e-3)
    assert 0 < found["deployed"] < 100 and set(found) == {"deployed", "tree", "top"}
    for name, window in (("bptt", None), ("one-step", 1), ("truncated", 16), ("truncated:window=3", 3)):
        baseline = TimeMethod.named(name, n_steps=4).objective(model)
        assert isinstance(baseline, RecurrentBackpropObjective) and baseline.window == window


@pytest.mark.parametrize("cell, linearization", [("gru", "shared_matrix"), ("mingru", "diagonal")])
def test_default_sweeps_follow_length_and_cell(digits, tmp_path, cell, linearization):
    output = tmp_path / "results.json"
    seqmnist.main(["--n", "16", "--hidden", "8", "--steps", "1", "--batch-size", "16", "--cell", cell, "--methods", "sweeps",
                   "--seeds", "0", "--data", str(digits), "--output", str(output)])  # fmt: skip
    described = json.loads(output.read_text())["runs"][0]["description"]
    assert "'chunk_size': 2," in described and f"'linearization': '{linearization}'" in described


# ---------------------------------------------------------------------------------------------------------------- table


def test_the_table_of_every_n_and_cell_on_tiny_digits(digits, tmp_path, capsys):
    """Made as a reader would make it: a file for each N and cell, and then one table of all of them."""
    argv = ["--data", str(digits), "--hidden", "8", "--steps", "3", "--batch-size", "32", "--threads", "1"]
    for cell, n in (("gru", 2), ("gru", 4), ("elman", 4)):
        more = ["--methods", "bptt", "sweeps", "tree:consistency=1", "--seeds", "0", *(["1"] if cell == "gru" else [])]
        seqmnist.main([*argv, *more, "--permuted", "--n", str(n), "--cell", cell,
                       "--output", str(tmp_path / f"psmnist-{n}-{cell}.json")])  # fmt: skip
    two_rates = ["--lr", "1e-3", "3e-3", "--validation-images", "40", "--seeds", "0"]
    seqmnist.main([*argv, "--n", "4", "--methods", "bptt", *two_rates, "--output", str(tmp_path / "smnist-4-gru.json")])
    (tmp_path / "psmnist-8-gru-quick.json").write_text("no table reads short trials")
    capsys.readouterr()
    seqmnist.main(["--table", str(tmp_path)])
    shown = capsys.readouterr().out
    found = [line.split() for line in shown.splitlines() if line.lstrip().startswith(("sMNIST", "psMNIST"))]
    rows = {(row[0], row[1], row[2], row[-1]): row for row in found}
    assert len(rows) == 10
    runs = runs_of(tmp_path / "psmnist-4-gru.json")
    deployed = [runs["bptt", 2e-3, seed]["test"]["deployed"] for seed in (0, 1)]
    row = rows["psMNIST", "gru", "4", "bptt"]
    assert row[7:11] == ["2", f"{sum(deployed) / 2:.2f}", "±", f"{abs(deployed[0] - deployed[1]) / 2**0.5:.2f}"]
    assert row[-2] == "98.4" and rows["psMNIST", "gru", "4", "tree:consistency=1"][-4:-1] == ["98.5", "/", "98.7"]
    tree = runs_of(tmp_path / "psmnist-4-elman.json")["tree:consistency=1", 2e-3, 0]["test"]
    assert rows["psMNIST", "elman", "4", "tree:consistency=1"][7:11] == ["1", *(f"{tree[k]:.2f}" for k in
                                                                                ("deployed", "tree", "top"))]  # fmt: skip
    tuned = runs_of(tmp_path / "smnist-4-gru.json")
    best = max(tuned, key=lambda key: tuned[key]["validation"]["deployed"])
    assert float(rows["sMNIST", "gru", "4", "bptt"][6]) == pytest.approx(best[1])
    differences = [runs["sweeps", 2e-3, s]["test"]["deployed"] - runs["bptt", 2e-3, s]["test"]["deployed"] for s in (0, 1)]
    assert "  psmnist-4-gru: sweeps " + ", ".join(f"{value:+.2f}" for value in differences) + " (mean " in shown
    assert "sMNIST gru N = 2, 8, 16, 32, 64, 128, 256; " in shown and "psMNIST elman N = 2, 8," in shown


def test_the_table_of_nothing_says_so(tmp_path):
    with pytest.raises(ValueError, match="holds no file \\[p\\]smnist-N-CELL.json: make one without --table"):
        seqmnist.main(["--table", str(tmp_path)])


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_the_stored_table_holds_the_stored_figures(path, capsys):
    seqmnist.main(["--table"])
    shown = capsys.readouterr().out
    assert f"  {path.stem}: " in shown
    stored = json.loads(path.read_text())
    runs = [run for run in Results(path, stored["setting"], "time").runs if run["method"] == "bptt"]
    tuning = [run for run in runs if run["seed"] == runs[0]["seed"]]
    best = max(tuning, key=lambda run: run["validation"]["deployed"] if len(tuning) > 1 else 0)["lr"]
    cell = told([run["test"]["deployed"] for run in runs if run["lr"] == best])
    n, of_cell = (str(stored["setting"][name]) for name in ("n_steps", "cell"))
    rows = [line for line in shown.splitlines() if line.split()[-1:] == ["bptt"] and line.split()[1:3] == [of_cell, n]]
    assert any(f" {cell} " in line for line in rows)
