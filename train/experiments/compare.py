"""HBLL beside backprop in one run: same data order, initial weights and steps, a learning rate tuned for each side.

    python train/compare.py                        # the stored runs of train/results/; with --output new.json, all again
    python train/compare.py --quick                # a few minutes: the same comparison, too short to mean much
    python train/compare.py --task induction       # a task that one block cannot do
    python train/compare.py --cell gru --n-level 2 # 3 GRU layers: messages along depth and time beside backprop through both

A side is an inference with options, such as "sweeps:sweeps=2,corrections=1", "tree", "backprop:mix=sandwich", or a
short name: "backprop-3" (a model of its own that runs the default path of 3 blocks), "mix" (sweeps on the full path and
the mix of paths), "backprop-mix" (the same mix by backprop). Every side tries every learning rate with the first seed,
and beyond the grid, in factors of two, as long as its best one lies at the edge (three steps at most). The one with the
lowest validation loss (of the side's deepest path) is kept for the other seeds. The test split is only reported.

Recurrent stacks read the text window after window and carry their states on, unless --no-carry-state is given: all sides
alike, in training and where they are evaluated.

Results are added to a JSON file run by run, and a run that is in the file is not done again; two processes may share one.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # before torch loads OpenMP, see train/lm.py
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from hbll_seq.config import CELLS, HBLLConfig
from hbll_seq.data import TokenWindows, load_tokens
from hbll_seq.mix import DEFAULT_MIX, MIXES
from hbll_seq.tasks import make_task
from hbll_seq.tokenizer import Tokenizer
from hbll_seq.training.comparison import Problem, Shape, TaskProblem, TextProblem, train
from hbll_seq.training.plots import plot_comparison
from hbll_seq.training.results import Results, deepest, tune
from hbll_seq.training.settings import block_cells
from hbll_seq.training.sides import Side

RESULTS = Path(__file__).parent / "results"
SIDES = [*(f"backprop-{k}" for k in range(1, 8)), "backprop-mix", "tree", "sweeps", "sweeps:linearization=secant", "mix"]
TASKS = {
    "text": {},
    "induction": {},
    "induction-2": {"hops": 2, "block_size": 128},
    "recall": {},
    "listops": {},
}
TRANSFORMER = "transformer"
#: beside backprop; the tree carries no states
OF_RECURRENT = ["sweeps", "mix"]
#: what a short run and a synthetic task change of the defaults below
QUICK = dict(steps=60, lrs=[3e-3], seeds=[0], eval_batches=4, eval_every=20, probe_every=20,
             sides=["backprop-1", "backprop-7", "tree", "sweeps", "mix"])  # fmt: skip
ON_TASKS = dict(n_embd=64, batch_size=32, steps=600, lrs=[1e-3, 2e-3], eval_every=25, probe_every=100, eval_batches=16,
                sides=["backprop-1", "backprop-7", "backprop-mix", "tree", "sweeps", "mix"])  # fmt: skip


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", choices=TASKS, default="text", help="text, or a synthetic task: induction of one or two hops, associative "
        f"recall, nested list operations; tasks have their own defaults: {ON_TASKS}")
    add("--output", type=Path, help="JSON file of results (default: "
        "train/results/compare[-TASK][-CELL-LEVEL][-quick].json)")
    add("--quick", action="store_true", help=f"defaults for a short run: {QUICK}")
    add("--sides", nargs="+", default=SIDES, help=f"what is compared (default: {' '.join(SIDES)}; of a recurrent stack "
        f"backprop-N with all its blocks, {' '.join(OF_RECURRENT)})")
    add("--mix", choices=MIXES, default=DEFAULT_MIX, help=f"what mix and backprop-mix train (default: {DEFAULT_MIX})")
    add("--data", default="bundled", help="text, as for train/lm.py (default: bundled)")
    add("--n-level", type=int, default=3, help="levels D: 2**D - 1 blocks (default: 3)")
    add("--cell", default=TRANSFORMER, help=f"kind of block: {', '.join(CELLS)}; or one for each block, as in "
        "gru,transformer,gru")
    add("--carry-state", action=argparse.BooleanOptionalAction, help="recurrent blocks start a window from their states "
        "after the one before; each row of a batch then reads its own stretch of the text (default: where all blocks are "
        "recurrent)")
    add("--n-embd", type=int, default=128)
    add("--n-head", type=int, default=4)
    add("--block-size", type=int, default=128, help="context of text in tokens (default: 128)")
    add("--batch-size", type=int, default=4)
    add("--steps", type=int, default=3000)
    add("--warmup-steps", type=int, default=100)
    add("--lrs", type=float, nargs="+", default=[1.5e-3, 3e-3], help="learning rates that every side tries, and beyond")
    add("--seeds", type=int, nargs="+", default=[0, 1], help="the first one tunes the learning rate")
    add("--eval-batches", type=int, default=40, help="batches of validation and test text (16 windows; of a task 32)")
    add("--eval-every", type=int, default=500, help="steps between two evaluations on a quarter of that")
    add("--probe-every", type=int, default=250, help="steps between two comparisons of the gradient with the exact one")
    add("--threads", type=int, help="CPU threads (default: all cores)")
    add("--report-only", action="store_true", help="run nothing: print and draw what the file of results holds")
    argv = sys.argv[1:] if argv is None else argv
    first = parser.parse_known_args(argv)[0]
    task, cell = first.task, first.cell.replace(" ", "").strip("[]()")
    config = HBLLConfig(n_level=first.n_level, cell=block_cells(cell))
    if task != "text":
        parser.set_defaults(**ON_TASKS)
    if "--quick" in argv:
        parser.set_defaults(**QUICK)
    if config.has_recurrence:
        parser.set_defaults(sides=[f"backprop-{config.n_layer}", *OF_RECURRENT])
    args = parser.parse_args(argv)
    args.cell = cell
    if args.carry_state is None:
        args.carry_state = task == "text" and not config.has_attention
    if args.carry_state and not config.has_recurrence:
        raise ValueError(f"carry_state=True with cell={cell!r}: only recurrent blocks have a state to carry; leave it out, "
                         "or choose a recurrent --cell")  # fmt: skip
    if args.carry_state and task != "text":
        raise ValueError(f"carry_state=True with task={task!r}: its windows do not follow one another; leave it out")
    if args.output is None:
        told = [cell.replace(",", "+")] if cell != TRANSFORMER else []
        told += [str(args.n_level)] if told or args.n_level != parser.get_default("n_level") else []
        name = "-".join(["compare", *([task] if task != "text" else []), *told, *(["quick"] if args.quick else [])])
        args.output = RESULTS / f"{name}.json"
    return args


def setting_of(args: argparse.Namespace) -> dict[str, object]:
    """What all runs of a file of results have in common, but for the text's fingerprint. What came later than the first
    stored files is left out where it is as it was in them."""
    names = ("task", "mix", "data", "block_size", *Shape.__dataclass_fields__, "carry_state")
    setting = {name: getattr(args, name) for name in names}
    return {k: v for k, v in setting.items() if (k, v) not in (("cell", TRANSFORMER), ("carry_state", False))}


def problem_of(args: argparse.Namespace) -> Problem:
    """What is learned. Raises ValueError when the text cannot be used."""
    if args.task != "text":
        return TaskProblem(make_task(args.task.removesuffix("-2"), **TASKS[args.task]))
    tokenizer = Tokenizer.default()
    splits = ("train", "validation", "test")
    windows = {s: TokenWindows(load_tokens(args.data, s, tokenizer), args.block_size) for s in splits}
    return TextProblem(windows, tokenizer.vocab_size, args.carry_state)


def at_depth(run: dict, depth: int, metric: str) -> float | None:
    """The test figure of a run at a depth, None where it did not train that one."""
    return next((row[metric] for row in run["test"] if row["depth"] == depth), None)


def report(runs: dict[str, list[dict]], metric: str, how: str = "") -> str:
    """The figures by depth, what they cost, the bits per token of text, and one last line with the ratio.

    Args:
        runs: side -> its runs at its learning rate, one per seed.
        metric: the figure's name in a row.
        how: the networks were evaluated, where that is to be told.
    """

    def cell(values: list[float]) -> str:
        return f"{sum(values) / len(values):.2f} ± {(max(values) - min(values)) / 2:.2f}" if values else "-"

    def figures(side: str, depth: int) -> list[float]:
        return [row[metric] for run in runs.get(side, ()) for row in run["test"] if row["depth"] == depth]

    depths = sorted({row["depth"] for of_side in runs.values() for run in of_side for row in run["test"]})
    single = {depth: f"backprop-{depth}" for depth in depths}
    others = [side for side in runs if side not in single.values()]
    lines = [f"test {metric}, mean and half range over {max(map(len, runs.values()))} seed(s)" + how,
             f"{'blocks':>6}  {'backprop, own model':>19}" + "".join(f"  {side:>16}" for side in others)]  # fmt: skip
    for depth in depths:
        lines.append(f"{depth:>6}  {cell(figures(single[depth], depth)):>19}"
                     + "".join(f"  {cell(figures(side, depth)):>16}" for side in others))  # fmt: skip
    lines.append(f"\n{'side':>24}  {'lr':>7}  {'seeds':>5}  {'work/step':>9}  {'s/step':>7}  cosine to the exact gradient: "
                 "first, lowest, last")  # fmt: skip
    for side, of_side in runs.items():
        probes = [probe for run in of_side for probe in run["probes"]]
        cosines = f"{probes[0][1]:.3f}, {min(p[1] for p in probes):.3f}, {probes[-1][1]:.3f}" if probes else ""
        alone = [probe[4] for probe in probes if len(probe) > 4]
        cosines += f"; of the full path alone: {alone[0]:.3f}, {min(alone):.3f}, {alone[-1]:.3f}" if alone else ""
        steps = of_side[0]["curve"][-1][0]
        seconds = sum(run["seconds"] for run in of_side) / len(of_side) / steps
        lines.append(f"{side:>24}  {of_side[0]['lr']:>7.2g}  {len(of_side):>5}  {of_side[0]['work']:>9.1f}  {seconds:>7.3f}  "
                     + cosines)  # fmt: skip
    lines.append("")
    for side in others:
        ratios = {}
        for depth in depths:
            ours, theirs = ({r["seed"]: at_depth(r, depth, metric) for r in runs.get(s, ())} for s in (side, single[depth]))
            both = [ours[s] / theirs[s] for s in ours if ours[s] is not None and theirs.get(s)]
            if both:
                ratios[depth] = sum(both) / len(both)
        if len(ratios) > 1:
            by_depth = ", ".join(f"{depth}: {ratio:.3f}" for depth, ratio in ratios.items())
            lines.append(f"{side}, ratio to the model of each depth: {by_depth}")
    last = f"backprop-{depths[-1]}"
    if metric == "perplexity":
        if lines[-1]:
            lines.append("")
        lines += bits_per_token(runs, last)
    parts = []
    for side in others if last in runs else ():
        pairs = [(run, ref) for run in runs[side] for ref in runs[last] if run["seed"] == ref["seed"]]
        values = [(deepest(run, "test")[metric], deepest(ref, "test")[metric]) for run, ref in pairs]
        parts.append(f"{side} " + ", ".join(f"{ours / max(theirs, 1e-9):.3f}" for ours, theirs in values))
    lines.append(f"\nratio of {metric} on the full path to {depths[-1]}-block backprop at equal steps: "
                 + ("; ".join(parts) or "no run of it"))  # fmt: skip
    return "\n".join(lines)


def bits_per_token(runs: dict[str, list[dict]], last: str) -> list[str]:
    """Two lines: log2 of the perplexity on each side's deepest path by seed, and how much more that is than the side
    ``last`` has."""

    def bits(run: dict) -> float:
        return deepest(run, "test")["loss"] / math.log(2)

    all_bits = {side: {run["seed"]: bits(run) for run in of_side} for side, of_side in runs.items()}
    own = (f"{side} " + ", ".join(f"{value:.4f}" for value in of_side.values()) for side, of_side in all_bits.items())
    lines = ["bits per token on each side's deepest path, by seed: " + "; ".join(own)]
    parts = []
    for side, of_side in all_bits.items():
        less = [value - all_bits[last][seed] for seed, value in of_side.items() if seed in all_bits.get(last, ())]
        if less and not side.removeprefix("backprop-").isdigit():
            mean = f" (mean {sum(less) / len(less):+.4f})" if len(less) > 1 else ""
            parts.append(f"{side} " + ", ".join(f"{value:+.4f}" for value in less) + mean)
    return [*lines, f"bits minus {last}'s at equal steps: " + ("; ".join(parts) or "no run of both")]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing, then prints the table and writes the plot beside the JSON file."""
    args = parse(argv)
    torch.set_num_threads(args.threads or os.cpu_count() or 1)
    problem = problem_of(args)
    sides = [Side.parse(name, args.mix) for name in args.sides]
    for side in sides:
        side.check(args.n_level, args.cell, args.carry_state)  # before the first run, not hours later
    shape = Shape(**{name: getattr(args, name) for name in Shape.__dataclass_fields__})
    # text and tokenizer too: a changed file is another comparison
    setting = {**setting_of(args), "text": problem.fingerprint}
    results = Results(args.output, setting)

    def ensure(side: Side, lr: float, seed: int) -> dict:
        found = results.find(side.name, lr, seed, side.method(args.n_level, args.cell))
        if found is None:
            found = train(side, lr, seed, problem, shape)
            results.add(found)
        return found

    chosen = {}
    for side in sides:
        if args.report_only:
            rates = {run["lr"] for run in results.runs if run["side"] == side.name}
            found = {lr: results.find(side.name, lr, args.seeds[0], side.method(args.n_level, args.cell)) for lr in rates}
            tried = {lr: run for lr, run in found.items() if run is not None}
            if tried:
                chosen[side.name] = min(tried, key=lambda lr: deepest(tried[lr])["loss"])  # noqa: B023
        else:
            lowest = lambda lr, side=side: deepest(ensure(side, lr, args.seeds[0]))["loss"]  # noqa: E731
            chosen[side.name] = tune(lowest, args.lrs)
    runs: dict[str, list[dict]] = {}
    for seed in args.seeds:
        for side in sides:
            if side.name in chosen:
                lr = chosen[side.name]
                method = side.method(args.n_level, args.cell)
                run = results.find(side.name, lr, seed, method) if args.report_only else ensure(side, lr, seed)
                if run is not None:
                    runs.setdefault(side.name, []).append(run)
    others = [name for name in results.sides() if name not in {side.name for side in sides}]
    if not runs:
        raise ValueError(f"{args.output} holds no run of {', '.join(args.sides)}: leave --report-only out to make them")
    carried = "; states carried from window to window" if args.carry_state else "; every window from the zero state"
    print(report(runs, problem.metric, "" if args.cell == TRANSFORMER else carried))
    if args.report_only and others:
        print(f"the file also holds, for --sides: {' '.join(others)}")
    plot_comparison(args.output.with_suffix(".png"), runs, problem.metric)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
