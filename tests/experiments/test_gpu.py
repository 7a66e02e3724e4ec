"""The measurements on a GPU, their logic on a CPU: cells are stored, a stop costs nothing, a failing form stops no other."""

import json
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

import gpu
from comparisons import gpu_cells, gpu_steps
from comparisons.gpu_cells import FORMS, QUICK, Cell, Form, Plan, cells_of
from hbll_seq import BackpropObjective, LocalObjective
from hbll_seq.training.graphed import CaptureFailed
from hbll_seq.utils.checks import as_token_ids

TINY = replace(QUICK, blocks=(1,), steps=(4,), depths=(1,), bf16_depth=(1, 32), bf16_time=(4, 2))
ON_CPU = ["--device", "cpu", "--quick"]
FIGURES = ("step-time-by-blocks.png", "step-time-by-steps.png")


def run(folder, *argv):
    return gpu.main([*ON_CPU, "--output", str(folder), *argv])


def stored(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu") / "new" / "results"
    return folder, run(folder)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A folder for runs of few cells."""
    monkeypatch.setattr(gpu, "QUICK", TINY)
    return tmp_path / "tiny"


@pytest.fixture
def few(monkeypatch, tiny):
    """The same with two forms."""
    monkeypatch.setitem(FORMS, "depth", FORMS["depth"][:1])
    monkeypatch.setitem(FORMS, "time", FORMS["time"][:1])
    return tiny


# ------------------------------------------------------------------------------------------------------ a whole run


def test_a_run_stores_every_cell_and_draws(quick):
    folder, rows = quick
    found = stored(folder)
    assert {row["cell"]: row for row in found["cells"]} == rows
    assert set(rows) == {cell.name for cell in cells_of(QUICK)} and len(rows) == 58
    assert found["setting"]["device"] == "cpu" and found["setting"]["torch"] == torch.__version__
    assert {"cuda", "driver", "cudnn", "hbll_seq", "shapes"} < set(found["setting"])
    for cell in cells_of(QUICK):
        row = rows[cell.name]
        if cell.kind != "generation" and gpu_cells.form_of(cell).needs_cuda:
            assert row["reason"] == "needs CUDA" and "median_ms" not in row
        else:
            low, high = row["spread_ms"]
            assert 0 < low <= row["median_ms"] <= high and row["repeats"] == 2 and row["peak_mib"] is None
            assert "reason" not in row
    for row in found["cells"]:
        if row["kind"] == "generation":
            assert row["tokens_per_second"] == pytest.approx(4 / (row["median_ms"] / 1e3))
    assert all((folder / name).stat().st_size > 5000 for name in FIGURES)


def test_a_second_call_measures_nothing(quick, monkeypatch, capsys):
    folder, rows = quick
    before = (folder / "results.json").read_text()
    monkeypatch.setattr(gpu.Bench, "row_of", lambda self, cell: pytest.fail(f"{cell} is measured again"))
    assert run(folder) == rows and (folder / "results.json").read_text() == before
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith("58 of 58 cells are done, 33 of them without a time: ")
    assert sum("times as fast" in line for line in said) == 6  # 2 shapes over depth, 2 over time, 2 under bf16
    assert gpu.main(["--report-only", "--output", str(folder)]) == rows
    assert len(capsys.readouterr().out.splitlines()) == 58 + len(said)


def test_the_budget_ends_a_call_after_one_cell_and_the_next_goes_on(few, capsys):
    names = [cell.name for cell in cells_of(TINY)]
    assert len(names) == 5
    for n in range(1, 6):
        assert list(run(few, "--minutes", "0")) == names[:n]
        said = capsys.readouterr().out
        assert said.startswith(f"{n}/5 {names[n - 1]}: ") and f"{n} of 5 cells are done" in said
        assert (f"{5 - n} cells are left: the same command goes on with them" in said) == (n < 5)
    assert sorted(path.name for path in few.iterdir()) == ["results.json", *FIGURES]


def test_a_cell_that_would_outlast_the_budget_waits_for_the_next_call(few, monkeypatch):
    names = [cell.name for cell in cells_of(TINY)]
    monkeypatch.setattr(gpu, "expected_seconds", lambda cell, stored: 600.0 if cell.kind == "time" else 0.0)
    assert list(run(few, "--minutes", "5")) == [name for name in names if not name.startswith("time")]


def test_a_cell_is_expected_to_last_as_the_longest_of_its_form():
    cell = Cell("depth", (("blocks", 7), ("width", 32)), "backprop")
    slow = replace(cell, form="backprop, CUDA graph")
    measured = gpu.Stored(Path("nowhere.json"), {})
    assert gpu.expected_seconds(cell, measured) < gpu.expected_seconds(slow, measured)
    rows = [{**replace(cell, shape=(("blocks", n),)).row(), "seconds": s} for n, s in ((1, 2.0), (3, 70.0), (5, 1.0))]
    measured.rows = {row["cell"]: row for row in rows}
    assert gpu.expected_seconds(cell, measured) == 70.0 and gpu.expected_seconds(slow, measured) == gpu.UNKNOWN[0]


# --------------------------------------------------------------------------------------------------------- failures


def breaks(model):
    """An objective that cannot be called."""

    class Broken(nn.Module):
        def forward(self, *inputs):
            raise RuntimeError("this form is broken\nin more than one line")

    return Broken()


def test_a_failing_form_is_stored_with_its_reason_and_stops_nothing(few, monkeypatch, capsys):
    monkeypatch.setitem(FORMS, "depth", [Form("broken", "ours", breaks), *FORMS["depth"]])
    rows = run(few)
    broken = [row for row in rows.values() if row["form"] == "broken"]
    assert [row["reason"] for row in broken] == ["RuntimeError: this form is broken"] * 2  # float32 and bf16
    assert all("median_ms" in row for row in rows.values() if row["form"] != "broken") and len(rows) == 7
    assert "1/7 depth blocks=1 width=32 float32: broken: not measured: RuntimeError: this form is" in capsys.readouterr().out
    assert run(few) == rows
    monkeypatch.setitem(FORMS, "depth", [Form("broken", "ours", LocalObjective), *FORMS["depth"][1:]])
    again = run(few, "--retry-failed")
    assert {name for name in rows if again[name] != rows[name]} == {row["cell"] for row in broken}
    assert all("median_ms" in row for row in again.values())


def test_a_reason_names_the_first_error_and_the_line_of_the_library():
    try:
        try:
            as_token_ids("ids", torch.tensor([[9]]), 5, nn.Identity())
        except ValueError as error:
            raise RuntimeError("the capture was not ended") from error
    except RuntimeError as error:
        assert gpu_steps.reason_of(error) == "RuntimeError: the capture was not ended"  # of torch's errors alone
    try:
        try:
            torch.nn.functional.linear(torch.ones(2, 3), torch.ones(2, 2))
        except RuntimeError as error:
            raise CaptureFailed("the capture failed") from error
    except RuntimeError as error:
        assert "mat1 and mat2 shapes" in gpu_steps.reason_of(error)
    with pytest.raises(ValueError) as raised:
        as_token_ids("ids", torch.tensor([[9]]), 5, nn.Identity())
    said = gpu_steps.reason_of(raised.value)
    assert said.startswith("ValueError: token ids from 9 to 9") and "(at hbll_seq/utils/checks.py:" in said
    assert said.endswith(", as_token_ids)") and "\n" not in said


def test_after_a_failure_that_breaks_the_device_a_new_process_goes_on(few, monkeypatch):
    class Replaced(Exception):
        pass

    def replaced(program, argv):
        calls.append(argv)
        raise Replaced

    calls = []
    monkeypatch.setattr(gpu.os, "execv", replaced)
    monkeypatch.setattr(gpu_steps, "times_of", lambda *given: raise_(CaptureFailed("no")))
    with pytest.raises(Replaced):
        run(few, "--retry-failed", "--minutes", "3")
    assert len(stored(few)["cells"]) == 1  # the failure is stored before
    (argv,) = calls
    assert argv[0] == sys.executable and argv[1].endswith("gpu.py") and "--retry-failed" not in argv
    assert argv[2:] == [*ON_CPU, "--output", str(few), "--minutes", "3", "--minutes", argv[-1]] and 2 < float(argv[-1]) <= 3
    run(few, "--minutes", "0")  # no time is left: no new process
    assert len(calls) == 1


def raise_(error):
    raise error


# ----------------------------------------------------------------------------------------------------------- graphs


def honest(step, memory):
    """What a graph does, by the plain step."""

    def replay():
        step.forget()
        return step()

    return replay


def adds_up(step, memory):
    """Gradients of one replay are added to those of the one before."""
    step()
    return step


def reads_the_captured_batch(step, memory):
    """What is copied into the inputs later is not seen."""
    own = gpu_steps.Step(step.objective, step.subject, step.precision)
    return honest(own, memory)


def stale_loss(step, memory):
    """The loss of the capture, whatever is replayed."""
    loss = step().clone()
    return lambda: (step.forget(), step(), loss)[-1]


@pytest.fixture
def graphed(monkeypatch, tiny):
    """As if a CPU could capture: the forms in a graph run; the folder."""
    monkeypatch.setattr(Form, "needs_cuda", property(lambda form: form.compiled))
    return tiny


def graph_rows(rows):
    return [row for row in rows.values() if row["form"].endswith("CUDA graph") and "compiled" not in row["form"]]


def test_a_graph_is_held_against_the_plain_step(graphed, monkeypatch):
    monkeypatch.setattr(gpu_steps, "capture", honest)
    found = graph_rows(run(graphed))
    assert len(found) == 3 * 2 + 4 * 2
    for row in found:  # also where a step learns from the one before, which is undone between the two
        assert row["loss_difference"] < 1e-6 and row["gradient_difference"] < 1e-6 and row["median_ms"] > 0


@pytest.mark.parametrize("capture", [adds_up, reads_the_captured_batch, stale_loss])
def test_a_graph_of_another_step_has_no_time(graphed, monkeypatch, capture):
    monkeypatch.setattr(gpu_steps, "capture", capture)
    rows = run(graphed)
    for row in graph_rows(rows):
        assert row["reason"].startswith("the graph computes another step than the plain form: relative loss difference ")
        assert "median_ms" not in row
    assert sum("median_ms" in row for row in rows.values()) == 2 * (3 + 4) + 2  # the plain forms, AdamW and generation


def test_what_a_step_learns_is_put_back_before_the_replay(monkeypatch):
    class Counts(nn.Module):
        """A loss that depends on how often it was asked for."""

        def __init__(self, model):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return gpu_steps_output(self.calls * (self.weight * x).sum())

    class gpu_steps_output:
        def __init__(self, loss):
            self.loss = loss

    monkeypatch.setattr(Form, "needs_cuda", False)
    monkeypatch.setattr(gpu_steps, "capture", honest)
    subject = gpu_steps.Subject(nn.Identity(), (torch.ones(3),), (torch.full((3,), 2.0),))
    row = gpu_steps.measure_step(Form("counts", "ours", Counts, graphed=True), subject, "float32", 2, 0.5)
    assert row["loss_difference"] == row["gradient_difference"] == 0
    monkeypatch.setattr(gpu_steps, "_restore", lambda buffers: None)
    with pytest.raises(gpu_steps.DoesNotFit, match="another step"):
        gpu_steps.measure_step(Form("counts", "ours", Counts, graphed=True), subject, "float32", 2, 0.5)


def test_memory_does_not_count_what_the_measurement_holds(monkeypatch):
    allocated = iter([100 * gpu_steps.MIB, 130 * gpu_steps.MIB])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(allocated))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 180 * gpu_steps.MIB)
    memory = gpu_steps.Memory(torch.device("cuda"))
    memory.start()
    assert memory.result() == {"peak_mib": 150.0, "step_mib": 50.0}


def test_times_on_a_gpu_are_of_events_on_an_idle_device(monkeypatch):
    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            calls.append("record")

        def elapsed_time(self, end):
            return float(len(calls))

    calls = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    found = gpu_steps.times_of(lambda: calls.append("call"), torch.device("cuda"), 5, 0.0)
    assert calls == ["wait", "record", "call", "record", "wait"] * gpu_steps.LEAST  # no time is left after that
    assert found == {"median_ms": 10.0, "spread_ms": [5.0, 15.0], "repeats": 3}


def test_compiled_blocks_are_put_back_and_leave_weights_alone(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda block, dynamic: compiled.append(block) or nn.Sequential(block))
    monkeypatch.setattr(Form, "needs_cuda", False)
    subject = gpu.depth_subject(cells_of(TINY)[0], TINY, torch.device("cpu"))
    blocks, weights = list(subject.model.blocks), [p.clone() for p in subject.model.parameters()]
    for form in [form for form in FORMS["depth"] if form.compiled and not form.graphed]:
        with pytest.raises(ValueError, match="block 1 .Sequential. makes a tuple"):  # a stand-in is no cell: it was called
            gpu_steps.measure_step(form, subject, "float32", 2, 0.5)
    adamw = next(form for form in FORMS["depth"] if form.side == "optimizer")
    assert gpu_steps.measure_step(adamw, subject, "float32", 2, 0.5)["median_ms"] > 0
    assert compiled == blocks * 2 and list(subject.model.blocks) == blocks
    assert all(torch.equal(p, before) for p, before in zip(subject.model.parameters(), weights))
    assert all(p.grad is None for p in subject.model.parameters())


# ------------------------------------------------------------------------------------------- the plan, and mistakes


def test_the_plan_holds_every_form_at_every_shape_the_most_informative_first():
    plan, cells = Plan(), cells_of(Plan())
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names)
    depth = {(c.size("blocks"), c.size("width"), c.form) for c in cells if c.kind == "depth" and c.precision == "float32"}
    assert depth == set(product((7, 15, 31, 63), (128, 256, 512, 1024), [form.name for form in FORMS["depth"]]))
    time = {(c.size("steps"), c.size("batch"), c.form) for c in cells if c.kind == "time" and c.precision == "float32"}
    assert time == set(product((64, 256, 1024, 4096), (1, 8, 32, 128), [form.name for form in FORMS["time"]]))
    tokens = {(c.size("depth"), c.size("batch")) for c in cells if c.kind == "generation"}
    assert tokens == set(product((1, 3, 7), (1, 8)))
    low = {(c.kind, c.shape) for c in cells if c.precision == "bf16"}
    assert low == {("depth", (("blocks", 31), ("width", 512))), ("time", (("steps", 1024), ("batch", 32)))}
    early = cells[:24]
    assert {(c.size("width"), gpu_cells.form_of(c).compiled) for c in early} == {(plan.widths[0], False)}
    kinds = [c.kind for c in cells[24 : 24 + 28 + 6]]
    assert kinds == ["time"] * 28 + ["generation"] * 6


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--device", "cuda:99"], "device='cuda:99' cannot be used .*machine with a GPU.*--device cpu --quick"),
        (["--device", "tpu"], "device='tpu': allowed are cpu, cuda and cuda:N"),
        ([*ON_CPU, "--repeats", "0"], "repeats=0: must be at least 1"),
        ([*ON_CPU, "--minutes", "-1"], "minutes=-1.0: must be at least 0"),
        ([*ON_CPU, "--minutes", "nan"], "minutes=nan: must be at least 0"),
        ([*ON_CPU, "--cell-seconds", "-1"], "cell_seconds=-1.0: must be at least 0"),
        ([*ON_CPU, "--name", "../x"], "name='../x': must be letters"),
        (["--report-only"], "report_only=True without a name: .*--name"),
        (["--report-only", "--name", "nowhere"], "no results file .*gpu-nowhere.*leave --report-only out"),
    ],
)
def test_mistakes_are_named(argv, message):
    with pytest.raises(ValueError, match=message):
        gpu.main(argv)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_cuda_it_says_what_to_do():
    with pytest.raises(ValueError, match="device='cuda' cannot be used .*pass --device cpu --quick to see that it runs"):
        gpu.main([])


def test_the_folder_is_named_after_the_device(monkeypatch):
    assert gpu.parse(ON_CPU).output == gpu.RESULTS / "gpu-cpu-quick"
    monkeypatch.setattr(gpu, "name_of", lambda device: "NVIDIA H100 80GB HBM3")
    assert gpu.parse(["--device", "cpu"]).output == gpu.RESULTS / "gpu-nvidia-h100-80gb-hbm3"
    assert gpu.parse(["--device", "cpu", "--name", "other"]).output == gpu.RESULTS / "gpu-other"


def test_refuses_results_of_another_setting(few, monkeypatch):
    run(few, "--minutes", "0")
    before = (few / "results.json").read_text()
    monkeypatch.setattr(gpu, "driver_of", lambda device: "1.2")
    with pytest.raises(ValueError, match="of another setting .driver None, here '1.2'.: choose another --name"):
        run(few)
    assert (few / "results.json").read_text() == before
    (few / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no results of this script"):
        run(few)


def test_the_plain_form_of_backprop_is_the_baseline_of_the_library():
    model = gpu.depth_subject(cells_of(TINY)[0], TINY, torch.device("cpu")).model
    assert isinstance(FORMS["depth"][0].make(model), BackpropObjective)
    ours = [form.make(model).inference for form in FORMS["depth"] if form.side == "ours" and form.way == "plain"]
    assert [(o.forward, o.backward, o.chunk_size) for o in ours] == [(0, 0, 4), (1, 1, 4)]  # of three blocks: one segment
