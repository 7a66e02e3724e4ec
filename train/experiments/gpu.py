"""Times and peak memory on one GPU: a training step over depth and over time by form, and generation by depth.

    python train/experiments/gpu.py                               # nine minutes; again: goes on where it was stopped
    python train/experiments/gpu.py --minutes 3                   # the most informative cells come first
    python train/experiments/gpu.py --device cpu --quick          # seconds: whether everything runs; says nothing of speed
    python train/experiments/gpu.py --report-only --name nvidia-h100-80gb-hbm3     # print and draw again what is stored

A cell is a form at a shape. Each is stored the moment it is finished; one that fails is stored with its reason, and the rest
goes on. The kinds of cells:

    depth       forward and backward of a language model of 7 to 63 blocks, with the sizes of bench_depth.py at more
                widths: backprop, and ours (LocalObjective with sweeps of K, M and c); each plain and as one CUDA graph, some
                also with compiled blocks (torch.compile). No form includes the optimizer: "AdamW step alone" says what that
                adds to all of them alike.
    time        the same of the classifier of bench_rnn.py over 64 to 4096 steps: nn.GRU (on a GPU it is cuDNN's), BPTT as a
                loop over the same cell, and ours (RecurrentLocalObjective)
    generation  tokens a second of generate_ids along the default path of a depth, as in bench_generation.py

One shape over depth and one over time are also measured under bf16 autocast. Nothing in float32 uses TF32, in cuDNN neither.

Times are of single steps, from an idle device to an idle device, by CUDA events: median, the shortest and the longest.
``peak_mib`` is torch.cuda.max_memory_allocated with weights and inputs, ``step_mib`` what of it the step adds. A graph is
captured on one batch and replayed on another one, where its loss and gradients must be those of the plain step
(``loss_difference`` and ``gradient_difference``, relative). A form whose step asks the device for a value cannot be captured;
its reason then names the line.

Where an error leaves the device unusable, or a capture breaks off, the script starts itself anew for what is left.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

import bench_rnn
from comparisons.gpu_cells import QUICK, Cell, Plan, cells_of, form_of
from comparisons.gpu_report import Stored, draw, line_of, summary
from comparisons.gpu_steps import Memory, Subject, clean_up, measure_step, reason_of, times_of
from comparisons.program import as_program
from hbll_seq import HBLLConfig, HBLLForCausalLM, SamplingParams, __version__
from hbll_seq.generation.decoding import generate_ids
from hbll_seq.training.graphed import CaptureFailed
from hbll_seq.utils.arguments import Parser

RESULTS = Path(__file__).resolve().parents[1] / "results"
#: seconds that a cell is taken to last before one of its form was measured: forms that are compiled or captured, and others
UNKNOWN = (20.0, 5.0)
GENERATION_LEVELS = 3


def options() -> Parser:
    """What the command line takes."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--device", default="cuda", help="cuda, cuda:1, or cpu, where forms that need CUDA are stored as such (default: "
        "cuda)")  # fmt: skip
    add("--quick", action="store_true", help="few cells, small shapes and 2 repeats: whether everything runs")
    add("--minutes", type=float, default=9.0, help="no cell begins that would end after so many, but for the first "
        "(default: 9)")  # fmt: skip
    add("--name", help="the results are in train/results/gpu-NAME (default: from the device's name, with -quick)")
    add("--output", type=Path, help="folder of results.json and the figures, in place of train/results/gpu-NAME")
    add("--repeats", type=int, help="timed repeats of a cell at most (default: 20; with --quick 2)")
    add("--cell-seconds", type=float, default=0.5, help="no further repeat of a cell begins after so many, once there are 3 "
        "(default: 0.5)")  # fmt: skip
    add("--retry-failed", action="store_true", help="measure again what failed")
    add("--report-only", action="store_true", help="measure nothing: print and draw what the results of --name hold")
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked; ``output`` is the folder, ``plan`` the shapes.

    Raises:
        ValueError: a value is out of range, or there is no such device.
    """
    args = options().parse_args(argv)
    args.repeats = (2 if args.quick else 20) if args.repeats is None else args.repeats
    if args.repeats < 1:
        raise ValueError(f"repeats={args.repeats}: must be at least 1")
    for name in ("minutes", "cell_seconds"):
        if not getattr(args, name) >= 0:
            raise ValueError(f"{name}={getattr(args, name)}: must be at least 0")
    args.plan = QUICK if args.quick else Plan()
    if args.report_only:
        if args.name is None and args.output is None:
            raise ValueError("report_only=True without a name: say which results, as --name nvidia-h100-80gb-hbm3")
    else:
        args.device = usable_device(args.device)
        default = re.sub(r"[^a-z0-9]+", "-", name_of(args.device).lower()).strip("-") + "-quick" * args.quick
        args.name = args.name or default
    if args.name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", args.name):
        raise ValueError(f"name={args.name!r}: must be letters, digits, '.', '_' and '-', such as h100; it names a folder")
    args.output = args.output or RESULTS / f"gpu-{args.name}"
    return args


def usable_device(name: str) -> torch.device:
    """The device of that name. Raises ValueError where it cannot be used."""
    remedy = "run it on a machine with a GPU and a torch for CUDA, or pass --device cpu --quick to see that it runs"
    if name.partition(":")[0] not in ("cuda", "cpu"):
        raise ValueError(f"device={name!r}: allowed are cpu, cuda and cuda:N; {remedy}")
    try:
        device = torch.device(name)
        device = torch.empty(1, device=device).device  # with its index
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(f"device={name!r} cannot be used ({str(error).splitlines()[0]}): {remedy}") from error
    return device


def name_of(device: torch.device) -> str:
    """A GPU's name, or ``"cpu"``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def driver_of(device: torch.device) -> str | None:
    """Version of the GPU's driver; None where ``nvidia-smi`` does not say it."""
    if device.type != "cuda":
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return said[0] if said else None


