"""train/lm.py in real processes whose output goes wrong, in environments that people have: the run ends as any other."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import kill_and_resume as kr
import pytest

from hbll_seq.training import devices

OPTIONS = ["--max-steps", "4", "--eval-every", "2", "--save-every", "2", "--sample-tokens", "2", "--keep-checkpoints", "9"]
NOWHERE = dict.fromkeys(["MPLCONFIGDIR", "HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"], "/proc/none")


def shell(redirection, options, **environment):
    """A run whose output is redirected by a shell: exit code and what the shell itself got."""
    path = os.pathsep.join(filter(None, [str(kr.ROOT), os.environ.get("PYTHONPATH")]))
    command = ["bash", "-c", f'set -o pipefail; "$0" "$@" {redirection}', sys.executable, str(kr.SCRIPT), *options]
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=240)
    return done.returncode, done.stdout.decode(errors="replace") + done.stderr.decode(errors="replace")


@pytest.fixture(scope="module")
def reference(lm_options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference") / "run"
    assert kr.load_script().main([*lm_options, *OPTIONS, "--output-dir", str(folder)]) == 0
    return folder


def test_an_encoding_without_the_texts_characters_and_a_pipe_that_closes(reference, lm_options, tmp_path):
    """And a compiler that Accelerate was told to use: it is left aside, and that is said."""
    folder = tmp_path / "run"
    options = [*lm_options, *OPTIONS, "--sample-prompt", "\u4e2d\u6587", "--output-dir", str(folder)]
    code, output = shell("| head -1", options, PYTHONIOENCODING="cp1252", ACCELERATE_DYNAMO_BACKEND="eager")
    assert code == 0 and "Traceback" not in output and "ACCELERATE_DYNAMO_BACKEND='eager' is left aside" in output
    assert kr.losses_of(folder) == kr.losses_of(reference)
    assert (folder / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
    assert "\\u4e2d\\u6587" in (folder / "metrics.json").read_text()


@pytest.mark.parametrize("redirection, environment, resume", [
    ("> /dev/full 2>&1", {}, False),
    pytest.param(">&- 2>&-", NOWHERE, True, marks=pytest.mark.slow),
    pytest.param("> /dev/full 2>&1", NOWHERE, True, marks=pytest.mark.slow),
    pytest.param(">&- 2>&-", {}, False, marks=pytest.mark.slow),
])  # fmt: skip
def test_output_that_cannot_be_written(reference, lm_options, tmp_path, redirection, environment, resume):
    """A full disk; closed descriptors, and no folder in which Matplotlib or anyone may keep a file: a run, and a resume."""
    folder = tmp_path / "run"
    if resume:
        shutil.copytree(reference, folder)
    options = ["--resume", "2"] if resume else [*lm_options, *OPTIONS]
    code, _ = shell(redirection, [*options, "--output-dir", str(folder)], **environment)
    assert code == 0 and kr.differences(reference, folder) == [] and (folder / "training_curve.png").exists()


def test_help_and_settings_into_a_pipe_that_closes(monkeypatch):
    for option in ("--help", "--dry-run"):
        read, write = os.pipe()
        os.close(read)
        process = kr.start([option], (sys.executable,), stdout=write, stderr=subprocess.PIPE)
        os.close(write)
        _, errors = process.communicate(timeout=120)
        assert (process.returncode, errors) == (0, b"")


@pytest.mark.parametrize(
    "variables, fragments",
    [
        ({"LOCAL_WORLD_SIZE": "0"}, ["LOCAL_WORLD_SIZE='0'", "unset it"]),
        ({"LOCAL_WORLD_SIZE": "two"}, ["LOCAL_WORLD_SIZE='two'", "--threads"]),
        ({"OMP_NUM_THREADS": "two"}, ["OMP_NUM_THREADS='two'", "--threads"]),
        ({"ACCELERATE_USE_CPU": "maybe"}, ["cannot start in this environment", "maybe", "unset it"]),
        ({"ACCELERATE_USE_CPU": "true", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, ["cannot start in this environment", "RANK"]),
    ],
)
def test_half_a_launchers_environment(lm_options, tmp_path, monkeypatch, any_precision, capsys, variables, fragments):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    options = [*lm_options, *OPTIONS, "--threads", "none", "--output-dir", str(tmp_path / "run")]
    message = kr.fails(options, capsys, *fragments)
    assert len(message.splitlines()[-1]) <= 500 and not (tmp_path / "run").exists()


def test_the_environment_says_how_many_threads(lm_options, tmp_path, monkeypatch, capsys):
    """A launcher's own OMP_NUM_THREADS=1 does not count; --threads counts before all."""
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "ACCELERATE_DYNAMO_MODE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda _: range(12))
    assert devices.default_threads() == 12
    for value, threads in (("1", 1), ("3", 3), ("4,2", 4), ("", 12)):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert devices.default_threads() == threads
    for launcher in ("ACCELERATE_DYNAMO_MODE", "TORCHELASTIC_RUN_ID"):
        with monkeypatch.context() as launched:
            launched.setenv(launcher, "x")
            launched.setenv("LOCAL_WORLD_SIZE", "2")
            for value, threads in (("1", 6), ("3", 3)):
                launched.setenv("OMP_NUM_THREADS", value)
                assert devices.default_threads() == threads
    for value in ("0", "-1", "x", "9" * 40):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        with pytest.raises(ValueError, match="from 1 to 1024; unset it, or give --threads"):
            devices.default_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    for more, threads in ((["none"], 3), (["1"], 1)):
        options = [*lm_options, *OPTIONS, "--threads", *more, "--max-steps", "1", "--overwrite"]
        assert kr.load_script().main([*options, "--output-dir", str(tmp_path / "run")]) == 0
        assert f", {threads} threads)" in capsys.readouterr().err


