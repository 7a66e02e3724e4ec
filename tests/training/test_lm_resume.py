"""train/lm.py: a run that was stopped, killed or damaged goes on as if nothing had happened, or says why not."""

import json
import math
import os
import random
import resource
import signal
import sys
import time

import kill_and_resume as kr
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.objectives.local import LocalObjective
from hbll_seq.training import checkpoint as ck
from hbll_seq.training.json_lines import JsonLines
from hbll_seq.training.run_record import EVALUATIONS, RESULTS
from hbll_seq.training.signals import StopSignal
from hbll_seq.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("blank_figures")

lm, lm_run = kr.load_script(), kr.load_run()


# -------------------------------------------------------------------------------- broken and resumed


@pytest.fixture(scope="module")
def killed(lm_options, tmp_path_factory):
    """Three runs killed with SIGKILL, at the same time to save seconds."""
    folders = [tmp_path_factory.mktemp("killed") / "run" for _ in range(3)]
    rng = random.Random(0)
    points = [rng.randrange(1, 45) for _ in folders]
    quiet = {"stdout": -3, "stderr": -3}
    processes = [kr.start([*lm_options, "--output-dir", str(folder)], **quiet) for folder in folders]
    waiting = list(zip(processes, folders, points))
    until = time.monotonic() + 120
    while waiting and time.monotonic() < until:
        for entry in list(waiting):
            process, folder, point = entry
            if len(kr.lines(folder)) >= point or process.poll() is not None:
                process.kill()
                waiting.remove(entry)
        time.sleep(0.002)
    codes = []
    for process in processes:
        process.kill()
        codes.append(process.wait())
    assert codes == [-signal.SIGKILL] * 3
    return folders


@pytest.mark.parametrize("point", range(3))
def test_killed_and_resumed_equals_the_unbroken_run(killed, whole_run, lm_options, point):
    folder = killed[point]
    assert 0 < len(kr.lines(folder)) < 60 and not (folder / "metrics.json").exists()
    assert lm.main([*lm_options, "--resume", "--output-dir", str(folder)]) == 0
    assert kr.differences(whole_run, folder) == []


@pytest.mark.parametrize(
    "number, code, step", [(signal.SIGTERM, 143, 13), (signal.SIGINT, 130, 20), (signal.SIGTERM, 143, 60)]
)
def test_signal_saves_and_resume_is_exact(whole_run, lm_options, tmp_path, monkeypatch, capsys, number, code, step):
    folder = tmp_path / "run"
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        kr.at_step(patch, step, lambda: os.kill(os.getpid(), number))
        assert lm.main([*lm_options, "--output-dir", str(folder)]) == code
    assert signal.getsignal(number) is handler
    assert kr.steps_of(folder)[-1] == step and ck.list_checkpoints(folder / "checkpoints")[-1] == step
    assert f"stopped after step {step}" in capsys.readouterr().err and not (folder / "metrics.json").exists()
    assert lm.main(["--resume", "--output-dir", str(folder)]) == 0
    assert kr.differences(whole_run, folder) == []


