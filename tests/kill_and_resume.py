"""Kill a training run with SIGKILL at random steps, resume it, and compare with the unbroken run, bit for bit.

By hand, from the repository: ``python tests/kill_and_resume.py --points 5 [options of train/lm.py]``
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from forked import Forked

from hbll_seq.utils.integrity import SUMS_NAME, format_sums

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "train" / "lm.py"
#: what may differ between two runs: times.
TIMES = ("tokens_per_s", "seconds")


@functools.cache
def load_script():
    """The module whose ``main`` train/lm.py calls, for runs in this process."""
    return importlib.import_module("hbll_seq.training.language_model")


def load_run():
    """The module that does what the command line says, for tests that put something of their own into it."""
    return importlib.import_module("hbll_seq.training.language_model_run")


def environment_of_scripts() -> dict[str, str]:
    """With the library of this tree."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


def start(options: list[str], launcher: tuple[str, ...] = (), script: Path = SCRIPT,
          **keywords) -> subprocess.Popen | Forked:
    """train/lm.py, or another script, in a process of its own: a fork with everything imported, or of a launcher."""
    if not launcher:
        return Forked([str(script), *options], environment_of_scripts(), **keywords)
    return subprocess.Popen([*launcher, str(script), *options], env=environment_of_scripts(), **keywords)


def lines(folder: Path) -> list[dict]:
    """Complete lines of the run's metrics.jsonl."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []


def wait_for_step(process: subprocess.Popen, folder: Path, step: int, timeout: float = 120.0) -> None:
    """Return once ``step`` steps are logged; raises when the run ends or stalls before."""
    until = time.monotonic() + timeout
    while len(lines(folder)) < step:
        if process.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"the run ended ({process.poll()}) or stalled before step {step}")
        time.sleep(0.002)


def kill_at(step: int, options: list[str], folder: Path, delay: float = 0.0) -> int:
    """Start a run, kill it ``delay`` seconds after ``step`` was logged; returns the number of lines it left."""
    process = start([*options, "--output-dir", str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_step(process, folder, step)
        time.sleep(delay)
    finally:
        process.kill()
        process.wait()
    return len(lines(folder))


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two finished runs, times left out."""
    found = []
    if (one / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes():
        found.append("model.safetensors")
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        rows = [
            [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in text.splitlines()]
            for text in ((run / name).read_text() for run in (one, other))
        ]
        if len(rows[0]) != len(rows[1]):
            found.append(f"{name}: {len(rows[0])} and {len(rows[1])} lines")
        found += [f"{name}, step {a['step']}" for a, b in zip(*rows) if a != b]
    return found


def steps_of(folder: Path) -> list[int]:
    """Steps of the lines."""
    return [row["step"] for row in lines(folder)]


def losses_of(folder: Path) -> list[float]:
    """Losses of the lines."""
    return [row["loss"] for row in lines(folder)]


def write_state(checkpoint: Path, state: dict | str) -> None:
    """Put another state.json into a checkpoint, with sums that fit it: what is tested is what the sums do not find."""
    path = checkpoint / "state.json"
    path.write_text(state if isinstance(state, str) else json.dumps(state))
    write_sums(checkpoint)


def write_sums(checkpoint: Path) -> None:
    """Give a checkpoint the sums of what it holds now."""
    names = [path.name for path in checkpoint.iterdir() if path.name != SUMS_NAME]
    (checkpoint / SUMS_NAME).write_text(format_sums(checkpoint, names))


def as_of_old(checkpoint):
    """What the version before the sums wrote."""
    state = json.loads((checkpoint / "state.json").read_text())
    state["format"] = 1
    for entry in state["files"].values():
        del entry["tensors"]
    (checkpoint / "state.json").write_text(json.dumps(state, indent=1) + "\n")
    (checkpoint / "SHA256SUMS").unlink()


def at_step(monkeypatch, step: int, action) -> None:
    """Call ``action`` while optimizer step ``step`` (counted from 1) is being done."""
    from hbll_seq.training.trainer import Trainer

    original = Trainer._step

    def patched(self):
        if self.done + 1 == step:
            action()
        return original(self)

    monkeypatch.setattr(Trainer, "_step", patched)


def fails(options: list[str], capsys, *fragments: str, code: int = 2) -> str:
    """The run ends with ``code`` and one message that holds every fragment."""
    capsys.readouterr()
    assert load_script().main(options) == code
    message = capsys.readouterr().err
    assert "error: " in message and "Traceback" not in message
    for fragment in fragments:
        assert fragment in message, message
    return message


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=5)
    parser.add_argument("--kill-seed", type=int, default=None)
    arguments, rest = parser.parse_known_args(argv)
    options = ["--preset", "debug", "--max-steps", "60", "--log-every", "1", *rest]
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "whole"
        if start([*options, "--output-dir", str(whole)]).wait():
            return 1
        rng, failures, total = random.Random(arguments.kill_seed), 0, len(lines(whole))
        for point in range(arguments.points):
            broken = Path(scratch) / str(point)
            logged = kill_at(rng.randrange(1, total - 2), options, broken, delay=rng.random() * 0.05)
            saved = sorted(path.name for path in (broken / "checkpoints").glob("step-*"))[-1]
            code = start(["--resume", "--output-dir", str(broken)], stdout=subprocess.DEVNULL,
                         stderr=subprocess.DEVNULL).wait()
            found = differences(whole, broken) if code == 0 else [f"exit code {code}"]
            failures += bool(found)
            outcome = found or "equal, bit for bit"
            print(f"killed after step {logged} of {total}, resumed from {saved}: {outcome}", flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
