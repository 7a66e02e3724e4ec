"""A checkpoint whose state.json or tensors are not what a run has written: refused in a line, or it is the same run."""

import copy
import json
import os
import random
import shutil
from dataclasses import replace

import kill_and_resume as kr
import pytest
import torch
from safetensors.torch import load_file, save_file

from hbll_seq.training import checkpoint as ck
from hbll_seq.training import checkpoint_contents as contents
from hbll_seq.training.devices import make_accelerator
from hbll_seq.training.random_state import rng_state, set_rng_state
from hbll_seq.training.resuming import check_identity
from hbll_seq.training.settings import FREE_ON_RESUME
from hbll_seq.training.signals import StopSignal
from hbll_seq.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("blank_figures")

lm, lm_run = kr.load_script(), kr.load_run()
STEP = 4
NAN = "a number that is none"
VALUES = [None, -1, 1.5, "x", [], {}, True, 10**30, NAN]
LONG = ["a" * 100_000, [[[[]]]] * 1000]
IDENTITY = ("preset", "num_processes", "precision", "device", "threads", "tokenizer", "data", "validation", "test",
            "settings", "asked")


@pytest.fixture(scope="module")
def run(lm_options, tmp_path_factory):
    """A run with carried states, its trainer, and a function that resumes a checkpoint and says what came of it."""
    folder = tmp_path_factory.mktemp("mutations") / "run"
    options = ["--cell", "gru", "--carry-state", "--time-chunk-size", "4", "--max-steps", str(STEP), "--eval-every", "0"]
    assert lm.main([*lm_options, *options, "--sample-tokens", "0", "--output-dir", str(folder)]) == 0
    given = {"output_dir": str(folder)}
    settings, preset, resumed = lm.resume_run(given, None, STEP)
    state = resumed.state
    accelerator, data = make_accelerator(settings), lm.data(settings)
    model = lm_run.HBLLForCausalLM(settings.model_config(data.tokenizer.vocab_size))
    objective = lm_run.make_objective(settings, model, 0)
    identity = {name: state[name] for name in IDENTITY}
    trainer = Trainer(accelerator, objective, data.train, settings, folder, identity, StopSignal(), lambda step: None)

    def resume():
        found, preset, resumed = lm.resume_run(given, None, STEP)
        check_identity(identity, resumed.state)
        trainer.restore(resumed.tensors, resumed.state)
        return found, preset, snapshot(trainer)

    return folder / "checkpoints" / f"step-{STEP:08d}", trainer, resume


def snapshot(trainer):
    tensors = {**contents.module_tensors(trainer.plain_objective), **trainer._all_states(),
               **contents.optimizer_tensors(trainer.optimizer.optimizer, trainer.plain_objective)}
    content = {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()}
    return content, json.dumps(rng_state()), trainer.done, trainer.seconds


def paths_of(value, path=()):
    """Key paths of a document; of a long list its ends."""
    if path:
        yield path
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    for key in [*keys[:3], *keys[3:][-2:]] if isinstance(value, list) else keys:
        yield from paths_of(value[key], (*path, key))


def changed(state, path, change):
    state = copy.deepcopy(state)
    parent = state
    for key in path[:-1]:
        parent = parent[key]
    change(parent, path[-1])
    return json.dumps(state).replace(f'"{NAN}"', "NaN")


