"""Sequential and permuted sequential MNIST: recurrent classifiers without backpropagation through time, beside BPTT.

    python train/experiments/seqmnist.py --data FOLDER_OF_IDX_FILES --permuted --n 16
    python train/experiments/seqmnist.py --data FOLDER_OF_IDX_FILES --quick      # a minute or so, too short to mean much
    python train/experiments/seqmnist.py --table                        # all that is stored, beside the paper's figures

The 784 pixels of a digit are read in N steps of ceil(784 / N), with zeros before the first (the paper's task, method.md 1.5;
--n 784 reads one pixel a step); --permuted, in one fixed order that is not that of the image. Methods, with options
as in "sweeps:forward=2,backward=2,lr=1e-3":

    bptt      backpropagation through time over the same cell
    truncated the same within windows of steps ("truncated:window=16"), and one-step: of one step
    sweeps    our form: local losses from K forward and M backward iterations over chunks of c steps, joined by a map that
              is learned
    tree      the paper's form; consistency=K of its consistency stage, 0 leaves that out

All are trained in one run on the same batches from the same weights. Reported are, in percent of the test digits:
"deployed", the cell f_0 run as an ordinary recurrent network, and for the paper's form also "tree", the output along
0 -> N/2 -> 3N/4 -> .. -> N, and f_D alone ("top" in the file), a feed-forward net on the whole digit.

With several rates after --lr every method tries each with the first seed, and beyond the grid as long as the best lies at
its edge; the highest accuracy on the validation images decides. Results are added to a JSON file run by run, and a run that
is in the file is not done again; two processes may share one.

New names in version 0.2: --methods (was --sides), --forward (--sweeps), --backward (--corrections), --chunk-size (--chunk),
--alignment-every (--probe-every). Files of results and names of methods from before are read as they are.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # before torch loads OpenMP, see train/lm.py
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from comparisons.digits import check_choosing, load_digits, steps_of
from comparisons.digits_table import error_rate, report_digits, stored_files
from comparisons.methods import check_rate, distinct
from comparisons.program import as_program, check_stored
from comparisons.report import report_classes
from comparisons.results import Comparison, Results, stored_setting
from comparisons.runs import Length, train_classifier
from comparisons.time_methods import DEFAULTS, INITS, TimeMethod, defaults_of
from hbll_seq.layers.cells import CELL_KINDS
from hbll_seq.models.sequence_classification import HBLLClassifierConfig
from hbll_seq.objectives.options import AXES
from hbll_seq.utils.arguments import Parser
from hbll_seq.utils.atomic import whole_folder

RESULTS = Path(__file__).resolve().parents[1] / "results"
METHODS = ["bptt", "one-step", "sweeps", "tree:consistency=0", "tree:consistency=4"]
#: every permuted task reads its pixels in the same order
PERMUTATION_SEED = 0
#: what a short run changes of the defaults
QUICK = dict(hidden=32, steps=60, seeds=[0])
EPOCHS = 5
RATE = 2e-3


def options() -> Parser:
    """What the command line takes."""
    parser = Parser(description=__doc__)
    add, sweeps = parser.add_argument, DEFAULTS["sweeps"]
    add("--data", default="ylecun/mnist", help="folder of the four idx files, or a Hub id (default: ylecun/mnist)")
    add("--permuted", action="store_true", help="read the pixels in one fixed random order (default: as they are)")
    add("--n", "--steps-per-image", dest="n_steps", type=int, default=16, help="N, steps of an image (default: 16)")
    add("--cell", choices=CELL_KINDS, default="gru", help="recurrent cell (default: gru)")
    add("--hidden", type=int, default=128, help="width of the state (default: 128; the paper: 2048)")
    add("--methods", nargs="+", help=f"what is compared (default: {' '.join(METHODS)}; with --report-only all that is "
        "stored)")
    add("--seeds", type=int, nargs="+", default=[0, 1], help="of weights and order; the first one tunes (default: 0 1)")
    add("--lr", type=float, nargs="+", help="learning rates that every method without one of its own tries (default: "
        "2e-3; with --report-only the best of those that are stored)")  # fmt: skip
    add("--train-images", type=int, help="use only the first so many (default: all that are not held out)")
    add("--validation-images", type=int, default=0, help="hold out so many, the last ones of the training set (default: 0)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int, help=f"passes over the images (default: {EPOCHS}; the paper: 200)")
    length.add_argument("--steps", type=int, help="of training, in place of epochs (default: as --epochs says)")
    add("--batch-size", type=int, default=128, help="images of a batch (default: 128)")
    add("--warmup-steps", type=int, default=50, help="of linear warm-up (default: 50)")
    add("--weight-decay", type=float, default=1e-4, help="of AdamW (default: 1e-4)")
    add("--clip", type=float, default=5.0, help="limit of the gradient's norm (default: 5)")
    add("--forward", type=int, default=sweeps["forward"], help=f"K of the method sweeps (default: {sweeps['forward']})")
    add("--backward", type=int, default=sweeps["backward"], help=f"M of it (default: {sweeps['backward']})")
    add("--chunk-size", type=int, help="its c, steps that an iteration takes one after the other (default: an eighth of N)")
    add("--linearization", choices=[kind.name for kind in AXES["time"].linearizations], help="its approximation of Jacobians "
        f"(default: {sweeps['linearization']}; of mingru diagonal, which is exact)")  # fmt: skip
    add("--init", choices=INITS, default=sweeps["init"], help=f"its first estimate of the states (default: {sweeps['init']})")
    add("--eval-every", type=int, default=500, help="steps between two evaluations on the validation images "
        "(default: 500)")  # fmt: skip
    add("--alignment-every", type=int, default=250, help="steps between two comparisons of the gradient with the exact one "
        "(default: 250)")  # fmt: skip
    add("--output", type=Path, help="JSON file of results (default: train/results/[p]smnist-N-CELL[-quick].json)")
    add("--save", type=Path, help="folder for the deployed models: SAVE/NAME-OF-OUTPUT/METHOD-lr=..-seed=.. "
        "(default: none is kept)")  # fmt: skip
    add("--quick", action="store_true", help=f"defaults for a short run: {QUICK}")
    add("--threads", type=int, help="CPU threads (default: as torch is set up)")
    add("--report-only", action="store_true", help="run nothing: print what the file of results holds")
    add("--table", type=Path, nargs="?", const=RESULTS, metavar="FOLDER", help="run nothing: print one table of all files of "
        "results in a folder, of every N and cell, beside the paper's figures (default folder: train/results)")  # fmt: skip
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with the defaults that depend on others of its values.

    Raises:
        ValueError: a learning rate is out of range, or there is no file to report on.
    """
    parser, argv = options(), sys.argv[1:] if argv is None else argv
    if "--quick" in argv:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)
    if args.lr is None and not args.report_only:
        args.lr = [RATE]
    for lr in args.lr or ():
        check_rate("--lr", lr)
    if args.output is None:
        name = f"{'p' * args.permuted}smnist-{args.n_steps}-{args.cell}{'-quick' * args.quick}"
        args.output = RESULTS / f"{name}.json"
    if args.epochs is None and args.steps is None:
        args.epochs = EPOCHS
    if args.report_only:
        check_stored(args.output)
    return args


