"""Seconds of a training step over time: HBLL-RNN beside backpropagation through time (BPTT) and torch's fused layers.

    python train/experiments/bench_rnn.py             # CPU: half an hour; goes on where it was stopped
    python train/experiments/bench_rnn.py --quick     # less than a minute, too few points to mean much
    python train/experiments/bench_rnn.py --device cuda --bf16 --hidden-size 2048 --batch-sizes 128     # the paper's setting

A step is forward and backward of the loss (with --optimizer also one step of AdamW) of a classifier of 784 pixels that
are read in N steps of ceil(784 / N), as in the paper's sequential MNIST, into 10 classes; the inputs are random. The head
is so small that the recurrence is what is measured. All methods have the same weights, inputs and loss:

    bptt          backpropagation through time, an explicit loop over the same unfused cell
    one-step      the same loop with the state detached before every transition
    fused         torch.nn.GRU (or nn.RNN for an Elman cell), whose loop and gates are one kernel each
    sweeps:...    local losses with these options, such as sweeps:forward=4,backward=4,linearization=zero; with init=tree
                  started from a tree's states, which is trained in the step too and takes the options max_symbols
                  (default 8) and share (default capped)
    tree:...      the paper's tree, a cell for every span, and its consistency stage of consistency=K (0: none)

The methods of one point (N and batch size) are timed by turns, a step of each in a round, so that what else the machine
does falls on all of them. Speed-ups are ratios of the shortest steps. On a shared machine even the shortest step may hold a
pause for another process, therefore steps on one CPU thread are compared in processor time, which has no pauses; the JSON
file holds both times, and medians.

New names in version 0.2: --methods (was --sides), and of methods "sweeps:init=tree" ("tree+sweeps"), "tree" ("paper").
Files of results and names of methods from before are read as they are.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from comparisons.fused import FusedMethod
from comparisons.methods import distinct
from comparisons.plots import plot_speedups
from comparisons.program import as_program, parse_benchmark
from comparisons.report import crossover, speedup
from comparisons.time_methods import TimeMethod
from comparisons.words import current_points
from hbll_seq.layers.cells import CELL_KINDS, make_cell
from hbll_seq.models.recurrent import RecurrentModel
from hbll_seq.objectives.recurrent import RecurrentObjective
from hbll_seq.utils.arguments import Parser
from hbll_seq.utils.atomic import atomic_write

N_PIXELS, N_CLASSES = 784, 10
BASELINES = ("bptt", "one-step", "fused")
OURS = ("sweeps", "tree")
#: what a method "sweeps" does where it does not say otherwise, as RecurrentLocalObjective does
SWEEPS = {"forward": 1, "backward": 1, "chunk_size": 8, "linearization": "zero", "init": "state"}
METHODS = (
    "sweeps:forward=1,backward=1,linearization=zero,chunk_size=8",  # the objective's defaults
    "sweeps:forward=2,backward=2,linearization=shared_matrix,chunk_size=8",  # what copying over 64 steps takes
    "sweeps:forward=4,backward=3,linearization=shared_matrix,chunk_size=8",  # what permuted MNIST in 64 steps takes
    "sweeps:forward=4,backward=4,linearization=diagonal,chunk_size=1",
    "sweeps:init=tree,forward=1,backward=1,linearization=zero,chunk_size=1",
    "sweeps:init=tree,forward=4,backward=4,linearization=zero,chunk_size=1",
    "tree:consistency=0",
    "tree:consistency=4",
)
QUICK = dict(steps=[2, 16, 128], batch_sizes=[4], repeats=3, methods=[METHODS[0], METHODS[4], METHODS[-1]])
#: with device and torch, what a result holds for.
DECISIVE = ("cell", "hidden_size", "input_size", "threads", "bf16", "optimizer")


def options() -> Parser:
    """What the command line takes."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--steps", type=int, nargs="+", default=[2**d for d in range(1, 11)], help="N, steps of a sequence "
        "(default: 2 4 8 .. 1024)")  # fmt: skip
    add("--batch-sizes", type=int, nargs="+", default=[1, 4, 32, 128], help="sequences of a step (default: 1 4 32 128)")
    add("--methods", nargs="+", default=list(METHODS), help="settings of HBLL-RNN, see above (default: "
        f"{' '.join(METHODS)})")  # fmt: skip
    add("--baselines", nargs="+", default=["bptt", "fused"], help=f"among {', '.join(BASELINES)}; bptt, which speed-ups "
        "are over, is always timed (default: bptt fused)")  # fmt: skip
    add("--cell", choices=CELL_KINDS, default="gru", help="recurrent cell (default: gru)")
    add("--hidden-size", type=int, default=128, help="H (default: 128)")
    add("--input-size", type=int, help="width of a step's input (default: ceil(784 / N))")
    add("--repeats", type=int, default=15, help="timed rounds of a point, after the warm-up (default: 15)")
    add("--warmup", type=int, default=2, help="rounds that are not timed (default: 2)")
    add("--point-seconds", type=float, default=60.0, help="no further round of a point begins after so many seconds, "
        "once there are 3 (default: 60)")  # fmt: skip
    add("--optimizer", action="store_true", help="a step of AdamW is part of what is timed")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="such as cpu or cuda (default: cuda "
        "where there is one)")  # fmt: skip
    add("--bf16", action="store_true", help="autocast to bfloat16")
    add("--threads", type=int, default=1, help="CPU threads (default: 1)")
    add("--clock", choices=("wall", "processor"), help="time that is printed and compared, both are stored (default: "
        "processor on one CPU thread, else wall)")  # fmt: skip
    add("--quick", action="store_true", help=f"defaults for a short run: {QUICK}")
    add("--output", type=Path, help="JSON file, written after every point and gone on with; a figure goes beside it "
        "(default: train/results/bench_rnn.json, or bench_rnn-quick.json)")  # fmt: skip
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked; ``methods`` become :class:`TimeMethod` of some length, see :func:`method_of`.

    Raises:
        ValueError: a value is out of range, or there is no such method or device.
    """
    parser = options()
    args = parse_benchmark(parser, argv, "bench_rnn", QUICK)
    check_numbers(args)
    for name in args.baselines:
        if name not in BASELINES:
            raise ValueError(f"baseline {name!r}: allowed are {', '.join(BASELINES)}; settings of ours go to --methods")
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={args.device!r} cannot be used ({reason}): pass --device cpu") from error
    if args.device != "cpu" and args.clock == "processor":
        raise ValueError(f"clock='processor' with device={args.device!r}: counts the work of a CPU alone; pass --clock wall")
    args.clock = args.clock or ("processor" if args.device == "cpu" and args.threads == 1 else "wall")
    args.steps, args.batch_sizes = sorted(set(args.steps)), sorted(set(args.batch_sizes))
    args.methods = distinct(method_of(name, args) for name in ["bptt", *args.baselines, *args.methods])
    for method in args.methods:  # an option's range is the objective's to check, before hours of timing rather than after
        model = make_model(4, args, hidden_size=2)
        make_objective(method, model, 4, args)(*make_batch(4, 1, args))
    return args


def check_numbers(args: argparse.Namespace) -> None:
    """Raises ValueError where a number is out of range."""
    for name in ("hidden_size", "input_size", "repeats", "threads", "steps", "batch_sizes"):
        value = getattr(args, name)
        for number in value if isinstance(value, list) else [1 if value is None else value]:
            if number < 1:
                raise ValueError(f"{name}={number}: must be at least 1")
    for name in ("warmup", "point_seconds"):
        if not getattr(args, name) >= 0:
            raise ValueError(f"{name}={getattr(args, name)}: must be at least 0")


def method_of(name: str, args: argparse.Namespace) -> TimeMethod:
    """The method of that name; of which length is said by :func:`make_objective`.

    Raises:
        ValueError: kind or option is unknown.
    """
    if name == "fused":
        return FusedMethod(name, name, ())
    method = TimeMethod.named(name, SWEEPS, args.cell)
    if method.lr is not None:
        raise ValueError(f"method {name!r}: no rate is used where steps are timed; leave lr out")
    return method


def make_model(n_steps: int, args: argparse.Namespace, hidden_size: int | None = None) -> RecurrentModel:
    """The classifier, the same weights for every method of a point."""
    torch.manual_seed(0)
    hidden_size = hidden_size or args.hidden_size
    cell = make_cell(args.cell, args.input_size or -(-N_PIXELS // n_steps), hidden_size)
    return RecurrentModel(cell, nn.Linear(hidden_size, N_CLASSES), readout="last").to(args.device)


def make_batch(n_steps: int, batch_size: int, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Random pixels [B, N, I] and classes [B]."""
    torch.manual_seed(1)
    x = torch.rand(batch_size, n_steps, args.input_size or -(-N_PIXELS // n_steps))
    return x.to(args.device), torch.randint(N_CLASSES, (batch_size,)).to(args.device)


def make_objective(method: TimeMethod, model: RecurrentModel, n_steps: int, args: argparse.Namespace) -> RecurrentObjective:
    """A method around a model that reads so many steps."""
    return replace(method, n_steps=n_steps).objective(model).to(args.device)


def make_step(method: TimeMethod, n_steps: int, x: Tensor, labels: Tensor, args: argparse.Namespace) -> Callable[[], Tensor]:
    """One training step of a method with a model of its own; returns the cross-entropy that the method reports."""
    objective = make_objective(method, make_model(n_steps, args), n_steps, args)
    trained = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3) if args.optimizer else None

    def step() -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=args.bf16):
            output = objective(x, labels)
        output.loss.backward()
        if optimizer is not None:
            optimizer.step()
        for p in trained:
            p.grad = None
        return output.metrics["ce"]

    return step