def mutations(state, rng):
    """All: (first key, what, text of the changed state.json)."""
    paths = list(paths_of(state))
    for path in paths:
        yield path[0], f"{path} deleted", changed(state, path, lambda parent, key: parent.pop(key))
        for value in VALUES + LONG * (path[0] != "settings"):
            text = changed(state, path, lambda parent, key: parent.__setitem__(key, value))
            yield path[0], f"{path} = {str(value)[:20]}", text
    for one, other in [rng.sample(paths[: 3 * len(paths) // 4], 2) for _ in range(200)]:
        values = []
        for path in (one, other):
            value = state
            for key in path:
                value = value[key]
            values.append(value)
        if one != other[: len(one)] and other != one[: len(other)]:
            text = changed(state, one, lambda parent, key: parent.__setitem__(key, values[1]))
            yield "settings", f"{one} and {other} swapped", changed(
                json.loads(text), other, lambda parent, key: parent.__setitem__(key, values[0]))


@pytest.mark.parametrize("share", [0.1, pytest.param(1.0, marks=pytest.mark.slow)])
def test_no_mutation_of_a_state_is_taken_for_another_run(run, capsys, share):
    """The sums are made to fit, so that all checks behind them are reached. What remains is a possible value of a setting or
    of a random generator, which nothing but the sums can find."""
    checkpoint, trainer, resume = run
    text = (checkpoint / "state.json").read_text()
    expected, rng, count, findings = resume(), random.Random(0), 0, []
    try:
        for part, what, mutated in mutations(json.loads(text), rng):
            if rng.random() > share:
                continue
            kr.write_state(checkpoint, mutated)
            before, count = snapshot(trainer), count + 1
            try:
                found = resume()
                if part not in ("settings", "rng") and not same(found, expected) or found[2][0] != expected[2][0]:
                    findings.append(f"{what}: another run")
            except ValueError as error:
                if len(str(error)) > 500 or "\n" in str(error):
                    findings.append(f"{what}: a message of {len(str(error))} characters: {str(error)[:200]}")
                if snapshot(trainer) != before:
                    findings.append(f"{what}: refused, after something was changed")
            except Exception as error:
                findings.append(f"{what}: {type(error).__name__}: {str(error)[:200]}")
    finally:
        kr.write_state(checkpoint, text)
    assert count > 100 and not findings, "\n".join(findings)


def same(found, expected):
    """Settings that no weight depends on may be others; so may the time that the training took."""
    (settings, _, (tensors, rng, done, _)), (fixed, _, (tensors_, rng_, done_, _)) = found, expected
    free = {name: getattr(fixed, name) for name in FREE_ON_RESUME}
    return replace(settings, **free) == fixed and (tensors, rng, done) == (tensors_, rng_, done_)


def test_every_byte_of_a_checkpoint_is_covered(run):
    """Each eleventh one flipped in turn: none is taken."""
    checkpoint, _, _ = run
    for name in ("state.json", "SHA256SUMS"):
        file = checkpoint / name
        content = file.read_bytes()
        try:
            for place in range(0, len(content), 11 if name == "SHA256SUMS" else 997):
                file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1:])
                with pytest.raises(ck.CheckpointError, match="is damaged: (state.json|SHA256SUMS)"):
                    ck.load_checkpoint(checkpoint.parent, STEP)
        finally:
            file.write_bytes(content)
    ck.load_checkpoint(checkpoint.parent, STEP)


@pytest.mark.parametrize("old, new", [('"lr": 0.01', '"lr": 0.02'), ('"step": 4', '"step": 3'), ('"seed": 0', '"seed": 1')])
def test_a_flipped_figure_is_found(run, old, new):
    checkpoint, _, resume = run
    text = (checkpoint / "state.json").read_text()
    assert text.count(old) == 1
    try:
        (checkpoint / "state.json").write_text(text.replace(old, new))
        with pytest.raises(ck.CheckpointError, match="state.json was changed after it was saved"):
            resume()
    finally:
        (checkpoint / "state.json").write_text(text)


def test_a_checkpoint_under_another_steps_name(run):
    checkpoint, _, _ = run
    other = checkpoint.with_name("step-00000003")
    shutil.copytree(checkpoint, other)
    try:
        with pytest.raises(ck.CheckpointError, match="state.json is that of step 4"):
            ck.load_checkpoint(checkpoint.parent, 3)
    finally:
        shutil.rmtree(other)


def test_a_checkpoint_of_the_version_before_is_taken_with_a_line(run, tmp_path, capsys):
    checkpoint, _, resume = run
    expected = resume()
    shutil.copytree(checkpoint, tmp_path / "kept")
    capsys.readouterr()
    try:
        kr.as_of_old(checkpoint)
        assert same(resume(), expected)
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and "step 4" in message and "older version" in message
        assert STEP in ck.sound_checkpoints(checkpoint.parent) and capsys.readouterr().err == ""
    finally:
        shutil.rmtree(checkpoint)
        shutil.copytree(tmp_path / "kept", checkpoint)


@pytest.fixture
def own(run, tmp_path):
    """A checkpoint to harm, and its state."""
    path = tmp_path / f"step-{STEP:08d}"
    shutil.copytree(run[0], path)
    return path, json.loads((path / "state.json").read_text())


def refused(path, match):
    with pytest.raises(ck.CheckpointError, match=match) as caught:
        ck.load_checkpoint(path.parent, STEP)
    assert len(str(caught.value)) <= 500


def test_without_its_sums_a_new_checkpoint_is_damaged(own):
    (own[0] / "SHA256SUMS").unlink()
    refused(own[0], "SHA256SUMS is missing")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "model.bin",
                                  "a\0.safetensors", "x" * 300 + ".safetensors", "mod\nel.safetensors"])
def test_file_names_in_a_state_may_not_leave_the_folder(own, name):
    path, state = own
    state["files"][name] = state["files"].pop("model.safetensors")
    kr.write_state(path, state)
    refused(path, "may not leave the folder")


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "SHA256SUMS"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "link", "device"])
def test_what_is_no_file_of_the_folder_is_refused(own, tmp_path, name, kind):
    path, _ = own
    os.replace(path / name, tmp_path / "moved")
    if kind in ("folder", "pipe"):
        (path / name).mkdir() if kind == "folder" else os.mkfifo(path / name)
    else:
        (path / name).symlink_to(tmp_path / "moved" if kind == "link" else "/dev/zero")
    refused(path, f"is damaged: {name} ")


def test_sizes_are_compared_before_anything_is_read(own):
    path, state = own
    with open(path / "model.safetensors", "r+b") as file:
        file.truncate(1 << 40)  # a hole: nobody could read that much here
    refused(path, "model.safetensors has 1099511627776 bytes instead of")


