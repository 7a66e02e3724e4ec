"""train/lm.py in two processes (DistributedDataParallel over gloo): the same run as one process with their batches."""

import json
import subprocess
import sys
from pathlib import Path

import kill_and_resume as kr
import pytest
from forked import pair

from hbll_seq.training import checkpoint as ck

pytestmark = pytest.mark.usefixtures("blank_figures")

STEPS = 6


#: train/lm.py, then exit code 70 while a thread of the process group is left: it may abort an interpreter that ends.
THREADS_END = r"""
import contextlib
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import kill_and_resume as kr
def threads():
    names = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it has just ended
            names.append(path.read_text().strip())
    return [name for name in names if "gloo" in name]
def training(*arguments, **options):
    train(*arguments, **options)
    sys.stderr.write(f"threads while training: {{len(threads()) > 0}}\n")  # in one piece: two processes write
script = kr.load_script()
train, script.training = script.training, training
code, left = script.main(sys.argv[1:]), threads()
sys.stderr.write(f"threads left: {{left}}\n")
sys.exit(70 if left else code)
"""


#: a process group that is left while a thread of it drops a tensor, which takes a second and then the GIL; argument: how the
#: body ends.
PENDING = r"""
import gc, os, sys, threading, time
import torch, torch.distributed.nn
from hbll_seq.training.devices import leaving_processes
class Slow:
    def __del__(self):
        print("dropped by", "main" if threading.current_thread() is threading.main_thread() else "gloo", end=", ")
        time.sleep(1)
def raise_within(model):
    raise ValueError
def work(how, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()
    big, last = torch.zeros(30_000_000), torch.zeros(4)
    last.slow = Slow()
    for _ in range(2):  # both of the group's threads are busy
        torch.distributed.all_gather([torch.empty_like(big)], big, async_op=True)
    torch.distributed.all_reduce(last, async_op=True)
    del last
    if how == "failed":
        try:
            raise_within(model)
        except ValueError as error:
            raise RuntimeError("failed") from error
gc.disable()  # the model is left to leaving_processes
try:
    with leaving_processes():
        work(*sys.argv[1:])
except RuntimeError as error:
    print(error, end=", ")
names = [open(f"/proc/self/task/{number}/comm").read() for number in os.listdir("/proc/self/task")]
print("left with", [name for name in names if "gloo" in name])
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="asks Linux for the threads")
@pytest.mark.parametrize("how, said", [pytest.param("done", "", marks=pytest.mark.slow), ("failed", "failed, ")])
def test_the_process_group_is_left_while_its_threads_need_the_gil(tmp_path, how, said):
    command = [sys.executable, "-c", PENDING, how, str(tmp_path)]
    process = subprocess.run(command, cwd=kr.ROOT, capture_output=True, text=True, timeout=60)
    assert process.returncode == 0 and process.stdout == f"dropped by gloo, {said}left with []\n", process.stderr


def _launched(monkeypatch, options, script):
    """By a launcher."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    process = kr.start(options, launcher, script, stdout=-3, stderr=-1, text=True)
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    return errors


def _two_processes(options, script=kr.SCRIPT):
    """As a launcher starts them."""
    codes, said = pair([str(script), *options], kr.environment_of_scripts())
    assert codes == [0, 0], said
    return "".join(said)


@pytest.mark.parametrize("objective, figure", [("sweeps", "ce_mix"), ("tree", "state")])
def test_two_processes_equal_one_and_resume(lm_options, tmp_path, monkeypatch, objective, figure):
    one, two = tmp_path / "one", tmp_path / "two"
    # without noise, which every process draws for itself
    options = [*lm_options, "--objective", objective, "--sigma", "0", "--max-steps", str(STEPS), "--save-every",
               "2", "--keep-checkpoints", "9", "--eval-every", "4"]
    assert kr.load_script().main([*options, "--batch-size", "4", "--output-dir", str(one)]) == 0
    script = tmp_path / "threads_end.py"
    script.write_text(THREADS_END.format(tests=str(Path(__file__).parents[1])))
    two_runs = [*options, "--batch-size", "2", "--output-dir", str(two)]
    errors = _launched(monkeypatch, two_runs, script) if objective == "sweeps" else _two_processes(two_runs, script)
    assert "on 2 x cpu" in errors
    if Path("/proc/self/task").is_dir():
        assert errors.count("threads while training: True") == errors.count("threads left: []") == 2
    rows = kr.lines(two)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row, expected in zip(rows, kr.lines(one), strict=True):
        for name in ("loss", "ce", figure, "grad_norm", "node_losses"):
            assert row[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5), (row["step"], name)
        assert (row["tokens"], row["epoch"], row["lr"]) == (expected["tokens"], expected["epoch"], expected["lr"])
    evaluations = (two / "evaluations.jsonl").read_text()
    model = (two / "model.safetensors").read_bytes()

    errors = _two_processes(["--resume", "2", "--output-dir", str(two)])
    assert "steps 2 to 6" in errors and errors.count("to go on from step 2, removed") == 1  # one process speaks
    times = dict.fromkeys(kr.TIMES)
    assert [{**row, **times} for row in kr.lines(two)] == [{**row, **times} for row in rows]
    assert (two / "evaluations.jsonl").read_text() == evaluations and (two / "model.safetensors").read_bytes() == model
    assert ck.list_checkpoints(two / "checkpoints") == [0, 2, 4, 6]
    state = json.loads((two / "checkpoints" / "step-00000006" / "state.json").read_text())
    assert state["num_processes"] == 2 and len(state["rng"]) == 2
