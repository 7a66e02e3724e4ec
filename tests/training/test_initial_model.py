"""train/lm.py --init-from: training on from a model; what contradicts it is refused, and a resume needs it no more."""

import json
import shutil

import kill_and_resume as kr
import pytest
import torch

from hbll_seq import HBLLConfig, HBLLForCausalLM
from hbll_seq.data.tokenizer import Tokenizer
from hbll_seq.training import checkpoint as ck
from hbll_seq.training import language_model
from hbll_seq.training.initial_model import read_initial_model
from hbll_seq.utils.tensors import module_tensors

pytestmark = pytest.mark.usefixtures("blank_figures")

lm, lm_run = kr.load_script(), kr.load_run()
QUICK = ["--max-steps", "4", "--eval-every", "0", "--sample-tokens", "0", "--save-every", "2"]


@pytest.fixture(scope="module")
def options(lm_options):
    return [*lm_options, *QUICK]


@pytest.fixture(scope="module")
def own_tokenizer(tmp_path_factory):
    texts = ["tree node level block the a of in reads writes state path . " * 3] * 50
    return Tokenizer.train(texts, 300)


@pytest.fixture(scope="module")
def model_folder(own_tokenizer, tmp_path_factory):
    """A model of a shape that no preset has, with a tokenizer of its own."""
    torch.manual_seed(3)
    config = HBLLConfig(vocab_size=304, n_level=2, n_embd=24, n_head=3, context_length=12, cell=("gru", "transformer", "gru"),
                        exit_rank=2, exit_by="depth", default_paths="prefix", norm="layernorm")
    folder = tmp_path_factory.mktemp("initial") / "model"
    HBLLForCausalLM(config, tokenizer=own_tokenizer).save_pretrained(folder)
    return folder


def first_weights(folder):
    return ck.load_checkpoint(folder / "checkpoints", 0)[0]["model"]


def test_a_run_starts_from_the_models_weights_shape_and_tokenizer(options, model_folder, tmp_path, monkeypatch):
    """And reads the model once."""
    folder, read = tmp_path / "run", []
    monkeypatch.setattr(language_model, "read_initial_model", lambda name: read.append(name) or read_initial_model(name))
    assert lm.main([*options, "--keep-checkpoints", "9", "--init-from", str(model_folder), "--output-dir", str(folder)]) == 0
    assert read == [str(model_folder)]
    source, model = HBLLForCausalLM.from_pretrained(model_folder), HBLLForCausalLM.from_pretrained(folder)
    first = first_weights(folder)
    assert all(torch.equal(first[f"model.{name}"], tensor) for name, tensor in module_tensors(source).items())
    for name in ("n_level", "n_embd", "n_head", "context_length", "cell", "exit_rank", "exit_by", "norm", "vocab_size"):
        assert getattr(model.config, name) == getattr(source.config, name), name
    assert model.tokenizer.fingerprint == source.tokenizer.fingerprint
    assert not torch.equal(module_tensors(model)["embed.weight"], module_tensors(source)["embed.weight"])
    settings = json.loads((folder / "metrics.json").read_text())["settings"]
    assert settings["init_from"] == str(model_folder) and settings["tokenizer"] == "model" and settings["n_embd"] == 24
    assert "init from" in (folder / "README.md").read_text().replace("_", " ")


def test_a_model_in_half_precision_and_with_the_default_tokenizer(options, tmp_path):
    torch.manual_seed(4)
    config = HBLLConfig(vocab_size=4096, n_level=1, n_embd=8, n_head=2, context_length=8, default_paths="prefix", exit_rank=2)
    model = HBLLForCausalLM(config, tokenizer=Tokenizer.default()).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    folder = tmp_path / "run"
    assert lm.main([*options, "--init-from", str(tmp_path / "model"), "--tokenizer", "default", "--n-embd", "8", "--n-level",
                    "1", "--dropout", "0.5", "--keep-checkpoints", "9", "--output-dir", str(folder)]) == 0
    first = first_weights(folder)
    assert all(torch.equal(first[f"model.{name}"], tensor.float()) for name, tensor in module_tensors(model).items())
    state = ck.load_checkpoint(folder / "checkpoints", 2)[1]
    assert state["settings"]["tokenizer"] == "default" and "tokenizer_model" not in state["initial_model"]
    assert state["settings"]["dropout"] == 0.5  # no weight depends on it