def measure(n_steps: int, batch_size: int, methods: Iterable[TimeMethod], args: argparse.Namespace) -> dict:
    """One point: all methods by turns."""
    x, labels = make_batch(n_steps, batch_size, args)
    steps = {method.name: make_step(method, n_steps, x, labels, args) for method in methods}
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None
    losses = {name: step().item() for name, step in steps.items()}  # before an optimizer has moved a weight
    for _ in range(args.warmup - 1):
        for step in steps.values():
            step()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    begun = time.perf_counter()
    for done in range(args.repeats):
        if done >= 3 and time.perf_counter() - begun > args.point_seconds:
            break
        for name, step in steps.items():
            wait()
            start, processor = time.perf_counter(), time.process_time()
            step()
            wait()
            times[name].append((time.perf_counter() - start, time.process_time() - processor))
    results = {}
    for name, of_method in times.items():
        results[name] = {"ce": losses[name], "rounds": len(of_method)}
        for clock, seconds in zip(("wall", "processor"), zip(*of_method)):
            results[name][clock] = {"min": min(seconds), "median": median(seconds)}
    return {"steps": n_steps, "batch_size": batch_size, "methods": results}


def label(name: str, args: argparse.Namespace) -> str:
    """A method's name to read."""
    if name == "fused":
        return "nn.GRU" if args.cell == "gru" else "nn.RNN"
    for long, short in (("backward=", "M="), ("forward=", "K="), ("linearization=", "A="), ("chunk_size=", "c=")):
        name = name.replace(long, short)
    return name.replace(",", ", ").replace(":", ": ")