def test_what_secants_have_learned_is_part_of_a_checkpoint(lm_options, tmp_path, monkeypatch):
    options = [*lm_options, "--linearization", "low_rank", "--max-steps", "30", "--eval-every", "0"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert lm.main([*options, "--output-dir", str(whole)]) == 0
    with monkeypatch.context() as patch:
        kr.at_step(patch, 23, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert lm.main([*options, "--output-dir", str(broken)]) == 143
    stored = load_file(broken / "checkpoints" / "step-00000023" / "model.safetensors")
    assert stored["secants.n_steps"] == 23 and stored["secants.forward_left"].any() and stored["secants.backward_left"].any()
    assert lm.main(["--resume", "--output-dir", str(broken)]) == 0
    assert kr.differences(whole, broken) == []
    assert not any("secants" in name for name in load_file(whole / "model.safetensors"))  # training alone needs them


def test_auxiliary_exits_are_part_of_a_checkpoint_and_not_of_the_model(lm_options, tmp_path, monkeypatch):
    options = [*lm_options, "--forward", "6", "--backward", "0", "--chunk-size", "1", "--linearization", "zero",
               "--auxiliary-exits", "0.5", "--auxiliary-blocks", "1", "--max-steps", "8", "--eval-every", "0"]  # fmt: skip
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert lm.main([*options, "--output-dir", str(whole)]) == 0
    with monkeypatch.context() as patch:
        kr.at_step(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert lm.main([*options, "--output-dir", str(broken)]) == 143
    files = [load_file(broken / "checkpoints" / "step-00000005" / f"{name}.safetensors") for name in ("model", "optimizer")]
    for name in ("auxiliary.up", "auxiliary.blocks.0.mlp_out.weight"):
        assert files[0][name].any() and files[1][f"{name}|exp_avg"].any()
    assert lm.main(["--resume", "--output-dir", str(broken)]) == 0
    assert kr.differences(whole, broken) == []
    assert all(row["ce_auxiliary"] > 0 for row in kr.lines(whole))
    assert not any("auxiliary" in name for name in load_file(whole / "model.safetensors"))


def test_signal_during_an_evaluation_does_not_wait_for_its_end(whole_run, lm_options, tmp_path, monkeypatch):
    folder = tmp_path / "run"

    def long_evaluation(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    began = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(lm_run, "evaluate_paths", long_evaluation)
        assert lm.main([*lm_options, "--output-dir", str(folder)]) == 143
    assert time.monotonic() - began < 30 and ck.list_checkpoints(folder / "checkpoints")[-1] == 20
    assert lm.main(["--resume", "--output-dir", str(folder)]) == 0  # and the evaluation is made up for
    assert kr.differences(whole_run, folder) == []


def test_second_signal_ends_the_process(monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # a launcher's echo
        assert stop.received == signal.SIGTERM and codes == []
        monkeypatch.setattr("hbll_seq.training.signals.ECHO_SECONDS", -1.0)
        os.kill(os.getpid(), signal.SIGINT)
    assert codes == [143]  # the first one's: it is the reason for the end


def test_random_generators_go_on_where_they_were(lm_options, tmp_path, monkeypatch):
    """Nothing draws from them today; a cell that did must not break the resume."""
    original, draws = Trainer._step, {}

    def draw(self):
        draws[self.done] = (torch.rand(1).item(), random.random(), np.random.rand())
        return original(self)

    monkeypatch.setattr(Trainer, "_step", draw)
    options = ["--max-steps", "16", "--save-every", "6", "--eval-every", "6", "--keep-checkpoints", "9"]
    assert lm.main([*lm_options, *options, "--output-dir", str(tmp_path / "r")]) == 0
    unbroken = dict(draws)
    draws.clear()
    assert len(set(unbroken.values())) == 16 and lm.main(["--resume", "6", "--output-dir", str(tmp_path / "r")]) == 0
    assert draws == {step: unbroken[step] for step in range(6, 16)}


def test_every_micro_batch_has_its_own_text_and_noise(lm_options, tmp_path, monkeypatch):
    seen, original = [], LocalObjective.forward

    def spy(self, inputs, labels=None, step=0):
        seen.append((step, inputs))
        return original(self, inputs, labels, step)

    monkeypatch.setattr(LocalObjective, "forward", spy)
    assert lm.main([*lm_options, "--grad-accum", "3", "--max-steps", "4", "--output-dir", str(tmp_path / "run")]) == 0
    windows = lm.data(lm.resume_run({"output_dir": str(tmp_path / "run")}, None)[0]).train
    assert [step for step, _ in seen] == list(range(12))
    assert all(torch.equal(inputs, windows.batch(step, 2, 0)) for step, inputs in seen)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the launcher's death is noticed on Linux only")
def test_sigterm_to_accelerate_launch_saves(lm_options, tmp_path):
    folder = tmp_path / "run"
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1",
                "--mixed_precision", "no", "--dynamo_backend", "no")
    process = kr.start([*lm_options, "--max-steps", "5000", "--save-every", "0", "--output-dir", str(folder)], launcher,
                       stdout=-3, stderr=-3)
    try:
        kr.wait_for_step(process, folder, 3)
        process.terminate()
        process.wait()
        until = time.monotonic() + 30
        while ck.list_checkpoints(folder / "checkpoints")[-1] == 0 and time.monotonic() < until:
            time.sleep(0.02)
    finally:
        process.kill()
    assert ck.list_checkpoints(folder / "checkpoints")[-1] == kr.steps_of(folder)[-1] < 5000


def test_resume_from_an_older_checkpoint(whole_run, lm_options, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    assert lm.main([*lm_options, "--keep-checkpoints", "9", "--save-every", "25", "--output-dir", str(folder)]) == 0
    assert ck.list_checkpoints(folder / "checkpoints") == [0, 25, 50, 60]
    finished = []
    kr.at_step(monkeypatch, 26, lambda: finished.extend(name for name in RESULTS if (folder / name).exists()))
    capsys.readouterr()
    assert lm.main(["--resume", "25", "--save-every", "30", "--output-dir", str(folder)]) == 0  # a free setting changes
    assert finished == []  # while it runs it does not pass for a finished run
    message = capsys.readouterr().err
    assert "to go on from step 25, removed from" in message and "the checkpoints of steps 50, 60" in message
    assert "35 lines of metrics.jsonl" in message and "2 lines of evaluations.jsonl" in message
    assert "metrics.json," in message and "model.safetensors" in message
    assert ck.list_checkpoints(folder / "checkpoints") == [0, 25, 30, 60]
    assert kr.differences(whole_run, folder) == []


def test_a_stopped_run_is_no_model_yet(stopped_run):
    with pytest.raises(ValueError, match="holds a run that is not finished.*--resume --output-dir"):
        HBLLForCausalLM.from_pretrained(stopped_run)


def test_finished_run_has_nothing_left(whole_run, capsys):
    before = (whole_run / "metrics.json").stat().st_mtime_ns
    assert lm.main(["--resume", "--output-dir", str(whole_run)]) == 0
    assert "finished" in capsys.readouterr().err and (whole_run / "metrics.json").stat().st_mtime_ns == before


# -------------------------------------------------------------------------------- runs that fail


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_nan_stops_and_keeps_the_last_good_checkpoint(whole_run, lm_options, tmp_path, monkeypatch, capsys, poison):
    folder = tmp_path / "run"
    original = LocalObjective.forward

    def poisoned(self, inputs, labels=None, step=0):
        output = original(self, inputs, labels, step)
        if step == 12:
            bad = output.loss * math.nan if poison == "loss" else output.loss
            if poison == "gradient":
                next(self.parameters()).register_hook(lambda gradient: gradient * math.inf)
            return output._replace(loss=bad)
        return output

    with monkeypatch.context() as patch:
        patch.setattr(LocalObjective, "forward", poisoned)
        kr.fails([*lm_options, "--output-dir", str(folder)], capsys, "at step 13", "last good", "--lr", code=1)
    assert kr.steps_of(folder)[-1] == 12 and ck.sound_checkpoints(folder / "checkpoints") == [5, 10]
    assert lm.main(["--resume", "--output-dir", str(folder)]) == 0
    assert kr.differences(whole_run, folder) == []


@pytest.mark.parametrize("when", ["start", "middle", "end"])
def test_full_disk_leaves_nothing_half_written(whole_run, lm_options, tmp_path, monkeypatch, capsys, when):
    """A limit on the size of files stands in for the full disk: the writes fail inside the kernel just so."""
    folder = tmp_path / "run"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, before[1]))

    with monkeypatch.context() as patch:
        if when == "end":
            original = lm_run.export
            patch.setattr(lm_run, "export", lambda *arguments: (fill(), original(*arguments)))
        else:
            kr.at_step(patch, 12, fill) if when == "middle" else patch.setattr(
                lm_run, "describe", lambda *arguments: fill() or "full")
        try:
            remedy = "--overwrite" if when == "start" else "--resume"
            kr.fails([*lm_options, "--output-dir", str(folder)], capsys, remedy, code=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    steps = ck.list_checkpoints(folder / "checkpoints")
    assert steps == {"start": [], "middle": [5, 10], "end": [55, 60]}[when]
    assert steps == ck.sound_checkpoints(folder / "checkpoints")
    assert not list(folder.rglob(".*")) and not (folder / "model.safetensors").exists()
    if steps:
        assert lm.main(["--resume", "--output-dir", str(folder)]) == 0
        assert kr.differences(whole_run, folder) == []


@pytest.mark.parametrize("step", [20, 60])
def test_evaluation_that_cannot_be_written(whole_run, lm_options, tmp_path, monkeypatch, capsys, step):
    folder, original = tmp_path / "run", JsonLines.append

    def full(self, row):
        if self.path.name == EVALUATIONS and row["step"] == step:
            raise OSError(28, "No space left on device")
        original(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(JsonLines, "append", full)
        options = [*lm_options, "--output-dir", str(folder)]
        kr.fails(options, capsys, "evaluations.jsonl cannot be written", "No space left", "--resume", code=1)
    assert ck.list_checkpoints(folder / "checkpoints")[-1] == step  # saved first, so that no step is lost
    assert lm.main(["--resume", "--output-dir", str(folder)]) == 0  # and the evaluation is made up for
    assert kr.differences(whole_run, folder) == []


# -------------------------------------------------------------------------------- resume that cannot be


def test_nothing_to_resume(tmp_path, capsys):
    options = ["--resume", "--output-dir", str(tmp_path / "no")]
    kr.fails(options, capsys, "nothing to resume", "no/checkpoints", "--output-dir")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    "options, fragments",
    [
        (["--n-embd", "32"], ["n_embd=32 (there 16)"]),
        (["--lr", "0.02", "--seed", "4"], ["lr=0.02 (there 0.01)", "seed=4 (there 0)"]),
        (["--max-steps", "70"], ["max_steps=70 (there 60)"]),
        (["--epochs", "1"], ["max_steps=None (there 60)", "epochs=1.0"]),
        (["--objective", "backprop"], ["objective='backprop' (there 'sweeps')"]),
        (["--preset", "small"], ["preset='small'", "'debug'"]),
        (["--resume", "11"], ["resume=11", "10, 12"]),
        (["--overwrite"], ["--overwrite", "exclude"]),
    ],
)
def test_resume_with_other_settings(stopped_run, capsys, options, fragments):
    before = sorted((path, path.stat().st_mtime_ns) for path in stopped_run.rglob("*"))
    kr.fails(["--resume", "--output-dir", str(stopped_run), *options], capsys, *fragments)
    assert sorted((path, path.stat().st_mtime_ns) for path in stopped_run.rglob("*")) == before


def test_resume_with_changed_text(stopped_run, capsys):
    _edit_state(stopped_run, data="another text")
    options = ["--resume", "--output-dir", str(stopped_run)]
    kr.fails(options, capsys, "cannot resume: data is", "another text", "same text")


def _edit_state(folder, **values):
    path = folder / "checkpoints" / "step-00000012"
    kr.write_state(path, {**json.loads((path / "state.json").read_text()), **values})


def test_resume_with_another_precision(stopped_run, whole_run, any_precision, capsys):
    options = ["--resume", "--output-dir", str(stopped_run)]
    fragments = ["cannot resume", "precision is 'bfloat16' and was 'float32'", "step 12", "--precision float32"]
    kr.fails([*options, "--precision", "bfloat16"], capsys, *fragments)
    any_precision()
    assert lm.main([*options, "--precision", "float32"]) == 0  # what "auto" had chosen
    assert kr.differences(whole_run, stopped_run) == []


def test_resume_where_auto_chooses_another_precision(stopped_run, capsys):
    _edit_state(stopped_run, precision="bfloat16")  # as from a GPU
    before = kr.losses_of(stopped_run)
    options = ["--resume", "--output-dir", str(stopped_run)]
    kr.fails(options, capsys, "precision is 'float32' and was 'bfloat16'", "--precision bfloat16")
    assert kr.losses_of(stopped_run) == before


def test_resume_on_another_machine_warns(stopped_run, capsys):
    capsys.readouterr()
    _edit_state(stopped_run, device="cuda", threads=7)
    assert lm.main(["--resume", "--output-dir", str(stopped_run)]) == 0
    message = capsys.readouterr().err
    assert "warning: device is 'cpu' and was 'cuda'" in message and "warning: threads is 1 and was 7" in message
    assert message.count("not bit for bit") == 2


@pytest.mark.parametrize("harm", ["half", "nan", "other"])
def test_resume_of_a_damaged_checkpoint_names_the_older_one(stopped_run, whole_run, capsys, harm):
    path = stopped_run / "checkpoints" / "step-00000012"
    file, state = path / "model.safetensors", json.loads((path / "state.json").read_text())
    if harm == "half":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        fragments = ["step-00000012 is damaged: model.safetensors has", "--resume 10"]
    else:
        tensors = load_file(file)
        name = next(name for name in tensors if tensors[name].ndim == 2)
        tensors[name] = torch.full_like(tensors[name], math.nan) if harm == "nan" else tensors[name][:, :8].contiguous()
        save_file(tensors, file)
        state["files"]["model.safetensors"] = ck.digest(file)
        kr.write_state(path, state)
        fragments = ["NaN or infinity", "--resume 10"] if harm == "nan" else [name, "of another configuration"]
    kr.fails(["--resume", "--output-dir", str(stopped_run)], capsys, *fragments)
    assert lm.main(["--resume", "10", "--output-dir", str(stopped_run)]) == 0
    assert kr.differences(whole_run, stopped_run) == []


