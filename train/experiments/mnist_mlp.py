"""Sigmoid MLPs on MNIST without residual connections or normalisation: local losses on the tree beside backprop.

    python train/experiments/mnist_mlp.py --data FOLDER_OF_IDX_FILES
    python train/experiments/mnist_mlp.py --data FOLDER_OF_IDX_FILES --layers 16 --widths 50 100 500
    python train/experiments/mnist_mlp.py --data FOLDER_OF_IDX_FILES --quick --output quick.json      # a minute: too short
    python train/experiments/mnist_mlp.py --report-only                                               # the stored runs

The paper's table: 4, 8 and 16 layers of 50, 100 and 500 units (100 epochs there). With N layers, N - 1 are blocks of the tree
and the last is the head. A method is "backprop", "tree" or "sweeps", with options as in "tree:state_weight=0.001" or
"backprop:depth_mix=octaves"; "backprop-3" is a model of its own that runs the path of 3 blocks alone. The tree's states are
without noise, as in the paper. The weight of its losses on states decides who wins in parameters that a loss on the classes
trains too: a thousandth was best on the validation images ("tree" alone is a tenth, as over language models).

Reported are, in percent of the test images, all blocks and, where a method trains them, the paths of D blocks and of one. For
each network every method tries every learning rate with the first seed, and beyond the grid, in factors of two, as long as
its best lies at the edge; the highest accuracy of its deepest path on the validation images decides. All start from the same
weights and read the same batches; rates rise for 100 steps and fall to zero along a cosine.

Results are added to a JSON file run by run, and a run that is in the file is not done again. Processes may share one: give
each other --layers, --widths or --methods.
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

from comparisons.digits import ClassesByDepth, check_choosing, load_digits, steps_of
from comparisons.methods import check_rate, distinct
from comparisons.mlp import MLPMethod, error_rate, report_mlp, train_mlp
from comparisons.program import as_program, check_stored
from comparisons.results import Comparison, Results, stored_setting
from comparisons.runs import Length
from hbll_seq.utils.arguments import Parser

RESULTS = Path(__file__).resolve().parents[1] / "results"
METHODS = ["backprop", "tree:state_weight=0.001"]
#: what a short run changes of the defaults
QUICK = dict(layers=[4], widths=[50], steps=400, seeds=[0], lrs=[3e-3])
EPOCHS = 10


def options() -> Parser:
    """What the command line takes."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--data", default="ylecun/mnist", help="folder of the four idx files, or a Hub id (default: ylecun/mnist)")
    add("--layers", type=int, nargs="+", help="sigmoid layers, powers of two (default: 4 8 16; with --report-only all that "
        "are stored)")  # fmt: skip
    add("--widths", type=int, nargs="+", help="units of a layer (default: 100; with --report-only all that are stored)")
    add("--methods", nargs="+", help=f"what is compared (default: {' '.join(METHODS)}; with --report-only all that is "
        "stored)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of weights and order; the first one tunes (default: 0 1 2)")
    add("--lrs", type=float, nargs="+", default=[1e-3, 3e-3], help="learning rates of AdamW that every method tries, and "
        "beyond (default: 1e-3 3e-3)")  # fmt: skip
    add("--train-images", type=int, help="use only the first so many (default: all that are not held out)")
    add("--validation-images", type=int, default=5000, help="hold out so many, the last ones of the training set "
        "(default: 5000)")  # fmt: skip
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int, help=f"passes over the images (default: {EPOCHS}; the paper: 100)")
    length.add_argument("--steps", type=int, help="of training, in place of epochs (default: as --epochs says)")
    add("--batch-size", type=int, default=64, help="images of a batch (default: 64)")
    add("--warmup-steps", type=int, default=100, help="of linear warm-up (default: 100)")
    add("--weight-decay", type=float, default=0.01, help="of AdamW (default: 0.01)")
    add("--eval-every", type=int, default=500, help="steps between two evaluations on the validation images (default: 500)")
    add("--output", type=Path, help="JSON file of results (default: train/results/mnist-mlp[-quick].json)")
    add("--quick", action="store_true", help=f"defaults for a short run: {QUICK}")
    add("--threads", type=int, default=1, help="CPU threads; small matrices gain nothing from more (default: 1)")
    add("--report-only", action="store_true", help="run nothing: print what the file of results holds")
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with the defaults that depend on others of its values.

    Raises:
        ValueError: a value is out of range, or there is no file to report on.
    """
    parser, argv = options(), sys.argv[1:] if argv is None else argv
    if "--quick" in argv:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)
    for lr in args.lrs:
        check_rate("--lrs", lr)
    for n_layers in args.layers or ():
        if n_layers < 2 or n_layers & (n_layers - 1):
            raise ValueError(f"layers={n_layers}: a tree needs a power of two, such as 4, 8 or 16")
    for name, values in (("widths", args.widths or ()), ("threads", (args.threads,))):
        if min(values, default=1) < 1:
            raise ValueError(f"{name}={min(values)}: must be a whole number of at least 1")
    if args.output is None:
        args.output = RESULTS / f"mnist-mlp{'-quick' * args.quick}.json"
    if args.epochs is None and args.steps is None:
        args.epochs = EPOCHS
    if args.report_only:
        check_stored(args.output)
    return args


def new_comparison(args: argparse.Namespace) -> Comparison:
    """A comparison that makes what is missing; all arguments but the methods are checked here."""
    check_choosing("--lrs", args.lrs, args.validation_images)
    digits = load_digits(args.data, args.train_images, args.validation_images)
    task = ClassesByDepth(digits.data, digits.fingerprint)
    n_train = len(task.data["train"][1])
    common = dict(batch_size=args.batch_size, warmup_steps=args.warmup_steps, weight_decay=args.weight_decay,
                  eval_every=args.eval_every)  # fmt: skip
    length = Length(steps=steps_of(args, n_train), clip=math.inf, **common)
    setting = {"task": "mnist", **common, "steps": length.steps, "data": task.fingerprint, "train_images": n_train,
               "validation_images": args.validation_images}  # fmt: skip
    torch.set_num_threads(args.threads)
    train = lambda method, lr, seed: train_mlp(method, lr, seed, task, length)
    return Comparison(Results(args.output, setting, "depth"), train, error_rate)


def stored_comparison(args: argparse.Namespace) -> Comparison:
    """A comparison that only finds what the file of results holds."""
    return Comparison(Results(args.output, stored_setting(args.output), "depth"), None, error_rate)


def networks_of(args: argparse.Namespace, runs: Sequence[dict]) -> dict[tuple[int, int], list[MLPMethod]]:
    """The networks, (layers, units), that were asked for, each with its methods.

    Args:
        args: of the command line.
        runs: that are stored.

    Raises:
        ValueError: a method does not fit.
    """
    pairs = [(n, width) for n in args.layers or (4, 8, 16) for width in args.widths or (100,)]
    if args.report_only:
        pairs = [(n, width) for n, width in dict.fromkeys((run["layers"], run["width"]) for run in runs)
                 if n in (args.layers or (n,)) and width in (args.widths or (width,))]  # fmt: skip
    found = {}
    for n, width in sorted(pairs):
        stored = dict.fromkeys(run["method"] for run in runs if (run["layers"], run["width"]) == (n, width))
        names = args.methods or (stored if args.report_only else METHODS)
        found[n, width] = distinct(MLPMethod.of(name, n, width) for name in names)
        for method in found[n, width]:
            method.check()  # before the first run, not hours later
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing and prints the table."""
    args = parse(argv)
    comparison = (stored_comparison if args.report_only else new_comparison)(args)
    results, networks = comparison.results, {}
    asked = networks_of(args, results.runs)
    if not asked:
        raise ValueError(f"{args.output} holds no network of these layers and widths: leave --report-only out to make it")
    for network, methods in asked.items():
        rate = lambda method: comparison.rate(method, args.lrs, args.seeds[0])
        networks[network] = comparison.at_rates(methods, rate, args.seeds)
    print(report_mlp(networks, results.setting))


if __name__ == "__main__":
    as_program(main)