def report_lines(points: Sequence[dict], args: argparse.Namespace) -> list[str]:
    """Where each method crosses BPTT and the fused layer, by batch size; the last line has the best of ours."""
    ours = [method.name for method in args.methods if method.kind in OURS]
    against = [name for name in ("bptt", "fused") if any(name == method.name for method in args.methods)]
    lines, best = [], []
    for batch_size in args.batch_sizes:
        of_batch = [point for point in points if point["batch_size"] == batch_size]
        found = {(name, over): crossover(of_batch, name, over, args.clock) for name in ours for over in against}
        for name in ours:
            reached = ", ".join(f"{label(over, args)} {_number(found[name, over])}" for over in against)
            lines.append(f"batch {batch_size}, {label(name, args)}: faster from N on: {reached}")
        firsts = [min((found[name, over] for name in ours if found[name, over]), default=None) for over in against]
        reached = ", ".join(f"{label(over, args)} {_number(first)}" for over, first in zip(against, firsts))
        best.append(f"batch {batch_size}: {reached}")
    return [*lines, "crossover N, best of ours, against " + "; ".join(best)]


def _number(first: int | None) -> str:
    return "never" if first is None else str(first)


def plot(points: Sequence[dict], args: argparse.Namespace) -> None:
    """Speed-up over explicit BPTT by N, a panel for each batch size, beside the paper's published curve. A method has no
    point where it was not timed."""
    curves = {}
    for batch_size in args.batch_sizes:
        of_batch = sorted((p for p in points if p["batch_size"] == batch_size), key=lambda p: p["steps"])
        curves[f"batch {batch_size}"] = {
            label(method.name, args): (
                "ours" if method.kind in OURS else method.kind,
                [(p["steps"], speedup(p, method.name, "bptt", args.clock)) for p in of_batch],
            )
            for method in args.methods
            if method.kind != "bptt"
        }
    threads = f", {args.threads} thread{'s' * (args.threads > 1)}" if args.device == "cpu" else ""
    precision = "bf16" if args.bf16 else "float32"
    place = f"{describe_device(args.device)}{threads}"
    title = f"ours: {place}, {args.cell}, H = {args.hidden_size}, {precision}, {args.clock} time"
    plot_speedups(args.output.with_suffix(".png"), curves, title)


