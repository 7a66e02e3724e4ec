"""HBLL beside backprop in one run: same data order, initial weights and steps, a learning rate tuned for each method.

    python train/experiments/compare.py --report-only              # the stored runs of train/results/
    python train/experiments/compare.py --output new.json          # all of them again
    python train/experiments/compare.py --quick                    # minutes: the same, too short to mean much
    python train/experiments/compare.py --task induction           # a task that one block cannot do
    python train/experiments/compare.py --data code                # Python source, a text where depth matters
    python train/experiments/compare.py --cell gru --n-level 2     # 3 GRU layers, beside backprop through depth and time

A method is an inference with options, such as "sweeps:forward=2,backward=1", "tree", "backprop:depth_mix=sandwich", or a
short name: "backprop-3" (a model of its own that runs the default path of 3 blocks), "mix" (sweeps on the full path and
the depth mix), "backprop-mix" (the same mix by backprop). Every method tries every learning rate with the first seed, and
beyond the grid, in factors of two, as long as its best one lies at the edge (three steps at most). The one with the lowest
validation loss (of the method's deepest path) is kept for the other seeds. The test split is only reported.

Recurrent stacks read the text window after window and carry their states on, unless --no-carry-state is given: all methods
alike, in training and where they are evaluated.

Results are added to a JSON file run by run, and a run that is in the file is not done again; two processes may share one.

New names in version 0.2: --methods (was --sides), --depth-mix (--mix), --context-length (--block-size), --alignment-every
(--probe-every). Files of results and names of methods from before are read as they are.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # before torch loads OpenMP, see train/lm.py
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from comparisons.code_text import VOCAB_SIZE, code_folder
from comparisons.depth_methods import DepthMethod
from comparisons.methods import distinct
from comparisons.plots import plot_depth
from comparisons.program import add_figure_options, as_program, figure_of
from comparisons.report import report_depth
from comparisons.results import Comparison, Results
from comparisons.runs import DepthShape, depth_training, train_depth
from comparisons.tasks import LanguageTask, SyntheticTask, Text
from comparisons.turns import seconds_by_turns, told_step_times, with_step_times
from hbll_seq.data.tasks import make_task
from hbll_seq.data.tokenizer import Tokenizer
from hbll_seq.data.tokens import load_tokenizer, load_tokens
from hbll_seq.data.windows import TokenWindows
from hbll_seq.models.config import CELLS, HBLLConfig
from hbll_seq.objectives.depth_mix import DEFAULT_MIX, MIXES
from hbll_seq.training.settings import block_cells
from hbll_seq.utils.arguments import Parser

RESULTS = Path(__file__).resolve().parents[1] / "results"
CODE = "code"
METHODS = [*(f"backprop-{k}" for k in range(1, 8)), "backprop-mix", "tree", "sweeps", "sweeps:linearization=low_rank", "mix"]
TASKS = {
    "text": {},
    "induction": {},
    "induction-2": {"hops": 2, "context_length": 128},
    "recall": {},
    "listops": {},
}
TRANSFORMER = "transformer"
#: beside backprop; the tree carries no states
OF_RECURRENT = ["sweeps", "mix"]
#: what a short run and a synthetic task change of the defaults below
QUICK = dict(steps=60, lrs=[3e-3], seeds=[0], eval_batches=4, eval_every=20, alignment_every=20,
             methods=["backprop-1", "backprop-7", "tree", "sweeps", "mix"])  # fmt: skip
ON_TASKS = dict(n_embd=64, batch_size=32, steps=600, lrs=[1e-3, 2e-3], eval_every=25, alignment_every=100, eval_batches=16,
                methods=["backprop-1", "backprop-7", "backprop-mix", "tree", "sweeps", "mix"])  # fmt: skip


def options() -> Parser:
    """What the command line takes."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--task", choices=TASKS, default="text", help="text, or a synthetic task: induction of one or two hops, associative "
        f"recall, nested list operations; tasks have their own defaults: {ON_TASKS}")
    add("--output", type=Path, help="JSON file of results (default: "
        "train/results/compare[-TASK][-code][-CELL-LEVEL][-quick].json)")
    add("--quick", action="store_true", help=f"defaults for a short run: {QUICK}")
    add("--methods", nargs="+", default=METHODS, help=f"what is compared (default: {' '.join(METHODS)}; of a recurrent "
        f"stack backprop-N with all its blocks, {' '.join(OF_RECURRENT)})")
    add("--depth-mix", choices=MIXES, default=DEFAULT_MIX, help=f"what mix and backprop-mix train (default: {DEFAULT_MIX})")
    add("--data", default="bundled", help=f"text, as for train/lm.py, or {CODE!r}: the source of SymPy (BSD licence) of the "
        f"index, with a tokenizer of {VOCAB_SIZE:,} pieces of its own (default: bundled)")  # fmt: skip
    add("--cache", type=Path, help="folder that keeps texts, tokenizers and tokens (default: that of train/lm.py)")
    add("--n-level", type=int, default=3, help="levels D: 2**D - 1 blocks (default: 3)")
    add("--cell", default=TRANSFORMER, help=f"kind of block: {', '.join(CELLS)}; or one for each block, as in "
        f"gru,transformer,gru (default: {TRANSFORMER})")
    add("--carry-state", action=argparse.BooleanOptionalAction, help="recurrent blocks start a window from their states "
        "after the one before; each row of a batch then reads its own stretch of the text (default: where all blocks are "
        "recurrent)")
    add("--n-embd", type=int, default=128, help="width of the stream (default: 128)")
    add("--n-head", type=int, default=4, help="attention heads (default: 4)")
    add("--context-length", type=int, default=128, help="context of text in tokens (default: 128)")
    add("--batch-size", type=int, default=4, help="windows of a step (default: 4)")
    add("--steps", type=int, default=3000, help="of training (default: 3000)")
    add("--warmup-steps", type=int, default=100, help="of linear warm-up (default: 100)")
    add("--lrs", type=float, nargs="+", default=[1.5e-3, 3e-3], help="learning rates that every method tries, and beyond "
        "(default: 1.5e-3 3e-3)")  # fmt: skip
    add("--seeds", type=int, nargs="+", default=[0, 1], help="the first one tunes the learning rate (default: 0 1)")
    add("--eval-batches", type=int, default=40, help="batches of validation and test text (16 windows; of a task "
        "32) (default: 40)")  # fmt: skip
    add("--eval-every", type=int, default=500, help="steps between two evaluations on a quarter of that (default: 500)")
    add("--alignment-every", type=int, default=250, help="steps between two comparisons of the gradient with the exact one "
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
    first = parser.parse_known_args(argv)[0]
    task, cell = first.task, first.cell.replace(" ", "").strip("[]()")
    config = HBLLConfig(n_level=first.n_level, cell=block_cells(cell))
    if task != "text":
        parser.set_defaults(**ON_TASKS)
    if "--quick" in argv:
        parser.set_defaults(**QUICK)
    if config.has_recurrence:
        parser.set_defaults(methods=[f"backprop-{config.n_layer}", *OF_RECURRENT])
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
        what = [task] if task != "text" else [CODE] if args.data == CODE else []
        name = "-".join(["compare", *what, *told, *(["quick"] if args.quick else [])])
        args.output = RESULTS / f"{name}.json"
    return args


def setting_of(args: argparse.Namespace) -> dict[str, object]:
    """What all runs of a file of results have in common, but for the text's fingerprint. What came later than the first
    stored files is left out where it is as it was in them."""
    names = ("task", "depth_mix", "data", "context_length", *DepthShape.__dataclass_fields__, "carry_state")
    setting = {name: getattr(args, name) for name in names}
    return {k: v for k, v in setting.items() if (k, v) not in (("cell", TRANSFORMER), ("carry_state", False))}


def task_of(args: argparse.Namespace) -> LanguageTask:
    """What is learned. Raises ValueError when the text cannot be used."""
    if args.task != "text":
        return SyntheticTask(make_task(args.task.removesuffix("-2"), **TASKS[args.task]))
    if args.data == CODE:
        source = str(code_folder(args.cache))
        tokenizer = load_tokenizer(source, VOCAB_SIZE, cache_dir=args.cache)
    else:
        source, tokenizer = args.data, Tokenizer.default()
    splits = ("train", "validation", "test")
    windows = {s: TokenWindows(load_tokens(source, s, tokenizer, cache_dir=args.cache), args.context_length) for s in splits}
    return Text(windows, tokenizer.vocab_size, args.carry_state)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing, then prints the table and writes the plot beside the JSON file."""
    args = parse(argv)
    torch.set_num_threads(args.threads or os.cpu_count() or 1)
    task = task_of(args)
    methods = distinct(DepthMethod.named(name, args.depth_mix, args.n_level, args.cell) for name in args.methods)
    for method in methods:
        method.check(args.carry_state)  # before the first run, not hours later
    shape = DepthShape(**{name: getattr(args, name) for name in DepthShape.__dataclass_fields__})
    # text and tokenizer too: a changed file is another comparison
    results = Results(args.output, {**setting_of(args), "text": task.fingerprint}, "depth")

    def train(method: DepthMethod, lr: float, seed: int) -> dict:
        return train_depth(method, lr, seed, task, shape)

    comparison = Comparison(results, None if args.report_only else train)
    runs = comparison.at_rates(methods, lambda method: comparison.rate(method, args.lrs, args.seeds[0]), args.seeds)
    if args.time_rounds:
        trainings = {m.description: depth_training(m, args.lrs[0], args.seeds[0], task, shape)[0] for m in methods}
        results.add_step_times(seconds_by_turns(trainings, args.time_rounds))
    runs = with_step_times(runs, results.step_times)
    carried = "; states carried from window to window" if args.carry_state else "; every window from the zero state"
    if results.step_times:
        print(told_step_times(results.step_times))
    print(report_depth(runs, task.metric, "" if args.cell == TRANSFORMER else carried))
    others = [name for name in results.methods() if name not in {method.name for method in methods}]
    if args.report_only and others:
        print(f"the file also holds, for --methods: {' '.join(others)}")
    if path := figure_of(args):
        plot_depth(path, runs, task.metric)


if __name__ == "__main__":
    as_program(main)
