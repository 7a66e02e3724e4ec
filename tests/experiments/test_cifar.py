"""The script on images: every method in one run from the same start, resumed and reported, images harmed as was asked for."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

import cifar
from comparisons import paper
from comparisons.depth_methods import DepthMethod
from comparisons.image_report import paper_of, report_images
from comparisons.image_task import ImageTask, divide, generated
from comparisons.runs import DepthShape, train_depth
from hbll_seq.data.images import Images

METHODS = ["backprop-1", "backprop-3", "tree", "sweeps", "backprop-mix"]
TINY = ["--data", "generated", "--n-level", "2", "--n-embd", "8", "--n-head", "2", "--patch-size", "16", "--threads", "1",
        "--train-images", "60", "--validation-images", "20", "--batch-size", "20", "--epochs", "1", "--warmup-steps", "1",
        "--alignment-every", "3", "--lr", "2e-3"]  # fmt: skip


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr(cifar, "N_GENERATED", (80, 40))


def runs_of(path):
    return {(run["method"], run["lr"], run["seed"]): run for run in json.loads(path.read_text())["runs"]}


def task_of(n=60, **options):
    return ImageTask(divide(generated(n + 20, 0), generated(40, 1), n, 20), 8, **options)


# -------------------------------------------------------------------------------------------------------- the script


def test_a_comparison_runs_is_resumed_and_reported(tmp_path, capsys, monkeypatch):
    argv = [*TINY, "--output", str(tmp_path / "r.json")]
    cifar.main([*argv, "--methods", "backprop-3"])
    cifar.main([*argv, "--methods", *METHODS])
    capsys.readouterr()
    runs = runs_of(tmp_path / "r.json")
    assert [name for name, _, _ in runs] == ["backprop-3", *(name for name in METHODS if name != "backprop-3")]
    for (name, _, _), run in runs.items():
        depths = [int(name[-1])] if name[-1].isdigit() else [3] if name == "sweeps" else [1, 2, 3]
        assert [row["depth"] for row in run["test"]] == [row["depth"] for row in run["validation"]] == depths
        assert [step for step, _ in run["evaluations"]] == [1, 2, 3] and run["curve"][-1][0] == 3
        assert all(set(row) == {"name", "path", "depth", "loss", "accuracy"} for row in run["test"])
    assert runs["sweeps", 2e-3, 0]["curve"] == runs["backprop-3", 2e-3, 0]["curve"]  # exact
    assert runs["sweeps", 2e-3, 0]["alignment"][0][:2] == [3, 1.0]

    monkeypatch.setattr(cifar, "train_depth", lambda *a: pytest.fail("a finished run was done again"))
    cifar.main([*argv, "--methods", *METHODS])
    shown = capsys.readouterr().out
    assert shown.startswith("10 classes; 60 images; 1 epochs of 20 images a step; patches of 16 pixels, width 8; shifted")
    assert f"{runs['tree', 2e-3, 0]['test'][1]['accuracy']:.2f}" in shown and "paper" not in shown
    cifar.main(["--report-only", "--output", str(tmp_path / "r.json"), "--data", "nowhere", "--methods", *METHODS])
    assert capsys.readouterr().out == shown
    cifar.main(["--report-only", "--output", str(tmp_path / "r.json")])
    assert sorted(capsys.readouterr().out.split()) == sorted(shown.split())
    with pytest.raises(ValueError, match="other settings \\(missing\\).*--output"):
        cifar.main([*argv, "--missing", "0.5"])


def test_rates_are_chosen_by_the_accuracy_on_held_out_images(tmp_path, monkeypatch):
    def fake(method, lr, seed, task, shape):
        rows = [{"name": "depth 1", "path": [2], "depth": 1, "loss": lr, "accuracy": 99.0},
                {"name": "depth 3", "path": [1, 2, 3], "depth": 3, "loss": lr, "accuracy": 50.0 + (lr == 1e-3)}]  # fmt: skip
        return {"method": method.name, "description": method.description, "lr": lr, "seed": seed, "seconds": 1.0, "work": 1.0,
                "curve": [[3, 1.0]], "alignment": [], "evaluations": [], "validation": rows, "test": rows}  # fmt: skip

    monkeypatch.setattr(cifar, "train_depth", fake)
    cifar.main([*TINY, "--output", str(tmp_path / "r.json"), "--methods", "tree", "--lrs", "5e-4", "1e-3", "2e-3", "--seeds",
                "0", "1"])  # fmt: skip
    assert list(runs_of(tmp_path / "r.json")) == [("tree", 5e-4, 0), ("tree", 1e-3, 0), ("tree", 2e-3, 0), ("tree", 1e-3, 1)]


def test_length_and_names_of_files_follow_the_options(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(cifar, "train_depth", lambda method, lr, seed, task, shape: seen.append((task, shape)) or 1 / 0)
    monkeypatch.setattr(cifar, "RESULTS", tmp_path)
    for argv in ([], ["--eval-every", "2"]):
        with pytest.raises(ZeroDivisionError):
            cifar.main([*TINY, *argv, "--epochs", "7", "--methods", "sweeps"])
    (task, shape), (_, other) = seen
    assert (shape.steps, shape.eval_every, other.eval_every, shape.eval_batches) == (21, 4, 2, 1)
    assert {split: len(labels) for split, (_, labels) in task.data.items()} == {"train": 60, "validation": 20, "test": 40}
    named = [cifar.parse(argv).output.name for argv in
             (["--quick"], ["--data", "x/cifar-10", "--missing", "0.5"], ["--wrong-labels", "0.2"])]  # fmt: skip
    assert named == ["cifar-generated-quick.json", "cifar-cifar-10-missing-0.5.json", "cifar-cifar10-wrong-0.2.json"]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--train-images", "61"], "train-images=61: of 80 images 20 are held out; choose at least 1 and at most 60"),
        (["--validation-images", "0"], "validation-images=0 of 80 training images: choose 1 to 79"),
        (["--batch-size", "61"], "batch-size=61 of 60 training images: choose 1 to 60"),
        (["--epochs", "0"], "epochs=0: must be a whole number of at least 1"),
        (["--missing", "1.5"], "missing=1.5: must be a number from 0 to 1"),
        (["--wrong-labels", "-1"], "wrong-labels=-1.0: must be a number from 0 to 1"),
        (["--patch-size", "5"], "image_size=32 is not divisible by patch_size=5"),
        (["--n-head", "3"], "n_embd=8 is not divisible by n_head=3"),
        (["--lr", "0"], "--lrs=0.0: must be a number above 0"),
        (["--threads", "0"], "threads=0: must be a whole number of at least 1"),
        (["--methods", "backprop-8"], "depth=8"),
        (["--methods", "ladder"], "method 'ladder': allowed are backprop-N, mix, backprop-mix, backprop, tree, sweeps"),
        (["--methods", "tree:time_forward=1"], "only recurrent blocks are evaluated along time"),
        (["--data", "no/folder"], "images could not be had from 'no/folder'"),
        (["--report-only"], "there is no results file .*leave --report-only out"),
    ],
)
def test_bad_arguments_are_named_before_anything_runs(tmp_path, monkeypatch, argv, message):
    monkeypatch.setattr(cifar, "train_depth", lambda *a: pytest.fail("a run was started"))
    monkeypatch.setattr("hbll_seq.data.images.load_hub_dataset", lambda *a, **b: 1 / 0)
    with pytest.raises(ValueError, match=message):
        cifar.main([*TINY, "--output", str(tmp_path / "r.json"), *argv])
    assert not (tmp_path / "r.json").exists()


# ---------------------------------------------------------------------------------------------------------- the images


def test_held_out_images_are_none_that_are_trained_on_and_of_all_classes():
    train = generated(80, 0)
    images = Images(torch.arange(80, dtype=torch.uint8)[:, None, None, None].expand(80, 3, 8, 8), train.labels.sort().values,
                    train.classes)  # fmt: skip
    test = generated(40, 1, size=8)
    found = divide(images, test, 50, 20)
    numbers = {split: set(found[split].pixels[:, 0, 0, 0].tolist()) for split in ("train", "validation")}
    assert len(numbers["train"]) == 50 and len(numbers["validation"]) == 20 and not numbers["train"] & numbers["validation"]
    assert len(found["validation"].labels.unique()) > 5  # a folder comes class after class
    more = divide(images, test, 60, 20)
    assert torch.equal(more["validation"].pixels, found["validation"].pixels)
    assert torch.equal(more["train"].pixels[:50], found["train"].pixels)


def test_test_images_of_another_size_or_order_of_classes_are_refused_before_anything_runs():
    train, test = generated(80, 0), generated(40, 1)
    with pytest.raises(ValueError, match="test images of 16 x 16 pixels.*32 x 32"):
        divide(train, generated(40, 1, size=16), 50, 20)
    with pytest.raises(ValueError, match="test has the classes class 9, .*class 0, "):
        divide(train, test._replace(classes=test.classes[::-1]), 50, 20)


def test_a_model_that_is_broken_is_no_good_by_top_five_either():
    images = {split: generated(n, n, 25) for split, n in (("train", 50), ("validation", 25), ("test", 100))}
    task = ImageTask(images, 16)
    model = task.model(DepthMethod.named("sweeps"), 1, n_embd=8, n_head=2)
    for value in (0.0, math.nan):  # every class as likely as any other
        torch.nn.init.constant_(model.head.projection.bias, value)
        (row,) = task.evaluate(model, "test", paths={"depth 1": (1,)})
        assert row["top5"] == pytest.approx(20.0) and row["accuracy"] == pytest.approx(4.0)


def test_a_file_of_another_form_is_named(tmp_path):
    for text in ('{"runs": []}', "[]", "{"):
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(ValueError, match="r.json holds no runs with their setting"):
            cifar.main(["--report-only", "--output", str(tmp_path / "r.json")])


def test_wrong_labels_are_those_of_training_images_alone():
    clean, wrong = task_of(), task_of(wrong_labels=0.5)
    changed = {split: (clean.data[split][1] != wrong.data[split][1]).sum().item() for split in clean.data}
    assert changed == {"train": 30, "validation": 0, "test": 0}


def test_batches_are_a_function_of_seed_and_step():
    task = task_of(missing=0.5)
    first = [task.batch(step, 20, 1) for step in range(6)]
    again = [task_of(missing=0.5).batch(step, 20, 1) for step in reversed(range(6))][::-1]
    for (x, y), (x2, y2) in zip(first, again, strict=True):
        assert torch.equal(x, x2) and torch.equal(y, y2)
    assert not torch.equal(first[0][0], task.batch(0, 20, 2)[0])
    plain = task_of(augment=False)
    x, y = plain.batch(0, 60, 1)
    order = plain.indices(0, 60, 1)
    assert torch.equal(x, plain.data["train"][0][order].float() / 255) and torch.equal(y, plain.data["train"][1][order])


def test_what_is_missing_is_zero_to_the_model_in_training_and_test():
    task = task_of(missing=0.75)
    model = task.model(DepthMethod.named("sweeps"), 1, n_embd=8, n_head=2)
    seen = []
    model.embed.register_forward_hook(lambda module, given, output: seen.append(output))
    x, y = task.batch(0, 20, 0)
    model(x)
    rows = task.evaluate(model, "test", paths={"depth 1": (1,)})
    again = task.evaluate(model, "test", paths={"depth 1": (1,)})
    assert rows == again  # always the same patches
    bare = model.embed.positions + model.embed.projection.bias
    for states in seen:
        is_bare = (states - bare).abs().amax(-1) < 1e-4
        assert (is_bare.sum(1) == 12).all()  # of 16 patches


def test_figures_are_those_of_the_network_written_out():
    n_classes = 25
    images = {split: generated(n, n, n_classes) for split, n in (("train", 50), ("validation", 25), ("test", 700))}
    task = ImageTask(images, 16)
    torch.manual_seed(0)
    model = task.model(DepthMethod.named("mix", "octaves", 2), 2, n_embd=8, n_head=2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    paths = {f"depth {k}": model.tree.path_for_depth(k) for k in (1, 2, 3)}
    model.train()
    rows = task.evaluate(model, "test", paths=paths)
    assert model.training
    labels = task.data["test"][1]
    with torch.no_grad():
        for row, path in zip(rows, paths.values(), strict=True):
            logits = model(task.data["test"][0], path).double()
            assert row["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
            assert row["accuracy"] == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())
            among = (logits.topk(5).indices == labels[:, None]).any(1).double().mean().item()
            assert row["top5"] == pytest.approx(100 * among) and row["depth"] == len(path)
    (first,) = task.evaluate(model, "test", 1, paths={"a": (2,)})
    assert first["accuracy"] == pytest.approx(
        100 * (model.predict(task.data["test"][0][:500], path=(2,)) == labels[:500]).double().mean().item()
    )


def test_the_task_can_be_learned_and_methods_start_from_the_same_weights():
    shape = DepthShape(2, 16, 2, 20, 60, 5, 1, 60, 1000)
    task = task_of(200, augment=False)
    runs = {name: train_depth(DepthMethod.named(name, n_level=2), 1e-2, 0, task, shape) for name in ("backprop-3", "sweeps")}
    assert runs["backprop-3"]["test"][-1]["accuracy"] > 40  # of ten classes
    assert runs["sweeps"]["test"][-1]["loss"] == pytest.approx(runs["backprop-3"]["test"][-1]["loss"], rel=1e-3)


# ---------------------------------------------------------------------------------------------------------- the report


def test_the_paper_s_figures_stand_beside_those_of_cifar_alone():
    def run(depth, accuracy):
        row = dict(name=f"depth {depth}", path=[4], depth=depth, loss=1.0, accuracy=accuracy, top5=accuracy + 10)
        return {"seed": 0, "lr": 1e-3, "work": 1.0, "step_seconds": 1.0, "curve": [[1, 1.0]], "alignment": [],
                "evaluations": [], "test": [row]}  # fmt: skip

    runs = {"backprop-7": [run(7, 60.0)], "tree": [run(7, 59.0)]}
    setting = dict(n_classes=10, train_images=1000, epochs=2, batch_size=10, patch_size=4, n_embd=8, augment=False,
                   missing=0.0, wrong_labels=0.0)  # fmt: skip
    shown = {name: report_images(runs, {**setting, "paper": name}) for name in (None, "CIFAR-10", "CIFAR-100")}
    assert "paper" not in shown[None] and "59.00" in shown[None]
    assert "top-5 accuracy\n" in shown[None] and "69.00" in shown[None]
    assert "accuracy by blocks, backprop / hierarchy: 1: 77.99 / 78.58" in shown["CIFAR-10"]
    assert "missing" not in shown["CIFAR-10"]
    assert "top-5 accuracy by blocks, backprop / hierarchy: 1: 82.62 / 82.43" in shown["CIFAR-100"]
    harmed = report_images(runs, {**setting, "paper": "CIFAR-10", "missing": 0.5})
    assert "50% of the patches missing" in harmed and "paper, 50% missing: 82.51 / 83.12" in harmed
    harmed = report_images(runs, {**setting, "paper": "CIFAR-10", "wrong_labels": 0.4})
    assert "40% of the training labels wrong" in harmed and "paper, 40% wrong: 71.85 / 72.70" in harmed
    assert all(math.isfinite(value) for table in paper.IMAGES.values() for pair in table.values() for value in pair)
    ten = "airplane automobile bird cat deer dog frog horse ship truck".split()
    assert paper_of(ten) == "CIFAR-10" and paper_of(ten[:9]) is None and paper_of(list(map(str, range(10)))) is None
