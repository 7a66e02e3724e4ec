"""Checkpoints: atomic, checked to the byte, complete enough that training goes on as if it had not stopped."""

import json
import os
import random
import shutil

import kill_and_resume as kr
import numpy as np
import pytest
import torch
from torch import nn

from hbll_seq.training import checkpoint as ck
from hbll_seq.training import checkpoint_contents as contents
from hbll_seq.training.random_state import rng_state, set_rng_state
from hbll_seq.utils.integrity import read_sums


class Tied(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.embed = nn.Embedding(6, width)
        self.head = nn.Linear(width, 6, bias=True)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        return self.head(self.embed(x))


def groups(value=1.0):
    return {"model": {"a": torch.full((3, 2), value), "n": torch.tensor(7)}, "optimizer": {"a|m": torch.zeros(3, 2)}}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name


def test_saved_is_loaded(tmp_path):
    path = ck.save_checkpoint(tmp_path / "new" / "folder", 12, groups(), {"settings": {"x": 0.1}})
    tensors, state = ck.load_checkpoint(path.parent, 12)
    for group, expected in groups().items():
        assert_equal(tensors[group], expected)
    assert state["step"] == 12 and state["settings"] == {"x": 0.1}
    assert sorted(p.suffix for p in path.iterdir()) == ["", ".json", ".safetensors", ".safetensors"]  # nothing pickled
    assert set(read_sums(path / "SHA256SUMS")) == {"state.json", "model.safetensors", "optimizer.safetensors"}


def test_newest_are_kept(tmp_path):
    for step in (5, 10, 15, 20):
        ck.save_checkpoint(tmp_path, step, groups(), {}, keep=2)
    assert ck.list_checkpoints(tmp_path) == [15, 20]
    assert sorted(os.listdir(tmp_path)) == ["step-00000015", "step-00000020"]


def test_step_beyond_eight_digits_is_listed_in_order(tmp_path):
    for step in (99_999_999, 100_000_000):
        ck.save_checkpoint(tmp_path, step, groups(), {})
    assert ck.list_checkpoints(tmp_path) == [99_999_999, 100_000_000]


def test_full_disk_in_safetensors_is_an_oserror(tmp_path, monkeypatch):
    def full(*_):
        raise ck.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(ck, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        ck.save_checkpoint(tmp_path, 1, groups(), {})
    assert os.listdir(tmp_path) == []


def test_same_step_is_not_saved_again(tmp_path):
    ck.save_checkpoint(tmp_path, 1, groups(1.0), {})
    with pytest.raises(FileExistsError, match="step-00000001"):
        ck.save_checkpoint(tmp_path, 1, groups(2.0), {})
    assert ck.load_checkpoint(tmp_path, 1)[0]["model"]["a"][0, 0] == 1.0
    assert os.listdir(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("group", ["model", "optimizer"])
def test_nan_is_never_saved(tmp_path, group, value):
    bad = groups()
    next(iter(bad[group].values()))[1, 1] = value
    with pytest.raises(ValueError, match=f"refusing to save step 3: {group} tensor 'a"):
        ck.save_checkpoint(tmp_path, 3, bad, {})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["state.json", "model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("harm", ["half", "empty", "missing", "byte"])
def test_damage_is_found_and_named(tmp_path, name, harm):
    path = ck.save_checkpoint(tmp_path, 4, groups(), {"settings": {}})
    file = path / name
    content = file.read_bytes()
    if harm == "missing":
        file.unlink()
    elif harm == "byte":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if name != "state.json" else b"[" + content[1:])
    else:
        file.write_bytes(content[: len(content) // 2] if harm == "half" else b"")
    with pytest.raises(ck.CheckpointError, match=f"step-00000004 is damaged: {name}"):
        ck.load_checkpoint(tmp_path, 4)
    assert ck.sound_checkpoints(tmp_path) == [] and ck.list_checkpoints(tmp_path) == [4]


def test_nan_in_a_file_is_found(tmp_path):
    path = ck.save_checkpoint(tmp_path, 4, groups(), {})
    ck.save_file({"a": torch.full((3, 2), float("nan")), "n": torch.tensor(7)}, path / "model.safetensors")
    state = json.loads((path / "state.json").read_text())
    state["files"]["model.safetensors"] = ck.digest(path / "model.safetensors")
    kr.write_state(path, state)
    with pytest.raises(ck.CheckpointError, match="NaN or infinity in 'a'"):
        ck.load_checkpoint(tmp_path, 4)


def test_newer_format_is_refused(tmp_path):
    path = ck.save_checkpoint(tmp_path, 4, groups(), {})
    state = json.loads((path / "state.json").read_text())
    kr.write_state(path, {**state, "format": 99})
    with pytest.raises(ck.CheckpointError, match="format 99"):
        ck.load_checkpoint(tmp_path, 4)


def test_tied_weights_are_stored_once_and_stay_tied():
    torch.manual_seed(0)
    one, other = Tied(), Tied()
    tensors = contents.module_tensors(one)
    assert sorted(tensors) == ["count", "embed.weight", "head.bias"]
    contents.load_module(other, tensors)
    assert other.head.weight is other.embed.weight and torch.equal(other.head.weight, one.embed.weight)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("head.bias"), "lacks tensor 'head.bias'"),
        (lambda t: t.update(more=torch.zeros(1)), "holds unexpected tensor 'more'"),
        (lambda t: t.update({"head.bias": torch.zeros(7)}), r"'head.bias' is torch.float32 of shape \(7,\)"),
        (lambda t: t.update({"head.bias": torch.zeros(6, dtype=torch.float64)}), "torch.float64"),
    ],
)
def test_loading_is_strict_and_leaves_the_module_alone(change, message):
    torch.manual_seed(0)
    module = Tied()
    before = {name: tensor.clone() for name, tensor in contents.module_tensors(module).items()}
    tensors = {name: tensor + 1 for name, tensor in before.items()}
    change(tensors)
    with pytest.raises(ck.CheckpointError, match=message):
        contents.load_module(module, tensors)
    assert_equal(contents.module_tensors(module), before)


def _train(module, optimizer, steps):
    for _ in range(steps):
        x = torch.randint(6, (8,))  # from the global generator, which the checkpoint holds
        nn.functional.cross_entropy(module(x), (x + 1) % 6).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_training_goes_on_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    module = Tied()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    _train(module, optimizer, 3)
    parts = {"model": contents.module_tensors(module), "optimizer": contents.optimizer_tensors(optimizer, module)}
    assert "embed.weight|exp_avg" in parts["optimizer"] and "embed.weight|step" in parts["optimizer"]
    ck.save_checkpoint(tmp_path, 3, parts, {"rng": rng_state()})
    _train(module, optimizer, 3)
    torch.manual_seed(1)
    resumed = Tied()
    resumed_optimizer = torch.optim.AdamW(resumed.parameters(), lr=0.1)
    tensors, state = ck.load_checkpoint(tmp_path, 3)
    contents.load_module(resumed, tensors["model"])
    contents.load_optimizer(resumed_optimizer, resumed, tensors["optimizer"])
    set_rng_state(state["rng"])
    _train(resumed, resumed_optimizer, 3)
    assert_equal(contents.module_tensors(resumed), contents.module_tensors(module))


@pytest.mark.parametrize("name, shape", [("nobody|exp_avg", (6,)), ("head.bias|exp_avg", (5,))])
def test_optimizer_state_must_fit(name, shape):
    module = Tied()
    with pytest.raises(ck.CheckpointError, match="fits no parameter"):
        contents.load_optimizer(torch.optim.AdamW(module.parameters()), module, {name: torch.zeros(shape)})


def test_every_random_generator_is_restored():
    def draw():
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(2).tolist()

    draw()
    state = json.loads(json.dumps(rng_state()))
    expected = draw()
    assert draw() != expected
    set_rng_state(state)
    assert draw() == expected


def test_atomic_write_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    ck.atomic_write(path, "old")
    monkeypatch.setattr(ck.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        ck.atomic_write(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_list_ignores_what_is_no_checkpoint(tmp_path):
    assert ck.list_checkpoints(tmp_path / "nowhere") == []
    ck.save_checkpoint(tmp_path, 1, groups(), {})
    (tmp_path / "step-00000002").write_text("a file")
    (tmp_path / ".aside-3").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "step-000000003").mkdir()  # no name that a checkpoint is given
    (tmp_path / "step-0000000\u0664").mkdir()  # a digit, of another script
    assert ck.list_checkpoints(tmp_path) == [1]
    shutil.rmtree(tmp_path / "step-00000001")
    assert ck.list_checkpoints(tmp_path) == []
