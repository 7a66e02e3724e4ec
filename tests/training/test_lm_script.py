"""train/lm.py: what a run leaves behind, its settings, and what users are told when it cannot be."""

import dataclasses
import json
import math
import os
import shutil
from pathlib import Path

import kill_and_resume as kr
import numpy as np
import pytest
import torch
import yaml

from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.objectives.options import DepthMix, Sweeps, Tree
from hbll_seq.training import checkpoint as ck
from hbll_seq.training import settings as st
from hbll_seq.training import settings_read
from hbll_seq.training.objective import evaluated_paths, make_objective
from hbll_seq.training.optimizer import make_optimizer
from hbll_seq.training.presets import read_preset, resolve
from hbll_seq.training.schedule import learning_rate
from hbll_seq.utils import migration
from hbll_seq.utils.tensors import module_tensors

pytestmark = pytest.mark.usefixtures("blank_figures")

lm, lm_run = kr.load_script(), kr.load_run()


# -------------------------------------------------------------------------------- a whole run


def test_run_leaves_model_metrics_and_figures(whole_run):
    names = set(os.listdir(whole_run))
    assert names >= {"model.safetensors", "config.json", "tokenizer.model", "README.md", "settings.yaml",
                     "metrics.json", "metrics.jsonl", "evaluations.jsonl", "checkpoints"}
    for figure in ("training_curve.png", "perplexity_by_depth.png"):
        assert (whole_run / figure).read_bytes().startswith(b"\x89PNG") and (whole_run / figure).stat().st_size > 5000
    assert not [name for name in names if name.startswith(".")]
    assert ck.list_checkpoints(whole_run / "checkpoints") == [55, 60]  # the newest two


def test_metrics_lines(whole_run):
    rows = kr.lines(whole_run)
    assert [row["step"] for row in rows] == list(range(1, 61))
    n_windows = lm.data(lm.resume_run({"output_dir": str(whole_run)}, None)[0]).train.n_windows
    for before, row in zip([{"seconds": 0.0}, *rows], rows):
        assert row.keys() >= {"step", "loss", "ce", "tokens", "tokens_per_s", "lr", "grad_norm", "epoch"}
        assert row["tokens"] == row["step"] * 2 * 16 and row["epoch"] == pytest.approx(row["step"] * 2 / n_windows)
        assert row["tokens_per_s"] == pytest.approx(2 * 16 / (row["seconds"] - before["seconds"]))
        assert float(np.float32(row["loss"])) == row["loss"]  # every digit of the float32
        assert math.isclose(sum(row["node_losses"]), row["loss"], rel_tol=1e-5)
    assert sum(row["ce"] for row in rows[-10:]) < 0.8 * sum(row["ce"] for row in rows[:10])  # it learns
    assert [row["lr"] for row in rows][:6] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01, 0.01], rel=1e-2)
    assert rows[-1]["lr"] == pytest.approx(0.001)


def test_exported_model_is_the_trained_one(whole_run, lm_options):
    settings, _, resumed = lm.resume_run({"output_dir": str(whole_run)}, None)
    model = HBLLForCausalLM.from_pretrained(whole_run)
    for name, tensor in module_tensors(model).items():
        assert torch.equal(tensor, resumed.tensors["model"][f"model.{name}"])
    summary = json.loads((whole_run / "metrics.json").read_text())
    opened = lm.data(settings)
    rows = lm_run.evaluate_paths(model, opened.validation, batch_size=4, max_batches=4)
    assert [row["path"] for row in rows] == [[2], [1, 2], [1, 2, 3]]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in summary["validation"]], rel=1e-6)
    assert summary["step"] == 60 and summary["settings"]["n_level"] == 2 and summary["test"]
    # what is saved, and not only what one path reads out with
    assert summary["n_parameters"] == sum(p.numel() for p in model.parameters()) > model.n_parameters()


