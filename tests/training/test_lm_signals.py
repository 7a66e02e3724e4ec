"""Signals at any time: saved where there is something to save, 128 + the number, no traceback, and --resume goes on."""

import os
import resource
import signal
import sys
import time
from pathlib import Path

import kill_and_resume as kr
import pytest

from hbll_seq.training import checkpoint as ck
from hbll_seq.training.signals import StopNow, StopSignal

pytestmark = pytest.mark.usefixtures("blank_figures")

lm, lm_run = kr.load_script(), kr.load_run()
ALL = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]


@pytest.fixture(scope="module")
def short(lm_options):
    return [*lm_options, "--max-steps", "6", "--eval-every", "3", "--save-every", "5", "--sample-tokens", "0"]


@pytest.fixture(scope="module")
def unbroken(short, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    assert lm.main([*short, "--output-dir", str(folder)]) == 0
    return folder


def sends(number, original=None):
    """A function that signals this process and then does what the original does."""

    def function(*arguments, **keywords):
        os.kill(os.getpid(), number)
        return original(*arguments, **keywords) if original else None

    return function


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_closed_terminal_and_slurm_save_the_run(short, unbroken, tmp_path, monkeypatch, capsys, number):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        kr.at_step(patch, 2, sends(number))
        assert lm.main([*short, "--output-dir", str(folder)]) == 128 + number
    said = capsys.readouterr().err
    assert "stopped after step 2, saved" in said and "outside of training" not in said  # told once how it ended
    assert ck.list_checkpoints(folder / "checkpoints") == [0, 2]
    assert lm.main(["--resume", "--output-dir", str(folder)]) == 0 and kr.differences(unbroken, folder) == []


def test_a_save_that_fails_after_a_signal_is_a_failure(short, unbroken, tmp_path, monkeypatch, capsys):
    """A limit on the size of files stands in for the full disk: of two answers, the failure is the one that counts."""
    folder, before = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)

    def signal_on_a_full_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
        os.kill(os.getpid(), signal.SIGTERM)

    try:
        with monkeypatch.context() as patch:
            kr.at_step(patch, 2, signal_on_a_full_disk)
            kr.fails([*short, "--output-dir", str(folder)], capsys, "error: ", "--resume", code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert lm.main(["--resume", "--output-dir", str(folder)]) == 0 and kr.differences(unbroken, folder) == []


@pytest.mark.parametrize("number", ALL)
@pytest.mark.parametrize("where", ["resolve", "make_accelerator", "data", "HBLLForCausalLM"])
def test_before_training_nothing_is_left_behind(short, unbroken, tmp_path, monkeypatch, capsys, number, where):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        module = lm_run if where == "HBLLForCausalLM" else lm
        patch.setattr(module, where, sends(number, getattr(module, where)))
        assert lm.main([*short, "--output-dir", str(folder)]) == 128 + number
    assert f"stopped by signal {int(number)} outside of training" in capsys.readouterr().err and not folder.exists()


@pytest.mark.parametrize("number, where", list(zip(ALL, ["evaluation", "export", "plot_training_curve", "end_trackers"])))
def test_at_the_end_of_a_run(short, unbroken, tmp_path, monkeypatch, capsys, number, where):
    folder = tmp_path / "run"
    module = lm if where == "end_trackers" else lm_run
    module = sys.modules["hbll_seq.training.export"] if where == "plot_training_curve" else module
    original = getattr(module, where)

    def late(*arguments, **keywords):
        if where != "evaluation" or arguments[4] == 6:
            os.kill(os.getpid(), number)
        return original(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(module, where, late)
        assert lm.main([*short, "--output-dir", str(folder)]) == 128 + number
    assert "Traceback" not in capsys.readouterr().err
    assert lm.main(["--resume", "--output-dir", str(folder)]) == 0 and kr.differences(unbroken, folder) == []


def test_while_a_run_is_taken_up_again(short, unbroken, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        kr.at_step(patch, 2, sends(signal.SIGTERM))
        assert lm.main([*short, "--output-dir", str(folder)]) == 143
    for where in ("resume_run", "prepare_folder"):
        with monkeypatch.context() as patch:
            module = lm_run if where == "prepare_folder" else lm
            patch.setattr(module, where, sends(signal.SIGUSR1, getattr(module, where)))
            assert lm.main(["--resume", "--output-dir", str(folder)]) == 138
    assert lm.main(["--resume", "--output-dir", str(folder)]) == 0 and kr.differences(unbroken, folder) == []


def test_an_interrupt_that_a_library_swallows_still_stops(short, tmp_path, monkeypatch):
    def swallow(*_):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException:
            pass
        return None

    with pytest.raises(StopNow), StopSignal() as stop, stop.interruptible():
        swallow()
    with StopSignal() as stop, stop.interruptible():
        with stop.interruptible(False):
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.received == signal.SIGTERM
        stop.received = 0


def test_an_ignored_hangup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received == 0 and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def read_until(process, mark):
    text = b""
    until = time.monotonic() + 60
    while mark not in text and time.monotonic() < until and (line := process.stderr.readline()):
        text += line
    assert mark in text, text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_while_the_program_imports(number):
    process = kr.start(["--dry-run"], (sys.executable, "-X", "importtime"), stderr=-1, stdout=-3)
    try:
        read_until(process, b" numpy")  # one of thousands of lines, on the way to torch
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number and b"Traceback" not in errors


#: train/lm.py under nohup, whose second checkpoint takes its time.
SLOW_SAVE = r"""
import os, signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_IGN)
sys.path.insert(0, {tests!r})
import kill_and_resume as kr
from hbll_seq.training import checkpoint as ck
lm, lm_run, original = kr.load_script(), kr.load_run(), ck.atomic_write
def slow(path, data):
    if path.parent.name.startswith(".aside-") and path.parent.name != ".aside-0":
        sys.stderr.write("\nsaving\n")
        time.sleep(60)
    original(path, data)
ck.atomic_write = slow
step = lm_run.Trainer._step
def stopped(self):
    os.kill(os.getpid(), signal.SIGHUP)  # ignored
    if self.done == 3:
        os.kill(os.getpid(), signal.SIGUSR1)
    return step(self)
lm_run.Trainer._step = stopped
sys.exit(lm.main(sys.argv[1:]))
"""


def test_a_second_signal_while_saving_ends_with_the_first_ones_code(short, unbroken, tmp_path):
    folder, script = tmp_path / "run", tmp_path / "slow.py"
    script.write_text(SLOW_SAVE.format(tests=str(Path(__file__).parents[1])))
    process = kr.start([*short, "--output-dir", str(folder)], script=script, stderr=-1, stdout=-3)
    try:
        read_until(process, b"\nsaving")
        time.sleep(0.7)  # longer than a launcher's echo
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGUSR1 and b"Traceback" not in errors and b"second signal" in errors
    assert ck.sound_checkpoints(folder / "checkpoints") == [0] and list(folder.rglob(".aside-*"))
    assert lm.main(["--resume", "--output-dir", str(folder)]) == 0 and kr.differences(unbroken, folder) == []
    assert not list(folder.rglob(".*"))  # what lay half written is swept