def load(path: Path, setting: dict) -> list[dict]:
    """The points that a file holds already; none where there is no file.

    Raises:
        ValueError: it is of another setting, or no results.
    """
    if not path.exists():
        return []
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        stored, points = data["setting"], current_points(data["points"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no results of this script: choose another --output, or remove it") from error
    differ = [f"{k} {stored.get(k)!r}, here {v!r}" for k, v in setting.items() if stored.get(k) != v]
    if differ:
        raise ValueError(
            f"{path} holds times of another setting ({'; '.join(differ)}): choose another --output, or remove it"
        )
    return points


def describe_device(device: str) -> str:
    """Kind of device; a GPU's name."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def print_point(point: dict, args: argparse.Namespace) -> None:
    """A row of the table for every method."""
    for name in (method.name for method in args.methods):
        row = point["methods"][name][args.clock]
        ratios = [speedup(point, name, over, args.clock) for over in ("bptt", "fused")]
        cells = "".join(f"{'-' if ratio is None else format(ratio, '.2f'):>9}" for ratio in ratios)
        print(f"{point['steps']:>6} {point['batch_size']:>6} {row['min'] * 1e3:>10.2f} {row['median'] * 1e3:>10.2f}{cells}  "
              f"{label(name, args)}", flush=True)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Times every method at every point that the output does not hold yet; prints the table, writes JSON and figure."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    setting = {name: getattr(args, name) for name in DECISIVE}
    setting |= {"device": describe_device(args.device), "torch": torch.__version__}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    known = {(point["steps"], point["batch_size"]): point for point in load(args.output, setting)}
    over_fused = f"/ {label('fused', args)}"
    print(f"{args.clock} time; the last two numbers are speed-ups")
    print(f"{'N':>6} {'batch':>6} {'ms min':>10} {'ms median':>10}{'/ bptt':>9}{over_fused:>9}  method")
    points = []
    for batch_size in args.batch_sizes:
        for n_steps in args.steps:
            before = known.get((n_steps, batch_size), {"methods": {}})["methods"]
            if any(method.name not in before for method in args.methods):
                # all again, those of earlier runs too: times are comparable only within one interleaved measurement
                names = [method.name for method in args.methods]
                others = [method_of(name, args) for name in before if name not in names]
                known[n_steps, batch_size] = measure(n_steps, batch_size, [*args.methods, *others], args)
                data = {"setting": setting, "points": [known[key] for key in sorted(known)]}
                atomic_write(args.output, json.dumps(data, indent=1) + "\n")
            points.append(known[n_steps, batch_size])
            print_point(points[-1], args)
    plot([known[key] for key in sorted(known)], args)  # earlier runs' other N too
    print("\n".join(report_lines(points, args)))
    return points


if __name__ == "__main__":
    as_program(main)