def test_evaluations_hold_table_and_two_depths_of_text(whole_run):
    rows = [json.loads(line) for line in (whole_run / "evaluations.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [20, 40, 60]
    prompt = lm_run.beginning_of(lm.data(lm.resume_run({"output_dir": str(whole_run)}, None)[0]))
    for row in rows:
        assert [sample["depth"] for sample in row["samples"]] == [1, 3]
        for sample in row["samples"]:
            assert sample["text"].startswith(prompt)
        for entry in row["validation"]:
            assert entry["perplexity"] == pytest.approx(math.exp(entry["loss"]))
            assert entry["word_perplexity"] > 0
    assert "test" in rows[-1] and "test" not in rows[0]


def test_output_for_people(lm_options, tmp_path, capsys):
    assert lm.main([*lm_options, "--max-steps", "4", "--output-dir", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr()
    assert "validation, after 4 steps" in printed.out and "0-1-2-3-head" in printed.out and "per word" in printed.out
    assert "depth 1: '" in printed.out and "depth 3: '" in printed.out
    assert "tokens/s" in printed.err and "loss=" in printed.err and "4/4" in printed.err


def test_how_often_one_looks_changes_no_step(whole_run, lm_options, tmp_path):
    folder = tmp_path / "run"
    often = ["--eval-every", "7", "--save-every", "9", "--log-every", "3", "--sample-tokens", "5", "--max-steps", "60"]
    assert lm.main([*lm_options, *often, "--output-dir", str(folder)]) == 0
    assert kr.steps_of(folder) == list(range(3, 61, 3))
    assert kr.losses_of(folder) == kr.losses_of(whole_run)[2::3]


def test_seed_and_sigma_matter(whole_run, lm_options, tmp_path):
    runs, tree = [kr.losses_of(whole_run)[:5]], ["--objective", "tree"]
    for number, options in enumerate((["--seed", "1"], [*tree, "--sigma", "0.5"], [*tree, "--state-weight", "3"])):
        folder = tmp_path / str(number)
        options = [*options, "--max-steps", "5", "--warmup-steps", "2", "--output-dir", str(folder)]
        assert lm.main([*lm_options, *options]) == 0
        runs.append(kr.losses_of(folder))
    assert len({tuple(run) for run in runs}) == 4


@pytest.mark.parametrize("path, depth", [("full", 3), ("2,3", 2)])
def test_backprop_baseline(lm_options, tmp_path, path, depth):
    folder = tmp_path / "run"
    options = ["--objective", "backprop", "--path", path, "--max-steps", "8", "--output-dir", str(folder)]
    assert lm.main([*lm_options, *options]) == 0
    (row,) = json.loads((folder / "metrics.json").read_text())["validation"]  # only the trained path is reported
    assert row["depth"] == depth
    assert all(row["loss"] == row["ce"] for row in kr.lines(folder))


def test_accumulation_equals_a_larger_batch(lm_options, tmp_path):
    runs = []
    for batch, accumulate in ((6, 1), (2, 3)):
        folder = tmp_path / str(batch)
        options = ["--objective", "backprop", "--batch-size", str(batch), "--grad-accum", str(accumulate)]
        assert lm.main([*lm_options, *options, "--max-steps", "6", "--output-dir", str(folder)]) == 0
        runs.append(kr.lines(folder))
    for one, other in zip(*runs):
        for key in ("loss", "grad_norm", "tokens", "epoch"):
            assert one[key] == pytest.approx(other[key], rel=1e-4), key


def test_free_energy_is_logged_and_changes_nothing_else(whole_run, lm_options, tmp_path):
    folder, without = tmp_path / "run", tmp_path / "without"
    tree = [*lm_options, "--objective", "tree", "--max-steps", "20"]
    assert lm.main([*tree, "--output-dir", str(without)]) == 0
    assert lm.main([*tree, "--free-energy", "--output-dir", str(folder)]) == 0
    rows, names = kr.lines(folder), ("free_energy_nll", "free_energy_level_0", "free_energy_level_1")
    assert kr.losses_of(folder) == kr.losses_of(without)
    for row in rows:
        assert row["free_energy"] == pytest.approx(sum(row[name] for name in names), rel=1e-5)
    assert not any(name.startswith("free_energy") for row in kr.lines(whole_run) for name in row)


def test_bfloat16_run_is_finite_and_near_float32(lm_options, tmp_path, any_precision):
    runs = []
    for precision in ("float32", "bfloat16"):
        folder, options = tmp_path / precision, ["--precision", precision, "--max-steps", "12", "--lr", "2e-3"]
        assert lm.main([*lm_options, *options, "--output-dir", str(folder)]) == 0
        any_precision()
        runs.append(np.array([[row["loss"], row["ce"], row["grad_norm"]] for row in kr.lines(folder)]))
    assert runs[0].shape == (12, 3) and np.isfinite(runs).all()
    assert (runs[0][:, 0] != runs[1][:, 0]).all()
    assert np.abs(runs[1][:, :2] / runs[0][:, :2] - 1).max() < 0.03
    assert json.loads((folder / "checkpoints" / "step-00000012" / "state.json").read_text())["precision"] == "bfloat16"


@pytest.mark.parametrize("installed, fragment", [([], "none is installed"), (["wandb", "clearml"], "wandb, clearml")])
def test_tracker_that_is_not_installed(lm_options, tmp_path, monkeypatch, capsys, installed, fragment):
    monkeypatch.setattr("hbll_seq.training.devices.get_available_trackers", lambda: installed)
    options = ["--log-with", "tensorboard", "--output-dir", str(tmp_path / "run")]
    message = kr.fails([*lm_options, *options], capsys, "log_with='tensorboard'", "not installed", fragment)
    assert "one of none" not in message


def test_own_tokenizer_is_trained_once(lm_options, tmp_path, capsys):
    options = [*lm_options, "--tokenizer", "train", "--vocab-size", "300", "--max-steps", "2"]
    for name in ("a", "b"):
        assert lm.main([*options, "--output-dir", str(tmp_path / name)]) == 0
    assert capsys.readouterr().err.count("training a tokenizer") == 1
    assert HBLLForCausalLM.from_pretrained(tmp_path / "a").config.vocab_size == 300


def test_tracker_gets_settings_and_metrics(lm_options, tmp_path, monkeypatch):
    from accelerate import tracking

    seen = {"config": None, "steps": []}

    class Recorder(tracking.GeneralTracker):
        name, requires_logging_directory = "tensorboard", False
        tracker = main_process_only = None

        def __init__(self, run_name, **_):
            super().__init__()

        def store_init_configuration(self, values):
            seen["config"] = values

        def log(self, values, step=None, **_):
            assert all(isinstance(value, (int, float)) for value in values.values())
            seen["steps"].append((step, "loss" in values))

    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType.TENSORBOARD])
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Recorder)
    options = ["--log-with", "tensorboard", "--max-steps", "4", "--log-every", "2"]
    assert lm.main([*lm_options, *options, "--output-dir", str(tmp_path / "run")]) == 0
    assert seen["config"]["n_embd"] == 16 and seen["steps"] == [(2, True), (4, True), (4, False)]


# -------------------------------------------------------------------------------- schedule and optimizer


def test_learning_rate_is_warm_up_then_cosine_to_the_floor():
    rates = [learning_rate(step, peak=2.0, total=100, warmup=10, floor=0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == 2.0 and rates[-1] == pytest.approx(0.2)
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))
    assert rates[54] == pytest.approx(1.1, abs=0.03)  # half way down at half time
    assert learning_rate(0, peak=2.0, total=1, warmup=10, floor=0.1) == 2.0
    short = [learning_rate(step, peak=2.0, total=6, warmup=100, floor=0.0) for step in range(6)]
    assert max(short) == 2.0 and short[-1] == pytest.approx(0.0)  # warm-up is at most half of the run


@pytest.mark.parametrize(
    "given, mix, weight, rank, family",
    [
        ({}, "octaves", 9.0, 16, "prefix"),
        ({"objective": "tree"}, "none", 1.0, 0, "spine"),
        ({"objective": "backprop"}, "none", 1.0, 0, "spine"),
        ({"path": "4,6,7"}, "none", 1.0, 0, "spine"),  # depth=3 of the exported model is the path that was trained
        ({"depth_mix": "spine"}, "spine", 1.0, 0, "spine"),
        ({"depth_mix": "prefixes", "n_level": 4}, "prefixes", 1.0, 0, "prefix"),
        ({"depth_mix": "few", "exit_by": "depth"}, "few", 9.0, 16, "prefix"),
        ({"objective": "backprop", "depth_mix": "all", "depth_mix_weight": 2.0}, "all", 2.0, 16, "prefix"),
    ],
)
def test_what_is_left_open_follows_from_objective_path_and_mix(given, mix, weight, rank, family):
    fresh = resolve({"max_steps": 5}, given)
    # the same on top of another run's settings.yaml, which keeps what was left open
    run = st.TrainingSettings(max_steps=5)
    again = resolve(yaml.safe_load(run.resolved().to_yaml(run.left_open())), given)
    for asked in (fresh, again):
        settings = asked.resolved()
        found = (settings.depth_mix, settings.depth_mix_weight, settings.exit_rank, settings.default_paths)
        assert found == (mix, weight, rank, family) and settings.resolved() == settings
    model = HBLLForCausalLM(fresh.model_config(50))
    assert model.config.exit_by == fresh.exit_by == given.get("exit_by", "jump")
    assert (model.config.exit_rank, model.config.default_paths) == (rank, family)
    objective, paths = make_objective(fresh, model, 0), evaluated_paths(fresh, model)
    if mix in ("octaves", "none", "spine", "prefixes") and fresh.objective != "tree":
        read = {r.path[: r.path.index(n) + 1] for r in objective.sub_networks(0) for n in r.exits}
        assert set(paths.values()) == read
        if mix == "prefixes":  # and a depth names what was trained
            assert all(model.resolve_path(depth=len(path)) == path for path in paths.values())


def test_what_was_asked_for_is_asked_for_whatever_else_changes():
    """What is written out is kept, and told where it does not fit; what was left open follows."""
    run = dataclasses.asdict(st.TrainingSettings(max_steps=5, exit_by="depth", exit_rank=4))
    settings = resolve(run, {"depth_mix": "spine"}).resolved()
    assert (settings.exit_rank, settings.exit_by, settings.default_paths) == (4, "depth", "spine")
    by_depth = resolve({"max_steps": 5, "exit_by": "depth"}, {"depth_mix": "spine"})
    with pytest.raises(ValueError, match="exit_by='depth' with exit_rank=0"):
        by_depth.model_config(50)


def test_a_checkpoint_holds_what_was_asked_for_and_what_came_of_it(stopped_run, monkeypatch):
    state = json.loads((stopped_run / "checkpoints" / "step-00000012" / "state.json").read_text())
    assert state["asked"] == st.LEFT_OPEN
    assert (state["settings"]["depth_mix"], state["settings"]["exit_rank"]) == ("octaves", 16)
    text = (stopped_run / "settings.yaml").read_text()
    assert "depth_mix: auto  # octaves\n" in text and yaml.safe_load(text)["exit_rank"] is None
    with monkeypatch.context() as patch:  # a later version decides otherwise
        patch.setattr(st, "DEFAULT_MIX", "spine")
        assert resolve(yaml.safe_load(text)).resolved().depth_mix == "spine"
        assert lm.resume_run({"output_dir": str(stopped_run)}, None)[0].depth_mix == "octaves"
    assert lm.main(["--resume", "--output-dir", str(stopped_run)]) == 0
    again = (stopped_run / "settings.yaml").read_text()
    assert again == text


def test_every_option_of_the_objects_is_a_setting_or_left_out_on_purpose():
    """An option exists in one place: default, range and words of a setting are those of the options object."""
    fields = {f.name: f for f in dataclasses.fields(st.TrainingSettings)}
    taken = {field.metadata["of"][::2] for field in fields.values() if field.metadata["of"]}
    elsewhere = {(Sweeps, "damping"), (Sweeps, "tolerance"), (Sweeps, "clip"), (Tree, "clean_inputs")}
    for kind in (Sweeps, Tree, DepthMix):
        assert {(kind, f.name) for f in dataclasses.fields(kind)} <= taken | elsewhere
    settings = st.TrainingSettings(max_steps=1)
    assert settings.inference() == Sweeps().resolved("depth", 7)
    assert settings.time().resolved("layer") == Sweeps().resolved("layer")
    assert st.TrainingSettings(max_steps=1, objective="tree").inference() == Tree(sigma=0.005)
    assert settings.depths() == DepthMix("octaves", 9.0)
    for name in ("forward", "time_forward", "state_weight"):
        kind, _, option = fields[name].metadata["of"]
        own = next(f.metadata for f in dataclasses.fields(kind) if f.name == option)
        assert own["help"] in fields[name].metadata["help"]
        assert all(own[key] == fields[name].metadata[key] for key in ("low", "above", "below"))
    # a slip of the keyboard ends in no endless loop
    for name in ("forward", "backward", "time_forward", "time_backward", "n_samples"):
        with pytest.raises(ValueError, match=f"{name}=10001: must be at most 10000"):
            st.TrainingSettings(max_steps=1, **{name: 10_001})


def test_what_a_model_card_says_of_the_training():
    def notable(**options):
        return settings_read.notable(st.TrainingSettings(max_steps=5, **options).resolved())

    always = {"objective": "sweeps", "depth_mix": "octaves", "max_steps": 5, "batch_size": 8, "lr": 0.002, "seed": 0}
    assert notable() == always
    assert notable(sigma=0.1, time_forward=4, output_dir="x", n_embd=64) == always  # nothing that this run reads
    asked = {"forward": 2, "backward": 4, "chunk_size": 1}  # what goes with a K
    assert notable(forward=2, dropout=0.1) == {**always, **asked}  # the configuration says the rest
    tree = {**always, "objective": "tree", "sigma": 0.1}
    del tree["depth_mix"]
    assert notable(objective="tree", sigma=0.1, forward=2) == tree
    assert notable(depth_mix="none") == {**always, "depth_mix": "none"}
    assert notable(cell="gru", carry_state=True, time_forward=2)["time_forward"] == 2


def test_settings_of_an_older_checkpoint_keep_their_meaning():
    old = {"objective": "sweeps", "path": "full", "mix": "auto", "mix_weight": 1.0, "max_steps": 5}
    settings = resolve(migration.checkpoint_settings(old)).resolved()
    found = (settings.depth_mix, settings.depth_mix_weight, settings.exit_rank, settings.default_paths)
    assert found == ("sandwich", 1.0, 0, "spine")
    assert migration.checkpoint_settings({**old, "objective": "tree"})["depth_mix"] == "none"
    new = dataclasses.asdict(settings)
    assert migration.checkpoint_settings(new) == new


def test_a_checkpoint_of_an_older_version_is_found_as_it_was_meant(whole_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    for path in folder.glob("checkpoints/*/state.json"):
        state = json.loads(path.read_text())
        for name in ("default_paths", "exit_rank", "depth_mix", "depth_mix_weight"):
            del state["settings"][name]
        state["settings"].update(mix="auto", mix_weight=1.0)
        kr.write_state(path.parent, state)
    settings = lm.resume_run({"output_dir": str(folder)}, None)[0]
    found = (settings.depth_mix, settings.depth_mix_weight, settings.exit_rank, settings.default_paths)
    assert found == ("sandwich", 1.0, 0, "spine")


def test_weight_decay_falls_on_matrices_only():
    settings = st.TrainingSettings(max_steps=1, weight_decay=0.3)
    model = HBLLForCausalLM(settings.model_config(50))
    model.blocks[0].requires_grad_(False)
    matrices, rest = make_optimizer(model, settings).param_groups
    assert matrices["weight_decay"] == 0.3 and {p.ndim for p in matrices["params"]} == {2, 3}  # 3: a stack of them
    assert rest["weight_decay"] == 0.0 and {p.ndim for p in rest["params"]} == {1}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in matrices["params"] + rest["params"]}


def test_the_fused_optimizer_takes_the_steps_of_the_plain_one():
    settings, trained = st.TrainingSettings(max_steps=1, weight_decay=0.3, lr=1e-2), {}
    for is_fused in (True, False):
        torch.manual_seed(0)
        model = HBLLForCausalLM(settings.model_config(50)).double()
        optimizer = make_optimizer(model, settings)
        assert optimizer.defaults["fused"]
        for group in optimizer.param_groups:
            group["fused"] = is_fused
        for step in range(5):
            optimizer.zero_grad()
            model(torch.arange(12).view(2, 6) + step).logits.square().mean().backward()
            optimizer.step()
        trained[is_fused] = [p.detach() for p in model.parameters()]
    torch.testing.assert_close(trained[True], trained[False], rtol=1e-12, atol=1e-12)


# -------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "options, fragments",
    [
        (["--context-length", "0"], ["context_length=0", "at least 1"]),
        (["--n-embd", "10", "--n-head", "4"], ["n_embd=10", "n_head=4"]),
        (["--n-level", "0"], ["n_level=0"]),
        (["--n-level", "2.5"], ["n_level='2.5'", "whole number"]),
        (["--lr", "nan"], ["lr='nan'", "finite number"]),
        (["--lr", "0"], ["lr=0.0", "above 0"]),
        (["--max-steps", "0"], ["max_steps=0"]),
        (["--max-steps", "5", "--epochs", "2"], ["max_steps=5", "epochs=2.0", "one of the two"]),
        (["--dropout", "1"], ["dropout=1.0", "below 1"]),
        (["--norm", "batch"], ["norm='batch'", "rmsnorm, layernorm"]),
        (["--objective", "both"], ["objective='both'", "sweeps, tree, backprop"]),
        (["--objective", "tree", "--path", "2,3"], ["path='2,3'", "--objective sweeps or backprop"]),
        (["--objective", "tree", "--depth-mix", "random"], ["depth_mix='random'", "the tree trains all paths"]),
        (["--path", "4", "--depth-mix", "random"], ["depth_mix='random' with path='4'", "leave one out"]),
        (["--depth-mix-weight", "0"], ["depth_mix_weight=0.0", "--depth-mix none"]),
        (["--depth-mix", "every"], ["depth_mix='every'", "sandwich"]),
        (["--objective", "backprop", "--path", "1,3"], ["1 -> 3", "dyadic"]),
        (["--objective", "backprop", "--path", "x"], ["path='x'", "full"]),
        (["--precision", "fp16"], ["'fp16'", "refused", "bfloat16"]),
        (["--vocab-size", "300"], ["vocab_size=300", "--tokenizer train"]),
        (["--tokenizer", "train", "--vocab-size", "50000"], ["50000"]),
        (["--tokenizer", "no.model"], ["no.model"]),
        (["--data", "no.txt"], ["no.txt"]),
        (["--log-with", "abacus"], ["log_with='abacus'", "tensorboard"]),
        (["--min-lr-ratio", "2"], ["min_lr_ratio=2.0: must be at most 1\n"]),
        (["--sample-prompt", ""], ["sample_prompt='': must not be empty"]),
        (["--objective", "backprop", "--free-energy"], ["free_energy=True", "--objective tree"]),
        (["--objective", "tree", "--sigma", "0", "--free-energy"], ["free_energy=True", "sigma"]),
        (["--batch-size", "100000"], ["batch_size=100000", "windows", "smaller --batch-size"]),
        (["--batch-size", "100", "--grad-accum", "50"], ["batch_size=100", "grad_accum=50", "windows", "5000"]),
        (["--preset", "huge"], ["preset 'huge'", "gru-small, hybrid-small, mingru-small, small, wikitext-103, wikitext-2"]),
        (["--learning-rate", "1"], ["--learning-rate", "did you mean --lr?", "--help"]),
        (["--sweeps", "2"], ["unrecognized arguments: --sweeps 2; did you mean --forward?"]),
        (["--mix=octaves"], ["did you mean --depth-mix?"]),
        (["--graphs", "recomputed"], ["did you mean --recompute?"]),
        (["--bach-size", "2"], ["did you mean --batch-size?"]),
    ],
)
def test_bad_option(lm_options, tmp_path, capsys, options, fragments):
    folder = tmp_path / "run"
    kr.fails([*lm_options, "--output-dir", str(folder), *options], capsys, *fragments)
    assert not folder.exists()


