"""HBLL-RNN beside backpropagation through time in one run: same data order, initial weights and steps, tuned rates.

    python train/experiments/compare_rnn.py --report-only          # the stored runs of train/results/
    python train/experiments/compare_rnn.py --output new.json      # all of them again
    python train/experiments/compare_rnn.py --cell mingru          # the cell whose gates read the input alone
    python train/experiments/compare_rnn.py --task copy-64         # remember three symbols over 64 steps
    python train/experiments/compare_rnn.py --task copy-256 --small     # a small network, batch 4: sweeps save time
    python train/experiments/compare_rnn.py --quick                # a minute: too short to mean much

A method is "bptt", "fused" (BPTT by torch's own layer), "truncated:window=16" (credit goes back to the last multiple of 16
steps), "one-step" (exact states, no credit through time), "sweeps" (local losses from forward and backward iterations along
time) with options as in "sweeps:forward=2,backward=2,chunk_size=8,linearization=zero", or "tree:consistency=4" (HBLL-RNN as
published, K = 4, 0 leaves its consistency stage out). Every method tries every learning rate with the first seed, and beyond
the grid while its best one lies at the edge; the one with the lowest validation loss is kept for the other seeds. What is
evaluated is the deployed network. Results are added to a JSON file run by run, and a run that is in the file is not done
again; two processes may share one.

New names in version 0.2: --methods (was --sides), --context-length (--block-size), --alignment-every (--probe-every).
Files of results and names of methods from before are read as they are.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before torch loads OpenMP, see train/lm.py
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from comparisons.fused_bptt import FUSED, FusedBPTT
from comparisons.methods import distinct
from comparisons.plots import plot_time
from comparisons.program import add_figure_options, as_program, figure_of
from comparisons.report import report_time
from comparisons.results import Comparison, Results
from comparisons.runs import TimeShape, time_training, train_time
from comparisons.tasks import Copying, LanguageTask, Stream
from comparisons.time_methods import TimeMethod, defaults_of
from comparisons.turns import seconds_by_turns, told_step_times, with_step_times
from hbll_seq.data.sources import open_corpus
from hbll_seq.data.tokenizer import Tokenizer
from hbll_seq.data.tokens import load_tokens
from hbll_seq.layers.cells import CELL_KINDS
from hbll_seq.utils.arguments import Parser

RESULTS = Path(__file__).resolve().parents[1] / "results"
CONTEXT_LENGTH = 128
TASKS = ("bytes", "text", "copy-64", "copy-256")
METHODS = ["bptt", "one-step", "sweeps"]
#: what a method "sweeps" does where it does not say otherwise: with chunks it needs no tree for a first estimate
SWEEPS = {"forward": 1, "backward": 1, "chunk_size": 8, "linearization": "zero", "init": "state"}
#: the same where what was read long ago decides: text forgets soon enough to need no approximation of Jacobians
SWEEPS_ON_COPY = {**SWEEPS, "forward": 4, "backward": 4, "linearization": "shared_matrix"}
CHUNKS_ON_COPY = 8  # errors of the learned maps multiply from chunk to chunk: more than about so many they do not bear
QUICK = dict(steps=40, warmup_steps=10, lrs=[4e-3], seeds=[0], eval_batches=2, eval_every=10, alignment_every=20)
ON_COPY = dict(batch_size=64, n_embd=16, eval_batches=8, eval_every=100)

#: copying by a network so small, in batches so small, that a step of BPTT is the overhead of its calls one after the other
SMALL = dict(hidden=64, batch_size=4, steps=3000, lrs=[8e-3, 1.6e-2], seeds=[0, 1, 2], eval_batches=16, alignment_every=500,
             threads=1, methods=["bptt", "truncated:window=16", "sweeps:forward=3,backward=3,chunk_size=16"])  # fmt: skip


def options() -> Parser:
    """What the command line takes."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--task", choices=TASKS, default="bytes", help="text as bytes or as tokens, or copying over a delay; the latter has "
        f"its own defaults: {ON_COPY}")
    add("--cell", choices=CELL_KINDS, default="gru", help="recurrent cell (default: gru)")
    add("--output", type=Path, help="JSON file of results (default: train/results/compare-rnn-TASK-CELL[-small]"
        "[-quick].json)")
    add("--quick", action="store_true", help=f"defaults for a short run: {QUICK}")
    add("--small", action="store_true", help=f"defaults for copying over 256 steps where time is what sweeps save: {SMALL}")
    add("--methods", nargs="+", help=f"what is compared (default: {' '.join(METHODS)}; with --report-only all that is "
        "stored)")
    add("--data", default="bundled", help="text, as for train/lm.py (default: bundled)")
    add("--n-embd", type=int, default=64, help="width of the embedding (default: 64)")
    add("--hidden", type=int, default=128, help="width of the state (default: 128)")
    add("--memory", type=float, help="longest memory in steps that the gates are set to at first, 0 for none (default: on "
        "text and with Elman cells none, where copying its delay)")
    add("--context-length", type=int, help=f"steps N of a training window of text (default: {CONTEXT_LENGTH})")
    add("--batch-size", type=int, default=16, help="windows of a step (default: 16)")
    add("--steps", type=int, default=3000, help="of training (default: 3000)")
    add("--warmup-steps", type=int, default=50, help="of linear warm-up (default: 50)")
    add("--clip", type=float, default=1.0, help="limit of the gradient's norm (default: 1)")
    add("--weight-decay", type=float, default=1e-4, help="of AdamW (default: 1e-4)")
    add("--lrs", type=float, nargs="+", default=[4e-3, 8e-3], help="learning rates that every method tries, and beyond "
        "(default: 4e-3 8e-3)")  # fmt: skip
    add("--seeds", type=int, nargs="+", default=[0, 1], help="the first one tunes the learning rate (default: 0 1)")
    add("--eval-batches", type=int, default=24, help="windows of each of 64 stretches of text (of a task: batches "
        "of 64) (default: 24)")  # fmt: skip
    add("--eval-every", type=int, default=500, help="steps between two evaluations on a quarter of that (default: 500)")
    add("--alignment-every", type=int, default=250, help="steps between two comparisons of the gradient with BPTT's "
        "(default: 250)")  # fmt: skip
    add("--threads", type=int, help="CPU threads (default: all cores)")
    add("--time-rounds", type=int, default=0, help="take so many steps of all methods by turns once the runs are done, and "
        "store what a step took in place of each run's own times (100 are good; default: 0)")  # fmt: skip
    add_figure_options(parser)
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with the defaults that depend on others of its values.

    Raises:
        ValueError: two values do not go together.
    """
    parser, argv = options(), sys.argv[1:] if argv is None else argv
    if parser.parse_known_args(argv)[0].task.startswith("copy"):
        parser.set_defaults(**ON_COPY)
    if "--small" in argv:
        parser.set_defaults(**SMALL)
    if "--quick" in argv:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)
    delay = delay_of(args.task)
    if args.small and delay is None:
        raise ValueError(f"small=True with task={args.task!r}: it is for copying; leave it out, or choose --task copy-256")
    if args.memory is None and delay is not None and not args.cell.startswith("elman"):
        args.memory = float(delay)
    args.memory = args.memory or None
    if args.output is None:
        args.output = RESULTS / f"compare-rnn-{args.task}-{args.cell}{'-small' * args.small}{'-quick' * args.quick}.json"
    return args


def delay_of(task: str) -> int | None:
    """Steps that a copying task asks to remember over; None of a text."""
    return int(task.removeprefix("copy-")) if task.startswith("copy-") else None


def default_sweeps(task: str, cell: str) -> dict[str, object]:
    """What a method "sweeps" does on a task and with a cell where it does not say otherwise."""
    delay = delay_of(task)
    if delay is None:
        return defaults_of(cell, SWEEPS)
    return defaults_of(cell, {**SWEEPS_ON_COPY, "chunk_size": max(SWEEPS["chunk_size"], delay // CHUNKS_ON_COPY)})


def method_named(name: str, sweeps: Mapping[str, object], **network: Any) -> TimeMethod:
    """"fused", or what :meth:`TimeMethod.named` makes of a name."""
    return FusedBPTT(FUSED, FUSED, (), **network) if name == FUSED else TimeMethod.named(name, sweeps, **network)


def task_of(args: argparse.Namespace) -> LanguageTask:
    """What is learned. Raises ValueError when the text cannot be used."""
    delay = delay_of(args.task)
    if delay is not None:
        if args.context_length is not None:
            raise ValueError(f"context-length={args.context_length} with task={args.task!r}: its delay decides; leave it out")
        return Copying(delay)
    streams, digest = {}, hashlib.sha256()
    tokenizer = Tokenizer.default()
    for split in ("train", "validation", "test"):
        if args.task == "bytes":
            text = "".join(segment for segment in open_corpus(args.data, split).segments() if segment is not None)
            streams[split] = np.frombuffer(text.encode(), dtype=np.uint8)
            digest.update(streams[split].tobytes())
        else:
            stream = load_tokens(args.data, split, tokenizer)
            streams[split] = stream.tokens
            digest.update(stream.fingerprint.encode())
    vocab_size = 256 if args.task == "bytes" else tokenizer.vocab_size
    return Stream(streams, vocab_size, args.context_length or CONTEXT_LENGTH, digest.hexdigest())


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing, then prints the table and writes the plot beside the JSON file."""
    args = parse(argv)
    torch.set_num_threads(args.threads or os.cpu_count() or 1)
    task = task_of(args)
    shape = TimeShape(**{name: getattr(args, name) for name in TimeShape.__dataclass_fields__})
    setting = {"task": args.task, "context_length": task.context_length, **vars(shape), "text": task.fingerprint}
    results = Results(args.output, setting, "time")
    names = args.methods or (results.methods() if args.report_only else METHODS)
    network = dict(cell=args.cell, n_steps=task.context_length, memory=args.memory)
    sweeps = default_sweeps(args.task, args.cell)
    methods = distinct(method_named(name, sweeps, **network) for name in names)
    for method in methods:
        method.check()  # before the first run, not hours later

    def train(method: TimeMethod, lr: float, seed: int) -> dict:
        return train_time(method, lr, seed, task, shape)

    comparison = Comparison(results, None if args.report_only else train)
    runs = comparison.at_rates(methods, lambda method: comparison.rate(method, args.lrs, args.seeds[0]), args.seeds)
    if args.time_rounds:
        trainings = {m.description: time_training(m, args.lrs[0], args.seeds[0], task, shape)[0] for m in methods}
        results.add_step_times(seconds_by_turns(trainings, args.time_rounds))
    runs = with_step_times(runs, results.step_times)
    if results.step_times:
        print(told_step_times(results.step_times))
    print(report_time(runs, task.metric, {"bytes": "bits per byte", "text": "bits per token"}.get(args.task, "%")))
    if path := figure_of(args):
        plot_time(path, runs, task.metric)


if __name__ == "__main__":
    as_program(main)