def setting_of(args: argparse.Namespace) -> dict[str, object]:
    """What all cells of a file hold for."""
    return {"device": name_of(args.device), "torch": torch.__version__, "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if args.device.type == "cuda" else None,
            "driver": driver_of(args.device), "hbll_seq": __version__,
            "float32_matmul_precision": torch.get_float32_matmul_precision(), "shapes": asdict(args.plan)}  # fmt: skip


# ------------------------------------------------------------------------------------------------------ models


def language_model(plan: Plan, device: torch.device, n_level: int, width: int, context_length: int) -> HBLLForCausalLM:
    """A language model of random weights, which the device itself draws."""
    torch.manual_seed(0)
    config = HBLLConfig(vocab_size=plan.vocab_size, n_level=n_level, n_embd=width, n_head=width // plan.head_width,
                        context_length=context_length)  # fmt: skip
    with torch.device(device):
        return HBLLForCausalLM(config)


def depth_subject(cell: Cell, plan: Plan, device: torch.device) -> Subject:
    """The language model of a number of blocks, and windows of random tokens."""
    model = language_model(plan, device, cell.size("blocks").bit_length(), cell.size("width"), plan.context_length)
    shape = (2, plan.batch_size, plan.context_length + 1)
    first, second = torch.randint(plan.vocab_size, shape, device=device)
    return Subject(model, (first,), (second,))


def time_subject(cell: Cell, plan: Plan, device: torch.device) -> Subject:
    """The classifier of ``bench_rnn.py``, and random pixels."""
    args = argparse.Namespace(cell="gru", input_size=None, hidden_size=plan.hidden_size, device=device)
    x, labels = bench_rnn.make_batch(cell.size("steps"), cell.size("batch"), args)
    model = bench_rnn.make_model(cell.size("steps"), args)
    return Subject(model, (x, labels), (1 - x, (labels + 1) % bench_rnn.N_CLASSES))


SUBJECTS: dict[str, Callable[[Cell, Plan, torch.device], Subject]] = {"depth": depth_subject, "time": time_subject}


def measure_generation(cell: Cell, args: argparse.Namespace) -> dict[str, object]:
    """Greedy generation along the default path of a depth."""
    plan, batch, begun = args.plan, cell.size("batch"), time.perf_counter()
    context_length = plan.prompt_tokens + plan.new_tokens
    model = language_model(plan, args.device, GENERATION_LEVELS, cell.size("width"), context_length).eval()
    ids = torch.randint(plan.vocab_size, (batch, plan.prompt_tokens), device=args.device).tolist()
    path, sampling = model.resolve_path(depth=cell.size("depth")), SamplingParams(plan.new_tokens, temperature=0)

    def generate() -> None:
        n_steps = sum(1 for _ in generate_ids(model, ids, path, sampling))
        if n_steps != plan.new_tokens:
            raise RuntimeError(f"{n_steps} tokens were generated in place of {plan.new_tokens}")

    memory = Memory(args.device)
    memory.start()
    generate()
    prepared = time.perf_counter() - begun
    found = times_of(generate, args.device, args.repeats, args.cell_seconds)
    rate = batch * plan.new_tokens / (found["median_ms"] / 1e3)
    return {**found, **memory.result(), "tokens_per_second": rate, "setup_s": prepared}


