"""The claim that deep sigmoid networks learn by local losses where backprop stays at chance, and the script that shows it."""

import json
import os
from pathlib import Path

import pytest
import torch
from helpers.digits import synthetic

import mnist_mlp
from comparisons.digits import ClassesByDepth, load_digits
from comparisons.mlp import MLPMethod, report_mlp, sigmoid_mlp, train_mlp
from comparisons.paper import MLP
from comparisons.runs import Length

#: where the digits lie when they are at hand: a folder of idx files.
MNIST = Path(os.environ.get("HBLL_MNIST", Path(__file__).resolve().parents[3] / "shared" / "data" / "mnist"))
TREE = "tree:state_weight=0.001"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    synthetic(folder)
    return folder


def arguments(digits, output, *more):
    return ["--data", str(digits), "--output", str(output), "--widths", "20", "--validation-images", "100",
            "--batch-size", "32", "--warmup-steps", "4", *more]  # fmt: skip


def runs_of(path):
    return {(r["layers"], r["method"], r["lr"], r["seed"]): r for r in json.loads(path.read_text())["runs"]}


def test_networks_share_a_file_that_is_resumed_and_reported(digits, tmp_path, capsys, monkeypatch):
    output = tmp_path / "mlp.json"
    argv = arguments(digits, output, "--layers", "2", "4", "--steps", "150", "--lrs", "1e-2", "--seeds", "0", "1",
                     "--methods", "backprop", TREE)  # fmt: skip
    mnist_mlp.main([*argv, "--layers", "4", "--methods", TREE])
    capsys.readouterr()
    mnist_mlp.main(argv)
    shown = capsys.readouterr().out
    runs = runs_of(output)
    assert len(runs) == 2 * 2 * 2
    tree = runs[4, TREE, 1e-2, 0]
    assert list(tree["test"]) == ["1", "2", "3"] and min(tree["test"].values()) > 60  # chance is 10
    assert list(runs[4, "backprop", 1e-2, 0]["test"]) == ["3"]
    difference = [runs[4, TREE, 1e-2, s]["test"]["3"] - runs[4, "backprop", 1e-2, s]["test"]["3"] for s in (0, 1)]
    assert f"4 layers of 20 units, all blocks, minus backprop in points, at equal steps: {TREE} {difference[0]:+.2f}, " \
           f"{difference[1]:+.2f} (mean " in shown  # fmt: skip
    assert "at equal time" in shown

    monkeypatch.setattr(mnist_mlp, "train_mlp", lambda *a: pytest.fail("a finished run was done again"))
    mnist_mlp.main(argv)
    assert capsys.readouterr().out == shown
    mnist_mlp.main(["--report-only", "--output", str(output), "--data", "nowhere"])
    stored = capsys.readouterr().out
    rows = lambda text: sorted(line for line in text.splitlines() if line.startswith(("     2", "     4")))
    assert rows(stored) == rows(shown)
    with pytest.raises(ValueError, match="other settings \\(steps\\).*--output"):
        mnist_mlp.main([*argv, "--steps", "9"])
    with pytest.raises(ValueError, match="holds no network of these layers and widths"):
        mnist_mlp.main(["--report-only", "--output", str(output), "--layers", "8"])


