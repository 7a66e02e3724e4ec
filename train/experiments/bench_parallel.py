"""A training step on several processes: ours beside backprop on one, DDP, FSDP and pipelines.

    python train/experiments/bench_parallel.py                                # an hour on two cores that are free; goes on
    python train/experiments/bench_parallel.py --quick                        # a minute: too short to mean much
    python train/experiments/bench_parallel.py --link 0.2 1                   # and over a link of 0.2 ms and 1 Gb/s
    python train/experiments/bench_parallel.py --ranks 4 --steps 2 --repeats 1      # counts; two cores give no times of 4

A step is forward, backward, reduction of gradients, clipping and AdamW of a language model, on processes of one thread each,
which talk by gloo on CPUs (by nccl where each has a GPU: this has never been run). All methods have the same weights, batches
and loss:

{methods}

Each method has processes of its own. In every round backprop on one process takes its steps while the others wait, and then
the method takes its own: what else the machine does falls on both, and what is compared is their ratio. "backprop" itself is
measured in this way too, so that its ratio shows the noise. All processes keep the memory that they let go of
(MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_). Bytes are what operations return on a rank, beyond parameters,
their gradients and the state of AdamW (as in bench_depth.py), of forward and backward; for a pipeline with its buffers.
"recomp." is the same with activation checkpointing, "w. grads" that with the parameters' gradients (.grad = None before).
"core" is the share of a core that backprop had in its turns: well below 1 the machine was busy, and processes that wait for
one another lose more by it than one process does. Such ratios say little.
"parameters" adds up what a rank holds of parameters and of the state of AdamW. Messages (to one other rank), collectives and
bytes are those that a rank sends in a step; the largest number of all ranks is shown. They are counted where they pass
torch.distributed. DistributedDataParallel sends from C++: its buckets are what it says of them, each reduced round a ring.

With --link the same steps are also taken over a slow link: a message arrives DELAY ms after its last byte has left, which
takes bytes / (GBIT Gb/s), and a collective that is waited for takes as long once all have come to it. One that overlaps with
work is late by its own time from when a rank begins it, so that the link is never worse to the others than to ours.

"refused" is what torch says, such as 1F1B of fewer micro-batches than stages.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from comparisons import parallel_methods, parallel_worker
from comparisons.group import run_group
from comparisons.parallel_methods import Method, Shape
from comparisons.parallel_report import lines_of_agreement, plot, table_of, title_of
from comparisons.parallel_training import Case
from comparisons.parallel_worker import BOARD, Plan
from comparisons.program import as_program, parse_benchmark
from comparisons.wire import Link, Wire
from hbll_seq.utils.arguments import Parser
from hbll_seq.utils.atomic import atomic_write

__doc__ = __doc__.format(methods=parallel_methods.__doc__.split("\n\n")[1])
METHODS = ("backprop", "ddp", "fsdp", "1f1b:m=1", "1f1b:m=2", "1f1b:m=4", "1f1b:m=8", "gpipe:m=4", "interleaved:m=4",
           "zero-bubble:m=4", "zbv:m=4", "exact", "ours:K=1,M=1", "ours:K=1,M=0", "local",
           "local:depths=prefixes", "ahead", "ahead:depths=prefixes")  # fmt: skip
QUICK = dict(blocks=7, width=[32], context_length=32, vocab=64, steps=3, repeats=2,
             methods=["backprop", "ddp", "1f1b:m=1", "1f1b:m=2", "exact", "local"])  # fmt: skip
#: with torch, what a result holds for
DECISIVE = ("batch_size", "context_length", "vocab", "heads")


def add_options(parser: Parser, methods: Sequence[str], quick: Mapping[str, Any], name: str) -> None:
    """What is said of a measurement, whatever is trained. ``methods``: the default ones; ``name``: of the stored file."""
    add = parser.add_argument
    add("--ranks", type=int, default=2, help="processes R (default: 2)")
    add("--steps", type=int, default=10, help="steps of a turn (default: 10)")
    add("--repeats", type=int, default=3, help="rounds of turns; their median is reported (default: 3)")
    add("--check-steps", type=int, default=5, help="first steps, whose losses are compared (default: 5)")
    add("--methods", nargs="+", default=list(methods), help=f"see above (default: {' '.join(methods)})")
    add("--link", type=float, nargs=2, metavar=("DELAY_MS", "GBIT"), help="a slow link, beside the one that is there")
    add("--patience", type=float, default=1200.0, help="seconds after which a method is given up (default: 1200)")
    add("--again", action="store_true", help="measure what the file holds already, too")
    add("--quick", action="store_true", help=f"defaults for a short run: {dict(quick)}")
    add("--output", type=Path, help="JSON file, written after every method and gone on with; a figure goes beside it "
        f"(default: train/results/{name}.json, or {name}-quick.json)")  # fmt: skip


def check_options(args: argparse.Namespace, numbers: Sequence[str]) -> None:
    """Sets ``args.device``. Raises ValueError where ``numbers``, or what :func:`add_options` adds, is out of range."""
    for name in (*numbers, "ranks", "steps", "repeats", "check_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}={getattr(args, name)}: must be at least 1")
    args.device = "cuda" if torch.cuda.device_count() >= args.ranks else "cpu"
    if args.link and not (args.link[0] >= 0 and args.link[1] > 0):
        raise ValueError(f"link={args.link}: DELAY_MS must be at least 0 and GBIT above 0")
    if args.link and args.device != "cpu":
        raise ValueError(f"link={args.link} on GPUs: messages of processes on CPUs alone are held back; leave --link out")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked. Raises ValueError for a value out of range, or a method that there is not."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--blocks", type=int, default=31, help="2**D - 1 (default: 31)")
    add("--width", type=int, nargs="+", default=[128, 256], help="of states (default: 128 256)")
    add("--heads", type=int, default=4, help="attention heads (default: 4)")
    add("--batch-size", type=int, default=4, help="windows of a step, over all processes (default: 4)")
    add("--context-length", type=int, default=128, help="tokens of a window (default: 128)")
    add("--vocab", type=int, default=4096, help="tokens of the vocabulary (default: 4096)")
    add_options(parser, METHODS, QUICK, "bench_parallel")
    args = parse_benchmark(parser, argv, "bench_parallel", QUICK)
    check_options(args, ("batch_size", "context_length", "vocab", "heads"))
    if args.blocks < 1 or (args.blocks + 1) & args.blocks:
        raise ValueError(f"blocks={args.blocks}: a tree needs 2**D - 1 blocks, such as 7, 15 or 31")
    for width in args.width:
        if width < 1 or width % (2 * args.heads):
            raise ValueError(f"width={width} with heads={args.heads}: heads of an even width divide it")
    for method in (Method.named(name) for name in args.methods):
        if method.kind in parallel_methods.OURS:
            method.inference(args.blocks, args.ranks)
    return args


def run_method(name: str, case: Case, ranks: int, plan: Plan, patience: float) -> dict:
    """A row of results: what the ranks found, or ``refused``: why one of them could not."""
    n_ranks = case.processes(name, ranks)
    with TemporaryDirectory() as folder:
        if plan.link is not None:
            Wire.make_board(Path(folder) / BOARD, n_ranks)
        found, why = run_group(parallel_worker.work, n_ranks, Path(folder), (name, case, plan), patience, case.device)
    if found is None:
        return {"refused": why}
    return joined(found) | ({"recompute_refused": why} if why else {})


def joined(found: Sequence[dict]) -> dict:
    """One row of what the ranks found: lists over the ranks, losses put together, times of the first rank."""
    first = found[0]
    row = {name: first[name] for name in ("seconds", "baseline_seconds", "linked_seconds", "baseline_losses",
                                             "baseline_processor_seconds")}  # fmt: skip
    row["losses"] = [sum(of_step) / (1 if first["total"] else len(found)) for of_step in zip(*(f["losses"] for f in found))]
    for name in ("collectives", "messages", "bytes", "activation_bytes", "step_bytes", "parameter_bytes", "state_bytes",
                 "recomputed_bytes", "recomputed_step_bytes"):  # fmt: skip
        if all(name in f for f in found):
            row[name] = [f[name] for f in found]
    row["idle_segments"] = first["idle_segments"]
    row["processor_seconds"] = [median(f["processor_seconds"]) for f in found]
    row["loss_difference"] = max(abs(a - b) for a, b in zip(row["losses"], row["baseline_losses"]))
    row["norm_difference"] = max(abs(a / b - 1) for a, b in zip(first["norms"], first["baseline_norms"]))
    return row


def load(path: Path, setting: dict) -> list[dict]:
    """The points that a file holds already; none where there is no file. Raises ValueError for those of another setting."""
    if not path.exists():
        return []
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        stored, points = data["setting"], data["points"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no results of this script: choose another --output, or remove it") from error
    differ = [f"{name} {stored.get(name)!r}, here {value!r}" for name, value in setting.items() if stored.get(name) != value]
    if differ:
        raise ValueError(f"{path} holds another setting ({'; '.join(differ)}): choose another --output, or remove it")
    return points


def point_of(points: list[dict], key: dict) -> dict:
    """The point of that key, a new one where there is none."""
    for point in points:
        if all(point[name] == value for name, value in key.items()):
            return point
    points.append({**key, "methods": {}})
    return points[-1]


def measure(cases: Iterable[tuple[dict, Case]], args: argparse.Namespace, decisive: Sequence[str]) -> list[dict]:
    """Measures every method that the output does not hold yet, for each key of a point and its case; prints tables, writes
    JSON and a figure. ``decisive``: options that a result holds for."""
    setting = {name: getattr(args, name) for name in decisive} | {"device": args.device, "torch": torch.__version__}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    points = load(args.output, setting)
    link = Link(args.link[0] / 1e3, args.link[1] * 1e9 / 8) if args.link else None
    plan = Plan(args.steps, args.repeats, args.check_steps, link)
    shown = []
    for key, case in cases:
        point = point_of(points, {**key, "ranks": args.ranks, "link": args.link})
        for name in args.methods:
            if args.again or name not in point["methods"]:
                print(f"{title_of(point)}: {name}", flush=True)
                row = run_method(name, case, args.ranks, plan, args.patience)
                point["methods"][name] = {**row, "steps": args.steps, "exact": case.is_exact(name)}
                atomic_write(args.output, json.dumps({"setting": setting, "points": points}, indent=1) + "\n")
        shown.append({**point, "methods": {name: point["methods"][name] for name in args.methods}})
        print(table_of(shown[-1]), *lines_of_agreement(shown[-1]), sep="\n", flush=True)
    plot(shown, args.output.with_suffix(".png"))
    return shown


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """See :func:`measure`."""
    args = parse(argv)
    cases = [({"blocks": args.blocks, "width": width},
              Shape(args.blocks, width, args.heads, args.batch_size, args.context_length, args.vocab, device=args.device))
             for width in args.width]  # fmt: skip
    return measure(cases, args, DECISIVE)


if __name__ == "__main__":
    as_program(main)
