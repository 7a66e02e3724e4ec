"""HBLL-RNN beside backpropagation through time in one run: same data order, initial weights and steps, tuned rates.

    python train/compare_rnn.py                       # the stored runs of train/results/; with --output new.json, all again
    python train/compare_rnn.py --cell mingru         # the cell whose gates read the input alone
    python train/compare_rnn.py --task copy-64        # remember three symbols over 64 steps
    python train/compare_rnn.py --quick               # a minute: too short to mean much

A side is "bptt", "truncated:window=16" (credit goes back to the last multiple of 16 steps), "one-step" (exact states, no
credit through time), "sweeps" (local losses from messages along time) with options as in
"sweeps:sweeps=2,corrections=2,chunk=8,linearization=zero", or "tree:sweeps=4" (HBLL-RNN as published, K = 4, 0 leaves its
consistency stage out). Every side tries every learning rate with the first seed, and beyond the grid while its best one
lies at the edge; the one with the lowest validation loss is kept for the
other seeds. What is evaluated is the deployed network. Results are added to a JSON file run by run, and a run that is in
the file is not done again; two processes may share one.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # before torch loads OpenMP, see train/lm.py
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from hbll_seq.data.sources import open_corpus
from hbll_seq.data.tokenizer import Tokenizer
from hbll_seq.data.tokens import load_tokens
from hbll_seq.layers.cells import CELL_KINDS
from hbll_seq.training.plots import new_figure, save_figure
from hbll_seq.training.recurrent_comparison import (
    CopyProblem,
    RecurrentProblem,
    RecurrentShape,
    StreamProblem,
    train_recurrent,
)
from hbll_seq.training.recurrent_sides import RecurrentSide, dial_of
from hbll_seq.training.results import Results, deepest, tune

RESULTS = Path(__file__).parent / "results"
BLOCK_SIZE = 128
TASKS = ("bytes", "text", "copy-64", "copy-256")
SIDES = ["bptt", "one-step", "sweeps"]
#: what a side "sweeps" does where it does not say otherwise: with chunks it needs no tree for a first estimate
DIAL = {"sweeps": 1, "corrections": 1, "chunk": 8, "linearization": "zero", "init": "state"}
#: the same where what was read long ago decides: text forgets soon enough to need no stand-in for Jacobians
DIAL_ON_COPY = {**DIAL, "sweeps": 4, "corrections": 4, "linearization": "secant"}
CHUNKS_ON_COPY = 8  # errors of the learned maps multiply from chunk to chunk: more than about so many they do not bear
QUICK = dict(steps=40, warmup_steps=10, lrs=[4e-3], seeds=[0], eval_batches=2, eval_every=10, probe_every=20)
ON_COPY = dict(batch_size=64, n_embd=16, eval_batches=8, eval_every=100)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", choices=TASKS, default="bytes", help="text as bytes or as tokens, or copying over a delay; the latter has "
        f"its own defaults: {ON_COPY}")
    add("--cell", choices=CELL_KINDS, default="gru")
    add("--output", type=Path, help="JSON file of results (default: train/results/compare-rnn-TASK-CELL[-quick].json)")
    add("--quick", action="store_true", help=f"defaults for a short run: {QUICK}")
    add("--sides", nargs="+", help=f"what is compared (default: {' '.join(SIDES)}; with --report-only all that is stored)")
    add("--data", default="bundled", help="text, as for train/lm.py (default: bundled)")
    add("--n-embd", type=int, default=64, help="width of the embedding (default: 64)")
    add("--hidden", type=int, default=128, help="width of the state (default: 128)")
    add("--memory", type=float, help="longest memory in steps that the gates are set to at first, 0 for none (default: on "
        "text and with Elman cells none, where copying its delay)")
    add("--block-size", type=int, help=f"steps N of a training window of text (default: {BLOCK_SIZE})")
    add("--batch-size", type=int, default=16)
    add("--steps", type=int, default=3000)
    add("--warmup-steps", type=int, default=50)
    add("--clip", type=float, default=1.0)
    add("--weight-decay", type=float, default=1e-4)
    add("--lrs", type=float, nargs="+", default=[4e-3, 8e-3], help="learning rates that every side tries, and beyond")
    add("--seeds", type=int, nargs="+", default=[0, 1], help="the first one tunes the learning rate")
    add("--eval-batches", type=int, default=24, help="windows of each of 64 stretches of text (of a task: batches of 64)")
    add("--eval-every", type=int, default=500, help="steps between two evaluations on a quarter of that")
    add("--probe-every", type=int, default=250, help="steps between two comparisons of the gradient with BPTT's")
    add("--threads", type=int, help="CPU threads (default: all cores)")
    add("--report-only", action="store_true", help="run nothing: print and draw what the file of results holds")
    argv = sys.argv[1:] if argv is None else argv
    if parser.parse_known_args(argv)[0].task.startswith("copy"):
        parser.set_defaults(**ON_COPY)
    if "--quick" in argv:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)
    delay = delay_of(args.task)
    if args.memory is None and delay is not None and not args.cell.startswith("elman"):
        args.memory = float(delay)
    args.memory = args.memory or None
    if args.output is None:
        args.output = RESULTS / f"compare-rnn-{args.task}-{args.cell}{'-quick' * args.quick}.json"
    return args


def delay_of(task: str) -> int | None:
    """Steps that a copying task asks to remember over; None of a text."""
    return int(task.removeprefix("copy-")) if task.startswith("copy-") else None


def default_dial(task: str, cell: str) -> dict[str, object]:
    """What a side "sweeps" does on a task and with a cell where it does not say otherwise."""
    delay = delay_of(task)
    if delay is None:
        return dial_of(cell, DIAL)
    return dial_of(cell, {**DIAL_ON_COPY, "chunk": max(DIAL["chunk"], delay // CHUNKS_ON_COPY)})


def problem_of(args: argparse.Namespace) -> RecurrentProblem:
    """What is learned. Raises ValueError when the text cannot be used."""
    delay = delay_of(args.task)
    if delay is not None:
        if args.block_size is not None:
            raise ValueError(f"block-size={args.block_size} with task={args.task!r}: its delay decides; leave it out")
        return CopyProblem(delay)
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
    return StreamProblem(streams, vocab_size, args.block_size or BLOCK_SIZE, digest.hexdigest())


def report(runs: dict[str, list[dict]], metric: str, unit: str) -> str:
    """Figures by side, what they cost, and one last line with the difference to BPTT."""
    lines = [f"test {metric} of the deployed network ({unit}), by seed",
             f"{'side':>58}  {'lr':>6}  {metric:>17}  {'s/step':>7}  "
             "cosine to BPTT's gradient: lowest; last, by seed"]  # fmt: skip
    for side, of_side in runs.items():
        values = ", ".join(f"{run['test'][0][metric]:.4f}" for run in of_side)
        cosines = [[probe[1] for probe in run["probes"]] for run in of_side if run["probes"]]
        cosine = f"{min(map(min, cosines)):.3f}; {', '.join(f'{c[-1]:.3f}' for c in cosines)}" if cosines else ""
        seconds = sum(run["seconds"] / run["curve"][-1][0] for run in of_side) / len(of_side)
        lines.append(f"{side:>58}  {of_side[0]['lr']:>6.2g}  {values:>17}  {seconds:>7.4f}  {cosine}")
    parts = []
    for side, of_side in runs.items():
        pairs = [(run, ref) for run in of_side for ref in runs.get("bptt", ()) if run["seed"] == ref["seed"]]
        if side != "bptt" and pairs:
            parts.append(f"{side} " + ", ".join(f"{a['test'][0][metric] - b['test'][0][metric]:+.4f}" for a, b in pairs))
    lines.append(f"\n{metric} minus BPTT's at equal steps: " + ("; ".join(parts) or "no run of both"))
    return "\n".join(lines)


def plot(path: Path, runs: dict[str, list[dict]], metric: str) -> None:
    """Validation figure over steps and over seconds, first seed of each side."""
    figure = new_figure(10.0, 4.2)
    by_step, by_second = figure.subplots(1, 2)
    for side, of_side in runs.items():
        run = of_side[0]
        curve = run["evaluations"]
        if not curve:  # a run shorter than one evaluation
            continue
        steps, values = zip(*curve)
        per_step = run["seconds"] / run["curve"][-1][0]
        marker = "o" if len(steps) == 1 else None  # a line of one point shows nothing
        by_step.plot(steps, values, marker=marker, label=side)
        by_second.plot([step * per_step for step in steps], values, marker=marker, label=side)
    for axes, label in ((by_step, "steps"), (by_second, "seconds of training")):
        axes.set_xlabel(label)
        axes.set_ylabel(f"validation {metric}")
        axes.grid(axis="y", color="0.9")
    if not by_second.has_data():
        by_second.set_title("no evaluation before the end", fontsize="small")
    else:
        by_second.legend(fontsize="x-small", loc="best")
    save_figure(figure, path)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing, then prints the table and writes the plot beside the JSON file."""
    args = parse(argv)
    torch.set_num_threads(args.threads or os.cpu_count() or 1)
    problem = problem_of(args)
    shape = RecurrentShape(**{name: getattr(args, name) for name in RecurrentShape.__dataclass_fields__})
    setting = {"task": args.task, "block_size": problem.block_size, **vars(shape), "text": problem.fingerprint}
    results = Results(args.output, setting)
    names = args.sides or (results.sides() if args.report_only else SIDES)
    sides = [RecurrentSide.parse(name, default_dial(args.task, args.cell)) for name in dict.fromkeys(names)]
    for side in sides:
        side.check(args.cell, problem.block_size)  # before the first run, not hours later

    def ensure(side: RecurrentSide, lr: float, seed: int) -> dict:
        found = results.find(side.name, lr, seed, side.method)
        if found is None:
            found = train_recurrent(side, lr, seed, problem, shape)
            results.add(found)
        return found

    runs: dict[str, list[dict]] = {}
    for side in sides:
        if args.report_only:
            wanted = (side.name, args.seeds[0], side.method)
            tried = {run["lr"]: run for run in results.runs if (run["side"], run["seed"], run["method"]) == wanted}
            if not tried:
                continue
            lr = min(tried, key=lambda lr: deepest(tried[lr])["loss"])  # noqa: B023
            found = [results.find(side.name, lr, seed, side.method) for seed in args.seeds]
            runs[side.name] = [run for run in found if run is not None]
        else:
            grid = args.lrs if side.lr is None else [side.lr]
            lr = tune(lambda lr: deepest(ensure(side, lr, args.seeds[0]))["loss"], grid)  # noqa: B023
            runs[side.name] = [ensure(side, lr, seed) for seed in args.seeds]
    if not any(runs.values()):
        wanted = f"no run of {', '.join(names)}" if names else "no run"
        raise ValueError(f"{args.output} holds {wanted}: leave --report-only out to make them")
    print(report(runs, problem.metric, {"bytes": "bits per byte", "text": "bits per token"}.get(args.task, "%")))
    plot(args.output.with_suffix(".png"), runs, problem.metric)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