@pytest.mark.parametrize("backend", ["inductor", "nonsense"])
def test_a_compiler_is_left_aside(reference, lm_options, tmp_path, monkeypatch, any_precision, capsys, backend):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
    assert kr.load_script().main([*lm_options, *OPTIONS, "--output-dir", str(tmp_path / "run")]) == 0
    assert f"ACCELERATE_DYNAMO_BACKEND='{backend}' is left aside" in capsys.readouterr().err
    assert kr.differences(reference, tmp_path / "run") == []


def test_names_that_are_no_text_and_formulas_in_a_figure(tmp_path, capsys):
    from hbll_seq.training import plots

    split = os.fsdecode(b"caf\xe9 $\\frac{1$ \xe4\xb8\xad")
    row = {"depth": 1, "perplexity": None, "name": "_$^", "loss": None}
    rows = [{"step": 1, "ce": None, "lr": 0.1}, {"step": 2, "ce": 3.0}]
    plots.plot_training_curve(rows, [{"step": 1, "validation": [row]}], tmp_path / "a.png")
    plots.plot_perplexity_by_depth({split: [row, {"depth": 2, "perplexity": float("inf")}]}, tmp_path / "b.png")
    plots.plot_training_curve([], [], tmp_path / "d.png")
    assert capsys.readouterr().err == "" and sorted(os.listdir(tmp_path)) == ["a.png", "b.png", "d.png"]


def test_a_figure_that_cannot_be_drawn_is_left_out_and_told(tmp_path, capsys):
    from hbll_seq.training import plots

    plots.plot_perplexity_by_depth({"test": [{"depth": "x"}, {"depth": 1}]}, tmp_path / "b.png")
    assert "b.png is not drawn: TypeError" in capsys.readouterr().err and not os.listdir(tmp_path)
    with pytest.raises(OSError):
        plots.plot_perplexity_by_depth({"test": []}, Path("/proc/none/b.png"))


def test_a_service_out_of_reach_ends_no_run(reference, lm_options, tmp_path, monkeypatch, capsys):
    from accelerate import tracking

    class Unreachable(tracking.GeneralTracker):
        name, requires_logging_directory = "tensorboard", False
        tracker = main_process_only = None
        starts = True

        def __init__(self, run_name, **_):
            super().__init__()

        def store_init_configuration(self, values):
            if not self.starts:
                raise RuntimeError("no api key\nat all")

        def log(self, values, step=None, **_):
            raise ConnectionError("no route to host")

        finish = log

    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType.TENSORBOARD])
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Unreachable)
    options = [*lm_options, *OPTIONS, "--log-with", "tensorboard", "--output-dir"]
    assert kr.load_script().main([*options, str(tmp_path / "run")]) == 0
    message = capsys.readouterr().err
    assert message.count("tracker 'tensorboard' failed at step 1") == message.count("no route to host") == 1
    assert kr.differences(reference, tmp_path / "run") == []
    Unreachable.starts = False  # at the start somebody is there to set it right
    kr.fails([*options, str(tmp_path / "other")], capsys, "cannot be started (no api key at all)", "--log-with out")
