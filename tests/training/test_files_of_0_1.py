"""What version 0.1 wrote (tests/data_of_0_1) loads, says the same, and goes on: its names are read through one table."""

import json
import shutil
from pathlib import Path

import kill_and_resume as kr
import pytest
import yaml
from safetensors.torch import load_file, save_file

from hbll_seq.generation.decoding import generate_ids
from hbll_seq.generation.sampling import SamplingParams
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.config import HBLLConfig
from hbll_seq.training.presets import preset_fingerprint, read_preset, resolve
from hbll_seq.training.resuming import resume_run
from hbll_seq.utils import migration

lm = kr.load_script()
DATA = Path(__file__).resolve().parents[1] / "data_of_0_1"
EXPECTED = json.loads((DATA / "expected.json").read_text())["runs"]
RUNS = sorted(EXPECTED)
STEP = 147
#: the options of the recorded runs, by today's names
OPTIONS = {
    "--block-size": "--context-length", "--readout-rank": "--exit-rank", "--readout-by": "--exit-by", "--sweeps": "--forward",
    "--corrections": "--backward", "--mix": "--depth-mix", "--mix-weight": "--depth-mix-weight",
    "--time-sweeps": "--time-forward", "--time-corrections": "--time-backward", "--time-chunk": "--time-chunk-size",
    "secant": "low_rank", "--graphs": "--recompute",
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of what was written, and the folder from which it was."""
    shutil.copytree(DATA, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def options_of(name):
    return [OPTIONS.get(word, word) for word in EXPECTED[name]["options"] if word != "recomputed"]


def figures(folder):
    return [{key: row[key] for key in ("step", "loss", "ce", "grad_norm")} for row in kr.lines(folder)]


def is_recorded_machine(name, folder, monkeypatch):
    """Whether the first steps of a new run are the recorded ones in every bit; processors round in their own ways."""
    with monkeypatch.context() as patch:
        kr.at_step(patch, 20, lambda: kr.os.kill(kr.os.getpid(), 15))
        assert lm.main([*options_of(name), "--eval-every", "0", "--output-dir", str(folder)]) == 143
    first, recorded = figures(folder), EXPECTED[name]["metrics"][:2]
    for row, expected in zip(first, recorded, strict=True):
        assert row == pytest.approx(expected, rel=1e-4)
    return first == recorded


@pytest.mark.parametrize("name", RUNS)
def test_a_stopped_run_goes_on_as_the_unbroken_run_of_then(project, name, monkeypatch):
    exact = is_recorded_machine(name, project / "new", monkeypatch)
    assert lm.main(["--resume", "--preset", "debug", "--output-dir", name]) == 0
    found, expected = figures(project / name), EXPECTED[name]["metrics"]
    losses = [row["loss"] for row in json.loads((project / name / "metrics.json").read_text())["test"]]
    for row, other in zip(found, expected, strict=True):
        assert row == (other if exact else pytest.approx(other, rel=1e-3))
    assert losses == (EXPECTED[name]["test"] if exact else pytest.approx(EXPECTED[name]["test"], rel=1e-3))
    model = HBLLForCausalLM.from_pretrained(name)
    for path, ids in EXPECTED[name]["greedy"].items():
        assert greedy(model, path, EXPECTED[name]["prompt"]) == ids
    (newest,) = project.joinpath(name, "checkpoints").iterdir()  # which is written in today's names
    state = json.loads((newest / "state.json").read_text())
    assert not migration.SETTINGS_KEYS.keys() & state["settings"].keys()
    assert not any("readouts" in tensor for tensor in load_file(newest / "model.safetensors"))


def greedy(model, path, prompt):
    steps = generate_ids(model, [prompt], tuple(map(int, path.split(","))), SamplingParams(max_new_tokens=12, temperature=0))
    return [step[0] for step in steps]


def test_a_model_folder_loads_generates_and_is_saved_in_todays_names(tmp_path):
    model = HBLLForCausalLM.from_pretrained(DATA / "model")
    assert (model.config.context_length, model.config.exit_rank, model.config.exit_by) == (8, 2, "depth")
    assert model.exits.up.abs().max() > 0
    for path, ids in EXPECTED["octaves"]["greedy"].items():
        assert greedy(model, path, EXPECTED["octaves"]["prompt"]) == ids
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {"context_length", "exit_rank", "exit_by"} < written.keys() and not migration.CONFIG_KEYS.keys() & written.keys()
    old, new = (load_file(folder / "model.safetensors") for folder in (DATA / "model", tmp_path))
    assert {name.replace("readouts.", "exits.") for name in old} == set(new) != set(old)


def test_the_settings_of_a_run_are_meant_as_they_were(project):
    for name in RUNS:
        settings, _, resumed = resume_run({"output_dir": name}, None)
        assert settings.left_open() == {} and resumed.state["asked"] == {}
        old = yaml.safe_load((project / name / "settings.yaml").read_text())
        assert resolve(read_preset(f"{name}/settings.yaml", project)).resolved() == settings
        assert (settings.context_length, settings.forward, settings.backward) == (8, old["sweeps"], old["corrections"])
        assert settings.recompute == (old["graphs"] == "recomputed") == (name == "secant")
    assert (settings.linearization, settings.depths().name, settings.chunk_size) == ("low_rank", "none", 1)
    assert resume_run({"output_dir": "gru"}, None)[0].time() == settings_of_gru()


def settings_of_gru():
    return resolve({"max_steps": 1, "time_forward": 2, "time_backward": 2, "time_chunk_size": 4}).time()


def test_a_preset_of_old_keys(capsys):
    assert lm.main(["--preset", str(DATA / "preset.yaml"), "--dry-run"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    found = read_preset(str(DATA / "preset.yaml"), DATA)
    assert found == {
        "data": "text.txt", "tokenizer": "tiny.model", "cell": "gru", "n_level": 2, "n_embd": 8, "n_head": 2,
        "context_length": 8, "exit_rank": 4, "exit_by": "depth", "carry_state": True, "depth_mix": "few",
        "depth_mix_weight": 3.0, "forward": 2, "backward": 3, "linearization": "low_rank", "time_forward": 2,
        "time_backward": 3, "time_linearization": "zero", "time_chunk_size": 4, "recompute": True, "max_steps": 12,
        "lr": 0.003,
    }  # fmt: skip
    assert {key: shown[key] for key in found} == found
    raw = yaml.safe_load((DATA / "preset.yaml").read_text())
    assert migration.settings_of_0_1(found) == raw  # so that a run of then knows its preset
    assert preset_fingerprint(raw) != preset_fingerprint(found)


# -------------------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize("old, new", migration.SETTINGS_KEYS.items())
def test_an_old_key_beside_its_new_one_is_refused(tmp_path, capsys, old, new):
    values = {"max_steps": 3, old: 1, new: 1}
    for items in (values.items(), reversed(values.items())):
        (tmp_path / "p.yaml").write_text(yaml.safe_dump(dict(items), sort_keys=False))
        message = kr.fails(["--preset", str(tmp_path / "p.yaml"), "--dry-run"], capsys, "p.yaml")
        assert f"{old} and {new} are one setting, by its old and its new name: leave {old} out" in message
    if old in migration.CONFIG_KEYS:
        with pytest.raises(ValueError, match=f"{old} and {new} are one setting"):
            HBLLConfig.from_dict({old: 2, new: 2})


@pytest.mark.parametrize("line, message", [
    ("graphs: some", "recompute='some': must be true or false"),
    ("linearization: secants", "linearization='secants': allowed are auto, identity, zero, low_rank"),
    ("sweep: 3", "unknown key 'sweep'"),
    ("readouts: 3", "unknown key 'readouts'"),
    ("3: 3", "unknown key 3"),
])  # fmt: skip
def test_what_was_unknown_then_is_unknown_now(tmp_path, capsys, line, message):
    (tmp_path / "p.yaml").write_text(f"max_steps: 3\n{line}\n")
    kr.fails(["--preset", str(tmp_path / "p.yaml"), "--dry-run"], capsys, message)


def test_unknown_config_keys_are_still_refused():
    with pytest.raises(ValueError, match="unknown config key 'sweeps'"):
        HBLLConfig.from_dict({"block_size": 8, "sweeps": 3})
    assert HBLLConfig.from_dict({"block_size": 8}).context_length == 8
    with pytest.raises(ValueError, match="context_length=0"):
        HBLLConfig.from_dict({"block_size": 0})


def test_a_file_with_a_tensor_by_both_names(project):
    file = project / "model" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "exits.up": tensors["readouts.up"].clone()}, file, metadata={"format": "pt"})
    (project / "model" / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match="holds '(readouts|exits).up' and '(readouts|exits).up', which are one weight"):
        HBLLForCausalLM.from_pretrained(project / "model")
    checkpoint = project / "octaves" / "checkpoints" / f"step-{STEP:08d}"
    tensors = load_file(checkpoint / "model.safetensors")
    groups = {"model": {**tensors, "model.exits.up": tensors["model.readouts.up"]}}
    with pytest.raises(ValueError, match="model holds a tensor by its old and by its new name"):
        migration.checkpoint_tensors(groups)


def test_a_users_own_module_of_an_old_name_keeps_it():
    names = ["readouts.weight", "head.weight"]
    assert migration.model_tensors("a file", names, names) == {name: name for name in names}
    assert migration.model_tensors("a file", ["readouts.odd"], ["head.weight"]) == {"readouts.odd": "readouts.odd"}


def test_what_a_checkpoint_says_was_asked_for_is_looked_at(project, capsys):
    checkpoint = project / "octaves" / "checkpoints" / f"step-{STEP:08d}"
    state = json.loads((checkpoint / "state.json").read_text())
    for asked in ({"lr": 0.5}, {"depth_mix": "none"}, [], None, {"exit_rank": []}, {"exit_rank": "auto"}):
        kr.write_state(checkpoint, {**state, "asked": asked})
        kr.fails(["--resume", "--output-dir", "octaves"], capsys, "is damaged", "was asked for")
    kr.write_state(checkpoint, {**state, "asked": {"exit_rank": None, "depth_mix": "auto"}})
    assert lm.main(["--resume", "--output-dir", "octaves", "--dry-run"]) == 0
    assert "exit_rank: null  # 2\n" in (text := capsys.readouterr().out) and "depth_mix: auto  # octaves\n" in text