def test_a_file_that_is_not_listed_is_told(own):
    path, _ = own
    save_file({"a": torch.zeros(1)}, path / "more.safetensors")
    refused(path, "'more.safetensors' lies in it")


def test_a_state_too_large_is_not_read(own):
    with open(own[0] / "state.json", "r+b") as file:
        file.truncate(1 << 40)
    refused(own[0], "state.json cannot be read")


def edit_tensors(path, state, group, change):
    tensors = load_file(path / f"{group}.safetensors")
    change(tensors)
    save_file(tensors, path / f"{group}.safetensors")
    state["files"][f"{group}.safetensors"] = {**ck.digest(path / f"{group}.safetensors"), "tensors": len(tensors)}
    kr.write_state(path, state)


def first(tensors, end):
    return next(name for name in tensors if name.endswith(end))


TENSORS = {
    "half of a state": ("optimizer", lambda t: t.pop(first(t, "|exp_avg")), "'exp_avg' of parameter"),
    "no name": ("optimizer", lambda t: t.update(x=torch.zeros(3)), "fits no parameter"),
    "another kind": ("optimizer", lambda t: t.update({first(t, "|exp_avg") + "x": torch.zeros(3)}), "fits no parameter"),
    "another type": ("optimizer", lambda t: t.update({first(t, "|exp_avg"): t[first(t, "|exp_avg")].double()}), "float64"),
    "steps to come": ("optimizer", lambda t: t[first(t, "|step")].fill_(5), "counts other steps"),
    "steps below zero": ("optimizer", lambda t: t[first(t, "|step")].fill_(-1), "counts other steps"),
    "a count with a shape": ("optimizer", lambda t: t.update({first(t, "|step"): torch.ones(1)}), "fits no parameter"),
    "no micro batch": ("carried", lambda t: t.update({"1|1": t["0|1"].clone()}), "'1|1' belongs to no path"),
    "three parts": ("carried", lambda t: t.update({"0|1|2": t["0|1"].clone()}), "belongs to no path"),
    "no block": ("carried", lambda t: t.update({"0|1,9": t["0|1"].clone()}), "belongs to no path"),
    "no number": ("carried", lambda t: t.update({"a|b": t["0|1"].clone()}), "belongs to no path"),
    "falling": ("carried", lambda t: t.update({"0|2,1": t["0|1"].clone()}), "belongs to no path"),
    "other digits": ("carried", lambda t: t.update({"0|01": t["0|1"].clone()}), "belongs to no path"),
    "a wide one": ("carried", lambda t: t.update({"0|1": torch.zeros(2, 17)}), "does not fit this run"),
    "whole numbers": ("carried", lambda t: t.update({"0|1": torch.zeros(2, 16, dtype=torch.int64)}), "does not fit this run"),
    "of the model": ("model", lambda t: t.pop(first(t, "weight")), "lacks tensor"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_do_not_fit_change_nothing(run, own, name):
    (path, state), (_, trainer, resume) = own, run
    resume()
    before = snapshot(trainer)
    group, change, message = TENSORS[name]
    edit_tensors(path, state, group, change)
    tensors, state = ck.load_checkpoint(path.parent, STEP)
    with pytest.raises(ck.CheckpointError, match=message.replace("|", r"\|")) as caught:
        trainer.restore(tensors, state)
    assert snapshot(trainer) == before and len(str(caught.value)) <= 500


def test_a_tensor_that_was_left_out_is_missed(own):
    path, state = own
    tensors = load_file(path / "optimizer.safetensors")
    name = first(tensors, "|step").removesuffix("step")
    save_file({n: t for n, t in tensors.items() if not n.startswith(name)}, path / "optimizer.safetensors")
    state["files"]["optimizer.safetensors"].update(ck.digest(path / "optimizer.safetensors"))
    kr.write_state(path, state)
    refused(path, f"holds {len(tensors) - 3} tensors instead of {len(tensors)}")


@pytest.mark.parametrize("group, more", [("optimizer", False), ("model", False), ("extra", True)])
def test_groups_must_be_those_of_a_run(run, own, group, more):
    (path, _), (_, trainer, resume) = own, run
    resume()
    tensors, state = ck.load_checkpoint(path.parent, STEP)
    tensors.update({group: {}}) if more else tensors.pop(group)
    with pytest.raises(ck.CheckpointError, match="holds the files"):
        trainer.restore(tensors, state)


def test_random_generators_are_checked_before_one_is_set():
    state = rng_state()
    random.random()
    torch.rand(1)
    before = json.dumps(rng_state())
    for part, value in (("torch", "00" * 7), ("numpy", state["numpy"][:3]), ("cuda", 7), ("python", [3, [0.5] * 625, None])):
        with pytest.raises(ValueError, match=f"in its part {part}"):
            set_rng_state({**state, part: value})
        assert json.dumps(rng_state()) == before
