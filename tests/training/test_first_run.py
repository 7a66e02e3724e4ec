"""What a newcomer reads: a prompt of the text's own, no figure that says nothing, no option unused in silence."""

import json

import kill_and_resume as kr
import pytest
import torch

from hbll_seq import HBLLConfig, HBLLForCausalLM
from hbll_seq.data.tokenizer import Tokenizer
from hbll_seq.evaluation.perplexity import format_table
from hbll_seq.training import bundled
from hbll_seq.training.presets import resolve
from hbll_seq.training.settings import TrainingSettings
from hbll_seq.training.settings_read import unused
from hbll_seq.utils.tables import MOST_PER_WORD

pytestmark = pytest.mark.usefixtures("blank_figures")

lm, lm_run = kr.load_script(), kr.load_run()
QUICK = ["--max-steps", "2", "--eval-every", "0", "--sample-tokens", "3"]


def test_a_sample_begins_as_the_validation_text_does(lm_options, tmp_path):
    words = "Der Baum liest den Zustand und schreibt ihn wieder auf den Zweig darunter . "
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train.txt").write_text(words * 200)
    begins = "\n  Über den Zweigen , die der Wind bewegt , liegt Schnee .\n"
    (tmp_path / "text" / "valid.txt").write_text(begins + words * 200)
    options = [*lm_options, *QUICK, "--data", str(tmp_path / "text")]
    assert lm.main([*options, "--output-dir", str(tmp_path / "run")]) == 0
    samples = json.loads((tmp_path / "run" / "metrics.json").read_text())["samples"]
    assert all(sample["text"].startswith("Über den Zweigen , die der Wind bewegt") for sample in samples)
    given = ["--sample-prompt", "Es war", "--output-dir", str(tmp_path / "other")]
    assert lm.main([*options, *given]) == 0
    samples = json.loads((tmp_path / "other" / "metrics.json").read_text())["samples"]
    assert all(sample["text"].startswith("Es war") for sample in samples)


def test_perplexity_per_word_is_shown_where_it_says_something():
    row = {"depth": 1, "loss": 5.0, "perplexity": 148.4, "path": [1]}
    shown = [format_table([{**row, "word_perplexity": value}]).splitlines()[1].split()[3]
             for value in (812.5, MOST_PER_WORD + 1, float("inf"))]
    assert shown == ["812.50", "-", "-"]


def test_the_log_says_how_much_each_evaluation_has_read(lm_options, tmp_path, capsys):
    options = ["--max-steps", "2", "--eval-every", "1", "--eval-batches", "1", "--eval-batch-size", "1", "--sample-tokens",
               "0", "--final-eval-batches", "none"]  # fmt: skip
    assert lm.main([*lm_options, *options, "--output-dir", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    part, *_ = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    last = json.loads((tmp_path / "run" / "metrics.json").read_text())
    n_part, n_all, n_test = part["validation"][0]["tokens"], last["validation"][0]["tokens"], last["test"][0]["tokens"]
    assert n_part < n_all
    assert f"validation, after 1 steps, on the first {n_part:,} of {n_all:,} tokens\n" in printed
    assert f"validation, after 2 steps, on all {n_all:,} tokens\n" in printed
    assert f"test, after 2 steps, on all {n_test:,} tokens\n" in printed


@pytest.mark.parametrize("options, given, named", [
    ({"objective": "tree"}, {"forward": 3, "chunk_size": 2}, "--forward, --chunk-size"),
    ({"objective": "backprop"}, {"linearization": "zero", "time_forward": 2}, "--linearization, --time-forward"),
    ({"objective": "sweeps"}, {"sigma": 0.1, "time_backward": 2, "n_samples": 2}, "--time-backward, --sigma, --n-samples"),
    ({"objective": "sweeps", "depth_mix": "none"}, {"depth_mix_weight": 2.0}, "--depth-mix-weight"),
    ({"objective": "tree"}, {"sigma": 0.1, "lr": 0.1}, ""),
    ({"objective": "sweeps", "cell": "gru"}, {"forward": 3, "time_forward": 2}, ""),
])  # fmt: skip
def test_options_that_a_run_does_not_read_are_told_in_one_line(options, given, named):
    line = unused(TrainingSettings(max_steps=1, **options, **given).resolved(), given)
    assert line.endswith(f": {named}") if named else line == ""
    assert "\n" not in line and (not named or line.startswith("warning: "))


def test_the_mix_of_a_preset_goes_with_its_objective_and_path():
    preset = {"max_steps": 1, "depth_mix": "few"}
    mixes = [resolve(preset, given).resolved().depth_mix
             for given in ({}, {"objective": "sweeps", "path": "full"}, {"objective": "tree"}, {"objective": "backprop"},
                           {"path": "4,6,7"}, {"objective": "backprop", "depth_mix": "all"})]
    assert mixes == ["few", "few", "none", "none", "none", "all"]
    with pytest.raises(ValueError, match="depth_mix='few' with objective='tree'"):
        resolve(preset, {"objective": "tree", "depth_mix": "few"})


def test_the_command_line_alone_is_warned(lm_options, tmp_path, capsys):
    options = [*lm_options, *QUICK, "--objective", "tree", "--output-dir", str(tmp_path / "run")]
    assert lm.main([*options, "--forward", "3"]) == 0  # the preset's forward is everybody's
    said = capsys.readouterr().err
    assert said.count("warning: not used by this run") == 1 and "): --forward\n" in said
    assert lm.main([*options, "--overwrite"]) == 0 and "not used" not in capsys.readouterr().err


def test_the_bundled_models_text_stands_beside_the_fresh_ones(lm_options, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    config = HBLLConfig(vocab_size=4096, n_level=1, n_embd=8, n_head=2, context_length=8)
    stand_in = HBLLForCausalLM(config, tokenizer=Tokenizer.default()).to(torch.bfloat16)
    monkeypatch.setattr(bundled, "bundled_model", lambda: stand_in)
    options = ["--preset", "debug", *QUICK, "--cache-dir", lm_options[5], "--output-dir", str(tmp_path / "run")]
    assert lm.main(options) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("the bundled model")]
    assert "depth 1, perplexity 4" in line  # it knows nothing: 4,096 pieces alike
    assert "on the first 256 tokens of the test split in this run's windows of 16 tokens" in line
    assert "= Homarus gammarus =" in line
    monkeypatch.setattr(bundled, "bundled_model", lambda: None)
    assert lm.main([*options, "--overwrite"]) == 0 and "the bundled model" not in capsys.readouterr().out


def test_another_text_is_no_place_for_the_bundled_model(lm_options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bundled, "bundled_model", lambda: 1 / 0)
    assert lm.main([*lm_options, *QUICK, "--output-dir", str(tmp_path / "run")]) == 0


def test_the_bundled_model_is_the_packages_wherever_one_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bundled").mkdir()
    assert bundled.bundled_model().tokenizer.fingerprint == Tokenizer.default().fingerprint
    monkeypatch.setattr(bundled, "package_folder", lambda: tmp_path / "none")
    assert bundled.bundled_model() is None