def test_rates_are_chosen_on_images_that_are_held_out_for_each_network(digits, tmp_path, monkeypatch):
    seen = []

    def fake(method, lr, seed, task, length):
        seen.append((method.n_layers, method.name, lr, seed))
        best = {2: 1e-2, 4: 4e-3}[method.n_layers]
        figures = {str(method.n_layers - 1): 90.0 - abs(lr - best)}
        return {"method": method.name, "description": method.description, "lr": lr, "seed": seed, "layers": method.n_layers,
                "width": method.width, "work": 1.0, "step_seconds": 0.1, "curve": [[length.steps, 1.0]], "alignment": [],
                "evaluations": [[length.steps, 50.0]], "validation": figures, "test": figures}  # fmt: skip

    monkeypatch.setattr(mnist_mlp, "train_mlp", fake)
    argv = arguments(digits, tmp_path / "mlp.json", "--layers", "2", "4", "--steps", "3", "--methods", "backprop")
    mnist_mlp.main([*argv, "--lrs", "4e-3", "1e-2", "--seeds", "0", "1"])
    tried = {n: [lr for layers, _, lr, seed in seen if (layers, seed) == (n, 0)] for n in (2, 4)}
    assert tried == {2: [4e-3, 1e-2, 2e-2], 4: [4e-3, 1e-2, 2e-3]}  # beyond the edge where the best lies
    assert [(layers, lr) for layers, _, lr, seed in seen if seed == 1] == [(2, 1e-2), (4, 4e-3)]
    with pytest.raises(ValueError, match="--lrs of 2 rates with validation-images=0.*such as 5000"):
        mnist_mlp.main([*argv, "--validation-images", "0"])


def test_a_run_is_of_its_network_and_all_methods_start_alike(digits):
    digits = load_digits(str(digits), None, 100)
    task, length = ClassesByDepth(digits.data), Length(batch_size=32, steps=12, clip=float("inf"))
    curves = []
    for name in ("backprop", TREE, "sweeps", "backprop:depth_mix=octaves,paths=prefix"):
        run = train_mlp(MLPMethod.of(name, 8, 12), 1e-12, 3, task, length)
        assert (run["layers"], run["width"]) == (8, 12) and "'layers': 8" in run["description"]
        curves.append(run["curve"][-1][1])
        model = sigmoid_mlp(8, 12)
        assert list(run["test"]) == (["1", "3", "7"] if name not in ("backprop", "sweeps") else ["7"])
    assert len(model.blocks) == 7 and curves[1] != 0
    assert curves[0] == pytest.approx(curves[2], abs=1e-4) == pytest.approx(curves[3], abs=1e-4)
    both = [train_mlp(MLPMethod.of(name, 8, 12), 1e-2, 3, task, length)["curve"] for name in ("backprop", "sweeps")]
    assert torch.tensor(both[0]).sub(torch.tensor(both[1])).abs().max() < 1e-4  # exact segments are backprop
    assert MLPMethod.of("backprop", 8, 12).description != MLPMethod.of("backprop", 8, 16).description
    alone = train_mlp(MLPMethod.of("backprop-3", 8, 12), 1e-3, 3, task, length)
    assert list(alone["test"]) == ["3"]


def test_the_accuracy_of_a_path_is_that_of_its_network():
    torch.manual_seed(0)
    model = sigmoid_mlp(4, 12)
    pixels = torch.rand(50, 784)
    labels = model(pixels, (2,)).argmax(-1)
    labels[:10] = (labels[:10] + 1) % 10
    task = ClassesByDepth({"test": (pixels, labels)})
    found = task.evaluate(model, "test", paths={"1": (2,), "3": (1, 2, 3)}, batch_size=7)
    expected = 100 * (model(pixels, (1, 2, 3)).argmax(-1) == labels).double().mean().item()
    assert found == {"1": 80.0, "3": pytest.approx(expected)}
    assert isinstance(task.to("cpu"), ClassesByDepth)