@pytest.mark.parametrize("given, fragments", [
    (["--n-embd", "16"], ["n_embd=16", "n_embd=24", "--n-embd"]),
    (["--cell", "gru"], ["cell='gru'", "cell='gru,transformer,gru'"]),
    (["--context-length", "16"], ["context_length=16", "context_length=12"]),
    (["--exit-rank", "0"], ["exit_rank=0", "exit_rank=2"]),
    (["--tokenizer", "default"], ["tokenizer='default'", "--tokenizer"]),
    (["--tokenizer", "train", "--vocab-size", "300"], ["tokenizer='train'", "--tokenizer"]),
])  # fmt: skip
def test_what_contradicts_the_model_is_refused_by_both_names(options, model_folder, tmp_path, capsys, given, fragments):
    command = [*options, "--init-from", str(model_folder), *given, "--output-dir", str(tmp_path / "run")]
    kr.fails(command, capsys, "init_from=", *fragments)
    assert not (tmp_path / "run").exists()


def test_a_name_that_leads_to_no_model(options, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    kr.fails([*options, "--init-from", str(tmp_path / "empty"), "--output-dir", str(tmp_path / "r")], capsys, "init_from=")
    kr.fails([*options, "--tokenizer", "model", "--output-dir", str(tmp_path / "r")], capsys, "--init-from")


def test_a_model_without_a_tokenizer_wants_one_of_as_many_pieces(options, tmp_path, capsys):
    config = HBLLConfig(vocab_size=300, n_level=1, n_embd=8, n_head=2, context_length=8)
    HBLLForCausalLM(config).save_pretrained(tmp_path / "model")
    kr.fails([*options, "--init-from", str(tmp_path / "model"), "--output-dir", str(tmp_path / "run")], capsys, "300", "4096")


def test_a_run_is_taken_up_again_after_its_model_has_gone(options, model_folder, tmp_path, monkeypatch, capsys):
    """From another folder, with the model moved; given again, it must be the same model."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder, "model")
    command = [*options, "--save-every", "1", "--init-from", "model"]
    assert lm.main([*command, "--output-dir", "whole"]) == 0
    with monkeypatch.context() as patch:
        kr.at_step(patch, 3, lambda: kr.os.kill(kr.os.getpid(), 15))
        assert lm.main([*command, "--output-dir", "broken"]) == 143
    shutil.move("model", tmp_path / "elsewhere")
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    assert lm.main(["--resume", "--output-dir", "../broken"]) == 0
    assert kr.differences(tmp_path / "whole", tmp_path / "broken") == []
    assert lm.main(["--resume", "3", "--init-from", "../elsewhere", "--output-dir", "../broken"]) == 0
    HBLLForCausalLM(HBLLConfig(vocab_size=300, n_level=1, n_embd=8, n_head=2)).save_pretrained("other")
    kr.fails(["--resume", "3", "--init-from", "other", "--output-dir", "../broken"], capsys, "another model")
    kr.fails(["--resume", "3", "--n-embd", "8", "--output-dir", "../broken"], capsys, "n_embd=8")


def test_a_run_that_started_from_no_model_takes_none_at_a_resume(stopped_run, model_folder, capsys):
    kr.fails(["--resume", "--init-from", str(model_folder), "--output-dir", str(stopped_run)], capsys, "did not start from")


def test_settings_of_such_a_run_are_read_back(options, model_folder, tmp_path, capsys):
    assert lm.main([*options, "--init-from", str(model_folder), "--dry-run"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "own.yaml").write_text(text)
    assert lm.main(["--preset", str(tmp_path / "own.yaml"), "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == text.splitlines()[1:]


@pytest.mark.parametrize("record", [3, {}, {"sha256": "x"}, {"sha256": "x", "vocab_size": 304, "tokenizer_model": "AA=="}])
def test_a_damaged_record_of_the_model_is_told(options, model_folder, tmp_path, capsys, record):
    folder = tmp_path / "run"
    assert lm.main([*options, "--max-steps", "2", "--init-from", str(model_folder), "--output-dir", str(folder)]) == 0
    checkpoint = folder / "checkpoints" / "step-00000002"
    state = json.loads((checkpoint / "state.json").read_text())
    kr.write_state(checkpoint, {**state, "initial_model": record})
    kr.fails(["--resume", "2", "--output-dir", str(folder)], capsys, "damaged", "initial_model")