# ---------------------------------------------------------------------------------------------------- measuring


class Bench:
    """Measures cells one after the other; the model of a shape serves its forms.

    Attributes:
        works: whether this process can still use the device and trust what it measures.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.works = args, clean_up(args.device)  # which also wakes the device before the first cell
        if args.device.type == "cuda":
            torch.backends.cudnn.allow_tf32 = False  # torch's default would give nn.GRU alone the faster products
        self._made_for: object = None
        self._subject: Subject | None = None
        self._compiled_for: object = None

    def row_of(self, cell: Cell) -> dict[str, object]:
        """The cell's numbers, or the reason why it has none."""
        begun, row = time.perf_counter(), cell.row()
        try:
            row |= measure_generation(cell, self.args) if cell.kind == "generation" else self._step(cell)
        except Exception as error:  # one form's failure, of whatever kind, is a result too
            row["reason"] = reason_of(error)
            self.works = not isinstance(error, CaptureFailed)
        self.works = clean_up(self.args.device) and self.works
        return row | {"seconds": time.perf_counter() - begun}

    def _step(self, cell: Cell) -> dict[str, object]:
        form, args = form_of(cell), self.args
        if self._made_for != (cell.kind, cell.shape):
            self._subject = self._made_for = None  # frees the model before
            self._subject = SUBJECTS[cell.kind](cell, args.plan, args.device)
            self._made_for = (cell.kind, cell.shape)
        compiled_for = (form.side, cell.size("width"), cell.precision) if form.compiled else self._compiled_for
        if args.device.type == "cuda" and compiled_for != self._compiled_for:
            torch.compiler.reset()  # no code of another side's, and none for sizes that vary
            self._compiled_for = compiled_for
        return measure_step(form, self._subject, cell.precision, args.repeats, args.cell_seconds)


def expected_seconds(cell: Cell, stored: Stored) -> float:
    """How long a cell may take: as the longest of its form so far."""
    like = [row["seconds"] for row in stored.rows.values() if (row["kind"], row["form"]) == (cell.kind, cell.form)]
    slow = cell.kind != "generation" and form_of(cell).needs_cuda
    return max(like, default=UNKNOWN[0 if slow else 1])


def measure_all(cells: Sequence[Cell], stored: Stored, args: argparse.Namespace, end: float) -> bool:
    """Measures what is not stored yet and fits into the time, at least one cell; whether the device still works then."""
    bench, n_new = Bench(args), 0
    for number, cell in enumerate(cells, start=1):
        if cell.name in stored.rows or n_new and time.monotonic() + expected_seconds(cell, stored) > end:
            continue
        stored.add(bench.row_of(cell))
        n_new += 1
        print(f"{number}/{len(cells)} {line_of(stored.rows[cell.name])}", flush=True)
        if not bench.works:
            return False
    return True


def start_anew(argv: Sequence[str] | None, minutes: float) -> None:
    """Replaces this process by a new one for what is left. It does not return."""
    kept = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--retry-failed"]  # done already
    print("after this failure a process cannot go on with the device: starting anew", flush=True)
    os.execv(sys.executable, [sys.executable, str(Path(__file__).resolve()), *kept, "--minutes", f"{minutes:.3f}"])


def main(argv: Sequence[str] | None = None) -> dict[str, dict]:
    """Measures what is missing; prints a line for each cell, a summary, and how to go on; returns all rows by cell."""
    begun = time.monotonic()
    args = parse(argv)
    end = begun + 60 * args.minutes
    stored = Stored(args.output / "results.json", None if args.report_only else setting_of(args))
    if args.report_only:
        shapes = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.setting["shapes"].items()}
        cells = cells_of(Plan(**shapes))
        print("\n".join(line_of(row) for row in stored.rows.values()))
    else:
        cells = cells_of(args.plan)
        if args.retry_failed:
            stored.drop_failed()
        if not measure_all(cells, stored, args, end) and time.monotonic() < end:
            start_anew(argv, (end - time.monotonic()) / 60)
    draw(args.output, stored, cells)
    print("\n".join(summary(stored, cells)))
    left = sum(cell.name not in stored.rows for cell in cells)
    failed = sum("reason" in row for row in stored.rows.values())
    print(f"{len(cells) - left} of {len(cells)} cells are done, {failed} of them without a time: {stored.path}")
    if left:
        print(f"{left} cells are left: the same command goes on with them")
    return stored.rows


if __name__ == "__main__":
    as_program(main)