def test_the_table_has_the_papers_figures_beside_ours():
    def run(seed, accuracy):
        return {"seed": seed, "lr": 1e-3, "work": 9.0, "step_seconds": 0.01, "test": {"3": accuracy}, "curve": [[10, 1.0]],
                "evaluations": [[10, accuracy]]}  # fmt: skip

    runs = {"backprop": [run(0, 95.0), run(1, 97.0)], TREE: [run(0, 96.0)], "sweeps": [run(0, 95.0)],
            "backprop-1": [run(0, 90.0)]}  # fmt: skip
    setting = {"steps": 10, "batch_size": 2, "train_images": 20}
    lines = report_mlp({(4, 100): runs, (2, 7): {TREE: [run(0, 5.0)]}}, setting).splitlines()
    rows = [line.split() for line in lines if line.startswith(("     4", "     2"))]
    paper = [f"{value:.2f}" for value in MLP[4, 100]]
    assert rows[0][:3] == ["2", "7", TREE] or rows[0][5:9] == ["96.00", "±", "1.41", paper[0]]
    by_name = {(row[0], row[2]): row for row in rows}
    assert by_name["4", TREE][5:7] == ["96.00", paper[1]]
    assert by_name["4", "sweeps"][6] == by_name["4", "backprop-1"][6] == by_name["2", TREE][6] == "-"
    assert "2 layers of 7 units: no run of backprop to compare with" in lines


def test_a_model_of_fewer_blocks_is_not_compared_on_all_blocks():
    def run(depth, accuracy):
        return {"seed": 0, "lr": 1e-3, "work": 9.0, "step_seconds": 0.01, "test": {depth: accuracy}, "curve": [[10, 1.0]],
                "evaluations": [[10, accuracy]]}  # fmt: skip

    runs = {"backprop": [run("7", 95.0)], "backprop-3": [run("3", 90.0)], TREE: [run("7", 96.0)]}
    shown = report_mlp({(8, 100): runs}, {"steps": 10, "batch_size": 2, "train_images": 20})
    below = shown[shown.index("8 layers of 100 units, all blocks, minus backprop") :]
    assert f"equal steps: {TREE} +1.00 (one seed)" in below and "backprop-3" not in below


def test_runs_without_held_out_images_are_reported(digits, tmp_path, capsys):
    argv = arguments(digits, tmp_path / "mlp.json", "--layers", "2", "--steps", "2", "--lrs", "1e-2", "--seeds", "0",
                     "--methods", "backprop", "--validation-images", "0")  # fmt: skip
    mnist_mlp.main(argv)
    shown = capsys.readouterr().out
    mnist_mlp.main(["--report-only", "--output", str(tmp_path / "mlp.json")])
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--layers", "6"], "layers=6: a tree needs a power of two"),
        (["--widths", "0"], "widths=0: must be a whole number of at least 1"),
        (["--threads", "0"], "threads=0: must be a whole number of at least 1"),
        (["--lrs", "0"], "--lrs=0.0: must be a number above 0"),
        (["--epochs", "0"], "epochs=0: must be a whole number of at least 1"),
        (["--methods", "tree:exit_rank=4"], "tree has no option 'exit_rank'"),
        (["--methods", "backprop:exit_rank=4"], "exit_rank is of language models; leave it out"),
        (["--methods", "sweeps:time_forward=1"], "time_forward with cell='transformer'"),
        (["--report-only"], "there is no results file .*leave --report-only out"),
    ],
)
def test_bad_arguments_are_named_before_anything_runs(digits, tmp_path, monkeypatch, argv, message):
    monkeypatch.setattr(mnist_mlp, "train_mlp", lambda *a: pytest.fail("a run was started"))
    with pytest.raises(ValueError, match=message):
        mnist_mlp.main([*arguments(digits, tmp_path / "r.json"), *argv])
    assert not (tmp_path / "r.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(not MNIST.is_dir(), reason="needs MNIST as idx files (HBLL_MNIST=folder)")
def test_sixteen_sigmoid_layers_learn_by_local_losses_and_not_by_backprop(tmp_path):
    output = tmp_path / "mlp.json"
    mnist_mlp.main(["--data", str(MNIST), "--layers", "16", "--epochs", "2", "--lrs", "1e-3", "--seeds", "0",
                    "--output", str(output)])  # fmt: skip
    runs = {run["method"]: run["test"]["15"] for run in json.loads(output.read_text())["runs"]}
    assert runs["backprop"] < 15
    assert runs[TREE] > 75
