"""Seconds of a training step over time: HBLL-RNN beside backpropagation through time (BPTT) and torch's fused layers.

    python train/bench_rnn.py                                # CPU: half an hour; goes on where it was stopped
    python train/bench_rnn.py --quick                        # less than a minute, too few points to mean much
    python train/bench_rnn.py --device cuda --bf16 --hidden-size 2048 --batch-sizes 128     # the paper's setting

A step is forward and backward of the loss (with --optimizer also one step of AdamW) of a classifier of 784 pixels that
are read in N steps of ceil(784 / N), as in the paper's sequential MNIST, into 10 classes; the inputs are random. The head
is so small that the recurrence is what is measured. All sides have the same weights, inputs and loss:

    bptt          backpropagation through time, an explicit loop over the same unfused cell
    one-step      the same loop with the state detached before every transition
    fused         torch.nn.GRU (or nn.RNN for an Elman cell), whose loop and gates are one kernel each
    sweeps:...    RecurrentLocalObjective of these options, such as sweeps:sweeps=4,corrections=4,linearization=zero
    tree+sweeps:...   the same started from a tree's states; the tree is trained in the step too, and takes the options
                  max_symbols (default 8) and share (default capped)
    paper:...     the paper's tree, a cell for every span (max_symbols=none, share=none), and its consistency stage of
                  sweeps=K (0: none)

Options are those of RecurrentLocalObjective and RecurrentTree by name. The sides of one point (N and batch size) are
timed by turns, a step of each in a round, so that what else the machine does falls on all of them. Speed-ups are ratios
of the shortest steps. On a shared machine even the shortest step may hold a pause for another process, therefore steps on
one CPU thread are compared in processor time, which has no pauses; the JSON file holds both times, and medians.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hbll_seq.chains.time_tree import RecurrentTree
from hbll_seq.layers.cells import CELL_KINDS, make_cell
from hbll_seq.layers.elman import ElmanCell
from hbll_seq.layers.gru import GRUCell
from hbll_seq.models.recurrent import RecurrentModel
from hbll_seq.objectives.recurrent import (
    RecurrentBackpropObjective,
    RecurrentLocalObjective,
    RecurrentObjective,
    RecurrentOutput,
)
from hbll_seq.training.plots import new_figure, save_figure
from hbll_seq.utils.atomic import atomic_write

RESULTS = Path(__file__).parent / "results"
N_PIXELS, N_CLASSES = 784, 10
#: Speed-up of HBLL-RNN over BPTT as published (arXiv 2606.21497): GPU, unfused GRU, H = 2048, bf16.
PUBLISHED = dict(zip((2, 4, 8, 16, 32, 64, 128, 256), (0.47, 0.28, 0.39, 0.37, 0.86, 1.67, 2.58, 3.6)))
COLORS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "C9")  # of our sides; the grey among them is the published curve's
BASELINES = ("bptt", "one-step", "fused")
FAMILIES = ("sweeps", "tree+sweeps", "paper")
SIDES = (
    "sweeps:sweeps=1,corrections=1,linearization=zero,chunk=8",  # the objective's defaults
    "sweeps:sweeps=2,corrections=2,linearization=secant,chunk=8",  # what copying over 64 steps takes
    "sweeps:sweeps=4,corrections=3,linearization=secant,chunk=8",  # what permuted MNIST in 64 steps takes
    "sweeps:sweeps=4,corrections=4,linearization=diagonal,chunk=1",
    "tree+sweeps:sweeps=1,corrections=1,linearization=zero,chunk=1",
    "tree+sweeps:sweeps=4,corrections=4,linearization=zero,chunk=1",
    "paper:sweeps=0",
    "paper:sweeps=4",
)
QUICK = dict(steps=[2, 16, 128], batch_sizes=[4], repeats=3, sides=[SIDES[0], SIDES[4], SIDES[-1]])
#: with device and torch, what a result holds for.
DECISIVE = ("cell", "hidden_size", "input_size", "threads", "bf16", "optimizer")
OTHER_NAMES = ("self", "model", "inference", "tree")  # arguments of the objective that no option names


class Side(NamedTuple):
    """What is timed.

    name: as it was given; ``family``: the part before the colon.
    options: of the objective; ``tree``: of the tree, where there is one.
    """

    name: str
    family: str
    options: dict[str, object]
    tree: dict[str, object]


class FusedObjective(RecurrentObjective):
    """Backprop through torch's fused layer with the weights of the model's cell, which it copies.

    Args:
        model: its cell is a GRU, or an Elman cell with tanh.

    Raises:
        ValueError: the cell is another one.
    """

    def __init__(self, model: RecurrentModel):
        super().__init__(model)
        cell = model.cell
        if type(cell) is not GRUCell and not (type(cell) is ElmanCell and cell.nonlinearity == "tanh"):
            raise ValueError("side 'fused': torch has layers for the cells gru and elman alone; leave it out of --baselines")
        self.layer = (nn.GRU if type(cell) is GRUCell else nn.RNN)(cell.input_size, cell.hidden_size)
        with torch.no_grad():
            for name, parameter in cell.named_parameters():
                getattr(self.layer, f"{name}_l0").copy_(parameter)

    def _losses(self, x: Tensor, targets: Tensor, s0: Tensor) -> RecurrentOutput:
        states, last = self.layer(self.model.symbols(x), s0[None])
        loss = self.model.nats(states, targets)
        return RecurrentOutput(loss, loss.unsqueeze(0), {"ce": loss.detach()}, last[0].detach())


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, nargs="+", default=[2**d for d in range(1, 11)], help="N, steps of a sequence "
        "(default: 2 4 8 .. 1024)")  # fmt: skip
    add("--batch-sizes", type=int, nargs="+", default=[1, 4, 32, 128], help="sequences of a step (default: 1 4 32 128)")
    add("--sides", nargs="+", default=list(SIDES), help=f"settings of HBLL-RNN, see above (default: {' '.join(SIDES)})")
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
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)
    args.output = args.output or RESULTS / f"bench_rnn{'-quick' if args.quick else ''}.json"
    for name in ("hidden_size", "input_size", "repeats", "threads", "steps", "batch_sizes"):
        value = getattr(args, name)
        for number in value if isinstance(value, list) else [1 if value is None else value]:
            if number < 1:
                raise ValueError(f"{name}={number}: must be at least 1")
    for name in ("warmup", "point_seconds"):
        if not getattr(args, name) >= 0:
            raise ValueError(f"{name}={getattr(args, name)}: must be at least 0")
    for name in args.baselines:
        if name not in BASELINES:
            raise ValueError(f"baseline {name!r}: allowed are {', '.join(BASELINES)}; settings of ours go to --sides")
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={args.device!r} cannot be used ({reason}): pass --device cpu") from error
    if args.device != "cpu" and args.clock == "processor":
        raise ValueError(f"clock='processor' with device={args.device!r}: counts the work of a CPU alone; pass --clock wall")
    args.clock = args.clock or ("processor" if args.device == "cpu" and args.threads == 1 else "wall")
    args.steps, args.batch_sizes = sorted(set(args.steps)), sorted(set(args.batch_sizes))
    args.sides = [parse_side(text) for text in dict.fromkeys(["bptt", *args.baselines, *args.sides])]
    for side in args.sides:  # an option's range is the objective's to check, before hours of timing rather than after
        model = make_model(4, args, hidden_size=2)
        make_objective(side, model, 4, args)(*make_batch(4, 1, args))
    return args


def parse_side(text: str) -> Side:
    """``family:name=value,name=value`` -> a side.

    Raises:
        ValueError: family or option is unknown, or an option has no value.
    """
    family, _, rest = text.partition(":")
    if family not in BASELINES + FAMILIES:
        allowed = ", ".join(BASELINES + FAMILIES)
        raise ValueError(f"side {text!r}: allowed are {allowed}; options follow a colon, as in {SIDES[0]}")
    objective, tree = ({}, {}) if family in BASELINES else (_arguments(RecurrentLocalObjective), {})
    if family in ("tree+sweeps", "paper"):
        tree = {"max_symbols": None, "share": "none"} if family == "paper" else {"max_symbols": 8, "share": "capped"}
    side = Side(text, family, {}, tree)
    for item in filter(None, rest.split(",")):
        name, _, value = item.partition("=")
        if name not in objective and name not in tree or not value:
            allowed = ", ".join([*objective, *tree]) or "none"
            raise ValueError(f"side {text!r}, option {item!r}: allowed are {allowed}; write name=value, as in {SIDES[0]}")
        (side.tree if name in tree else side.options)[name] = _value(value)
    return side


def _arguments(function: Callable) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in OTHER_NAMES]


def _value(text: str) -> object:
    """A whole number, another number, or the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def make_model(n_steps: int, args: argparse.Namespace, hidden_size: int | None = None) -> RecurrentModel:
    """The classifier, the same weights for every side of a point."""
    torch.manual_seed(0)
    hidden_size = hidden_size or args.hidden_size
    cell = make_cell(args.cell, args.input_size or -(-N_PIXELS // n_steps), hidden_size)
    return RecurrentModel(cell, nn.Linear(hidden_size, N_CLASSES), readout="last").to(args.device)


def make_batch(n_steps: int, batch_size: int, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Random pixels [B, N, I] and classes [B]."""
    torch.manual_seed(1)
    x = torch.rand(batch_size, n_steps, args.input_size or -(-N_PIXELS // n_steps))
    return x.to(args.device), torch.randint(N_CLASSES, (batch_size,)).to(args.device)


def make_objective(side: Side, model: RecurrentModel, n_steps: int, args: argparse.Namespace) -> RecurrentObjective:
    """A side around a model."""
    if side.family in ("bptt", "one-step"):
        return RecurrentBackpropObjective(model, window=1 if side.family == "one-step" else None)
    if side.family == "fused":
        return FusedObjective(model).to(args.device)
    tree, cell = None, model.cell
    if side.tree:
        options = {**side.tree, "max_symbols": None if side.tree["max_symbols"] == "none" else side.tree["max_symbols"]}
        n_level = max(1, (n_steps - 1).bit_length())
        tree = RecurrentTree(args.cell, cell.input_size, cell.hidden_size, n_level, **options)
    inference = "tree" if side.family == "paper" else "sweeps"
    return RecurrentLocalObjective(model, inference, tree=tree, **side.options).to(args.device)


def make_step(side: Side, n_steps: int, x: Tensor, labels: Tensor, args: argparse.Namespace) -> Callable[[], Tensor]:
    """One training step of a side with a model of its own; returns the cross-entropy that the side reports."""
    objective = make_objective(side, make_model(n_steps, args), n_steps, args)
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


def measure(n_steps: int, batch_size: int, sides: Iterable[Side], args: argparse.Namespace) -> dict:
    """One point: all sides by turns."""
    x, labels = make_batch(n_steps, batch_size, args)
    steps = {side.name: make_step(side, n_steps, x, labels, args) for side in sides}
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
    for name, of_side in times.items():
        results[name] = {"ce": losses[name], "rounds": len(of_side)}
        for clock, seconds in zip(("wall", "processor"), zip(*of_side)):
            results[name][clock] = {"min": min(seconds), "median": median(seconds)}
    return {"steps": n_steps, "batch_size": batch_size, "sides": results}


def speedup(point: dict, side: str, over: str, clock: str) -> float | None:
    """How many times faster a side is; None where one of the two was not timed."""
    sides = point["sides"]
    return sides[over][clock]["min"] / sides[side][clock]["min"] if side in sides and over in sides else None


def crossover(points: Sequence[dict], side: str, over: str, clock: str) -> int | None:
    """The smallest N from which on a side is faster at every N that was measured; points of one batch size."""
    first = None
    for point in sorted(points, key=lambda p: -p["steps"]):
        if (speedup(point, side, over, clock) or 0.0) <= 1.0:
            break
        first = point["steps"]
    return first


def label(side: str, args: argparse.Namespace) -> str:
    """A side's name to read."""
    if side == "fused":
        return "nn.GRU" if args.cell == "gru" else "nn.RNN"
    for long, short in (("corrections", "M"), ("sweeps=", "K="), ("linearization=", "A="), ("chunk=", "c=")):
        family, colon, rest = side.partition(":")
        side = family + colon + rest.replace(long, short)
    return side.replace(",", ", ").replace(":", ": ")


def report_lines(points: Sequence[dict], args: argparse.Namespace) -> list[str]:
    """Where each side crosses BPTT and the fused layer, by batch size; the last line has the best of our sides."""
    ours = [side.name for side in args.sides if side.family in FAMILIES]
    against = [name for name in ("bptt", "fused") if any(name == side.name for side in args.sides)]
    lines, best = [], []
    for batch_size in args.batch_sizes:
        of_batch = [point for point in points if point["batch_size"] == batch_size]
        found = {(side, over): crossover(of_batch, side, over, args.clock) for side in ours for over in against}
        for side in ours:
            reached = ", ".join(f"{label(over, args)} {_number(found[side, over])}" for over in against)
            lines.append(f"batch {batch_size}, {label(side, args)}: faster from N on: {reached}")
        firsts = [min((found[side, over] for side in ours if found[side, over]), default=None) for over in against]
        reached = ", ".join(f"{label(over, args)} {_number(first)}" for over, first in zip(against, firsts))
        best.append(f"batch {batch_size}: {reached}")
    return [*lines, "crossover N, best of our sides, against " + "; ".join(best)]


def _number(first: int | None) -> str:
    return "never" if first is None else str(first)


def plot(points: Sequence[dict], args: argparse.Namespace) -> None:
    """Speed-up over explicit BPTT by N, a panel for each batch size, beside the paper's published curve. A side has no point
    where it was not timed."""
    n_columns = min(2, len(args.batch_sizes))
    n_rows = -(-len(args.batch_sizes) // n_columns)
    figure = new_figure(5.5 * n_columns, 3.6 * n_rows + 1.0)
    panels = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False).flatten()
    ours = [side.name for side in args.sides if side.family in FAMILIES]
    for axes, batch_size in zip(panels, args.batch_sizes):
        of_batch = sorted((p for p in points if p["batch_size"] == batch_size), key=lambda p: p["steps"])
        for side in args.sides:
            if side.family == "bptt":
                continue
            color = COLORS[ours.index(side.name) % len(COLORS)] if side.name in ours else "black"
            style = "-" if side.name in ours else "--" if side.family == "fused" else ":"
            ratios = [speedup(p, side.name, "bptt", args.clock) for p in of_batch]
            axes.plot([p["steps"] for p in of_batch], ratios, style, color=color, marker="o", markersize=3,
                      label=label(side.name, args))  # fmt: skip
        axes.plot(PUBLISHED.keys(), PUBLISHED.values(), color="0.6", linewidth=3, zorder=1,
                  label="published: the paper's HBLL-RNN (GPU, GRU, H = 2048, batch 128, bf16)")  # fmt: skip
        axes.axhline(1.0, color="0.3", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("N, steps of a sequence")
        axes.set_ylabel("speed-up over explicit BPTT")
        axes.set_title(f"batch {batch_size}", fontsize="medium")
        axes.grid(color="0.9")
    for axes in panels[len(args.batch_sizes) :]:
        axes.remove()
    threads = f", {args.threads} thread{'s' * (args.threads > 1)}" if args.device == "cpu" else ""
    place = describe_device(args.device) + threads
    precision = "bf16" if args.bf16 else "float32"
    title = f"ours: {place}, {args.cell}, H = {args.hidden_size}, {precision}, {args.clock} time"
    figure.suptitle(title, fontsize="medium")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=n_columns, fontsize="x-small")
    save_figure(figure, args.output.with_suffix(".png"))


def load(path: Path, setting: dict) -> list[dict]:
    """The points that a file holds already; none where there is no file.

    Raises:
        ValueError: it is of another setting, or no results.
    """
    if not path.exists():
        return []
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        stored, points = data["setting"], data["points"]
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
    """A row of the table for every side."""
    for side in (side.name for side in args.sides):
        row = point["sides"][side][args.clock]
        ratios = [speedup(point, side, over, args.clock) for over in ("bptt", "fused")]
        cells = "".join(f"{'-' if ratio is None else format(ratio, '.2f'):>9}" for ratio in ratios)
        print(f"{point['steps']:>6} {point['batch_size']:>6} {row['min'] * 1e3:>10.2f} {row['median'] * 1e3:>10.2f}{cells}  "
              f"{label(side, args)}", flush=True)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Times every side at every point that the output does not hold yet; prints the table, writes JSON and figure."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    setting = {name: getattr(args, name) for name in DECISIVE}
    setting |= {"device": describe_device(args.device), "torch": torch.__version__}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    known = {(point["steps"], point["batch_size"]): point for point in load(args.output, setting)}
    over_fused = f"/ {label('fused', args)}"
    print(f"{args.clock} time; the last two numbers are speed-ups")
    print(f"{'N':>6} {'batch':>6} {'ms min':>10} {'ms median':>10}{'/ bptt':>9}{over_fused:>9}  side")
    points = []
    for batch_size in args.batch_sizes:
        for n_steps in args.steps:
            before = known.get((n_steps, batch_size), {"sides": {}})["sides"]
            if any(side.name not in before for side in args.sides):
                # all again, those of earlier runs too: times are comparable only within one interleaved measurement
                names = [side.name for side in args.sides]
                others = [parse_side(name) for name in before if name not in names]
                known[n_steps, batch_size] = measure(n_steps, batch_size, [*args.sides, *others], args)
                data = {"setting": setting, "points": [known[key] for key in sorted(known)]}
                atomic_write(args.output, json.dumps(data, indent=1) + "\n")
            points.append(known[n_steps, batch_size])
            print_point(points[-1], args)
    plot([known[key] for key in sorted(known)], args)  # earlier runs' other N too
    print("\n".join(report_lines(points, args)))
    return points


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