def length_of(args: argparse.Namespace, n_train: int) -> Length:
    """Steps of a run. Raises ValueError when a value is out of range."""
    others = {name: getattr(args, name) for name in Length.__dataclass_fields__ if name != "steps"}
    return Length(steps=steps_of(args, n_train), **others)


def default_sweeps(args: argparse.Namespace) -> dict[str, object]:
    """What a method "sweeps" does where it does not say otherwise."""
    found = {name: getattr(args, name) for name in DEFAULTS["sweeps"]}
    if args.chunk_size is None:
        found["chunk_size"] = max(1, args.n_steps // 8)
    if args.linearization is None:  # the default, which depends on the cell
        found["linearization"] = defaults_of(args.cell, DEFAULTS["sweeps"])["linearization"]
    return found


def methods_of(args: argparse.Namespace, stored: Sequence[str] = ()) -> list[TimeMethod]:
    """What is compared: what was asked for, or else what is stored."""
    names = args.methods or (stored if args.report_only else METHODS)
    return distinct(TimeMethod.named(name, default_sweeps(args), args.cell, args.n_steps) for name in names)


# ------------------------------------------------------------------------------------------------------------------ runs


@dataclass
class DigitsComparison(Comparison):
    """The comparison of classifiers, whose models may be kept.

    folder: of a run's model; None keeps none.
    """

    folder: Callable[[TimeMethod, float, int], Path] | None = None

    def run(self, method: TimeMethod, lr: float, seed: int) -> dict | None:
        """See :meth:`Comparison.run`.

        Raises:
            ValueError: the run was stored without its model.
        """
        found = super().run(method, lr, seed)
        folder = self.folder and self.folder(method, lr, seed)
        if folder and found["finite"] and not (whole_folder(folder) / "config.json").is_file():
            raise ValueError(
                f"{method.name} lr={lr:g} seed={seed} of {self.results.path} was stored without its model, and "
                f"{folder} holds none: give another --output to train it again, or leave --save out"
            )
        return found


def new_comparison(args: argparse.Namespace) -> tuple[DigitsComparison, list[TimeMethod]]:
    """A comparison that makes what is missing, and its methods; all arguments are checked before the first run."""
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"threads={args.threads}: must be a whole number of at least 1")
    methods = methods_of(args)
    config = HBLLClassifierConfig(n_steps=args.n_steps, cell=args.cell, hidden_size=args.hidden,
                                  permutation_seed=PERMUTATION_SEED if args.permuted else None)  # fmt: skip
    for method in methods:
        method.check()
    task = load_digits(args.data, args.train_images, args.validation_images)
    n_train = len(task.data["train"][1])
    length = length_of(args, n_train)
    setting = {**config.to_dict(), **asdict(length), "data": task.fingerprint, "train_images": n_train,
               "validation_images": args.validation_images}  # fmt: skip
    results = Results(args.output, setting, "time")
    if args.threads is not None:
        torch.set_num_threads(args.threads)

    def folder(method: TimeMethod, lr: float, seed: int) -> Path:
        return args.save / args.output.stem / f"{method.label}-lr={lr:g}-seed={seed}"

    def train(method: TimeMethod, lr: float, seed: int) -> dict:
        model, run = train_classifier(method, lr, seed, config, task, length)
        if args.save is not None and run["finite"]:  # before the result, so that a stored run has its model
            settings = {"method": method.name, "description": method.description, "lr": lr, "seed": seed, **asdict(length)}
            data = f"{'permuted ' * args.permuted}sequential MNIST"
            model.save_pretrained(folder(method, lr, seed), data=data, settings=settings,
                                  test_accuracy=run["test"]["deployed"])  # fmt: skip
        return run

    return DigitsComparison(results, train, error_rate, None if args.save is None else folder), methods


def stored_comparison(args: argparse.Namespace) -> tuple[DigitsComparison, list[TimeMethod]]:
    """A comparison that only finds what the file of results holds, and its methods."""
    setting = stored_setting(args.output)
    args.n_steps, args.cell = setting["n_steps"], setting["cell"]
    results = Results(args.output, setting, "time")
    return DigitsComparison(results, None, error_rate), methods_of(args, results.methods())


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing and prints the table."""
    args = parse(argv)
    if args.table is not None:
        print(report_digits(stored_files(args.table)))
        return
    comparison, methods = (stored_comparison if args.report_only else new_comparison)(args)
    setting = comparison.results.setting
    if args.lr is None:  # report what is stored
        rate = partial(comparison.stored_rate, seed=args.seeds[0])
    else:
        check_choosing("--lr", args.lr, setting["validation_images"])
        rate = partial(comparison.tuned_rate, rates=args.lr, seed=args.seeds[0])
    print(report_classes(comparison.at_rates(methods, rate, args.seeds), setting))


if __name__ == "__main__":
    as_program(main)