@pytest.mark.parametrize("content, fragment", [(b"", "empty"), (b"one line", "tokens"), (b"caf\xe9 " * 500, "UTF-8")])
def test_bad_text(lm_options, tmp_path, capsys, content, fragment):
    (tmp_path / "bad.txt").write_bytes(content)
    options = ["--data", str(tmp_path / "bad.txt"), "--output-dir", str(tmp_path / "run")]
    kr.fails([*lm_options, *options], capsys, "bad.txt", fragment)
    assert not (tmp_path / "run").exists()


def test_text_shorter_than_a_window(lm_options, tmp_path, capsys):
    options = ["--context-length", "100000", "--output-dir", str(tmp_path / "run")]
    kr.fails([*lm_options, *options], capsys, "100001", "context_length")
    assert not (tmp_path / "run").exists()


def test_short_evaluation_splits_are_read_in_shorter_windows(lm_options, tmp_path):
    (tmp_path / "short.txt").write_text("a tree of blocks\n" * 400)
    options = ["--data", str(tmp_path / "short.txt"), "--context-length", "512", "--max-steps", "1"]
    assert lm.main([*lm_options, *options, "--output-dir", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert 0 < summary["validation"][0]["tokens"] < 512


def test_output_folder_that_cannot_be(lm_options, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    options = ["--output-dir", str(tmp_path / "file" / "run")]
    kr.fails([*lm_options, *options], capsys, "output_dir=", "is a file", "another --output-dir")
    if Path("/proc").is_dir():
        kr.fails([*lm_options, "--output-dir", "/proc/run"], capsys, "output_dir='/proc/run'", "another --output-dir")


def test_run_is_not_overwritten_unasked(stopped_run, lm_options, capsys):
    before = kr.losses_of(stopped_run)
    fragments = ("already holds a run (saved at step 12)", "--resume", "--overwrite")
    kr.fails([*lm_options, "--output-dir", str(stopped_run)], capsys, *fragments)
    assert kr.losses_of(stopped_run) == before
    (stopped_run / "mine.txt").write_text("kept")
    assert lm.main([*lm_options, "--overwrite", "--max-steps", "3", "--output-dir", str(stopped_run)]) == 0
    assert kr.steps_of(stopped_run) == [1, 2, 3] and ck.list_checkpoints(stopped_run / "checkpoints") == [0, 3]
    assert (stopped_run / "mine.txt").exists()
    said = kr.fails([*lm_options, "--output-dir", str(stopped_run)], capsys, "holds a finished run", "another --output-dir")
    assert "--resume" not in said and "--overwrite" in said


def test_launcher_asking_for_float16_is_refused(lm_options, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    options = [*lm_options, "--output-dir", str(tmp_path / "run")]
    kr.fails(options, capsys, "'fp16'", "refused", "--mixed_precision bf16")


# -------------------------------------------------------------------------------- settings


def test_dry_run_prints_what_a_preset_can_read(tmp_path, capsys):
    options = ["--preset", "wikitext-103", "--lr", "3e-4", "--max-steps", "9", "--output-dir", str(tmp_path / "x")]
    assert lm.main([*options, "--dry-run"]) == 0
    text = capsys.readouterr().out
    values = yaml.safe_load(text)
    assert values["lr"] == 3e-4 and values["n_embd"] == 768 and values["max_steps"] == 9 and values["epochs"] is None
    (tmp_path / "own.yaml").write_text(text)
    assert lm.main(["--preset", str(tmp_path / "own.yaml"), "--dry-run"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == values
    assert sorted(os.listdir(tmp_path)) == ["own.yaml"]


def test_dry_run_checks_the_settings(capsys):
    kr.fails(["--dry-run", "--n-embd", "10"], capsys, "n_embd=10")


@pytest.mark.parametrize("path", sorted(lm.PRESETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_are_valid(path):
    settings = resolve(read_preset(path.stem, lm.PRESETS))
    settings.model_config(4096)
    if path.stem == "wikitext-103":  # the paper's setting
        assert (settings.n_level, settings.n_embd, settings.n_head, settings.context_length) == (3, 768, 12, 1024)
        assert (settings.batch_size, settings.lr, settings.weight_decay, settings.epochs) == (2, 1e-4, 0.01, 10)
        assert (settings.sigma, settings.vocab_size, settings.objective) == (0.005, 16384, "tree")


@pytest.mark.parametrize(
    "text, fragment",
    [
        ("n_embed: 3", "unknown key 'n_embed' in preset"),
        ("max_steps: 3.5", "max_steps=3.5: must be a whole number"),
        ("max_steps: yes", "max_steps=True"),
        ("tie_embeddings: 1", "tie_embeddings=1: must be true or false"),
        ("data: 3", "data=3: must be text"),
        ("- a", "key: value"),
        ("a: [", "not valid YAML"),
    ],
)
def test_bad_preset(tmp_path, capsys, text, fragment):
    (tmp_path / "p.yaml").write_text(text)
    message = kr.fails(["--preset", str(tmp_path / "p.yaml"), "--dry-run"], capsys, fragment)
    assert "n_embed" not in text or "did you mean 'n_embd'?" in message


def test_settings_read_yaml_as_people_write_it(tmp_path):
    (tmp_path / "p.yaml").write_text("lr: 1e-4\npath: [4, 6]\nobjective: backprop\nmax_steps: 10\nclip: 1\n")
    settings = resolve(read_preset(str(tmp_path / "p.yaml"), lm.PRESETS), {"epochs": "2"})
    assert settings.lr == 1e-4 and settings.path_blocks == (4, 6) and settings.clip == 1.0
    assert settings.max_steps is None and settings.epochs == 2.0  # the later of two rivals


def test_every_option_is_in_the_help(capsys):
    with pytest.raises(SystemExit) as ended:
        lm.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for flag in ("preset data column tokenizer output-dir resume seed max-steps n-level n-embd n-head context-length "
                 "batch-size lr weight-decay warmup-steps objective path sigma state-weight n-samples clip grad-accum "
                 "free-energy eval-every save-every log-every keep-checkpoints precision threads log-with dry-run "
                 "overwrite").split():
        assert any(f"--{flag}{end}" in text for end in (" ", "\n", ",")), flag
    assert "activation checkpointing: less memory for more work (default: no)" in " ".join(text.split())
    assert "newer checkpoints" in " ".join(text.split()) and "removed" in text
