"""CIFAR-10 and CIFAR-100 by a vision transformer of 7 blocks: the paper's tree and sweeps beside backprop, at every depth.

    python train/experiments/cifar.py --quick                                    # generated images: a minute or two
    python train/experiments/cifar.py --data FOLDER --train-images 10000 --epochs 20 --n-embd 64 --patch-size 8
    python train/experiments/cifar.py --data uoft-cs/cifar100 --epochs 500       # the paper's length
    python train/experiments/cifar.py --data FOLDER --missing 0.5                # half of every image is missing
    python train/experiments/cifar.py --data FOLDER --wrong-labels 0.2
    python train/experiments/cifar.py --report-only --output FILE                # beside the paper's figures

A method is an inference with options, such as "sweeps:forward=2,backward=2,chunk_size=2", or a short name: "backprop-3" (a
model of its own that runs and trains the default path of 3 blocks), "tree" (the paper's), "mix" (sweeps on the full path and
the depth mix), "backprop-mix" (the same mix by backprop). Batches, first weights and steps are the same for all of them.

Every method tries every learning rate with the first seed, and beyond the grid, in factors of two, as long as its best one
lies at the edge. The highest accuracy of its deepest path on held-out images decides. The test images are only reported.

Missing patches have the value of the mean pixel, in training others at each reading and on test images always the same. Wrong
labels are those of training images alone.

Results are added to a JSON file run by run, and a run that is in the file is not done again; several processes may share one.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

if __name__ == "__main__":  # before torch loads OpenMP, see train/lm.py
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from comparisons.depth_methods import DepthMethod
from comparisons.image_report import paper_of, report_images
from comparisons.image_task import BATCH, ImageTask, divide, generated
from comparisons.methods import check_rate, distinct
from comparisons.program import as_program, check_stored
from comparisons.results import Comparison, Results, deepest, stored_setting
from comparisons.runs import DepthShape, a_device, train_depth
from hbll_seq.data.images import load_images
from hbll_seq.layers.patches import POOLINGS
from hbll_seq.objectives.depth_mix import DEFAULT_MIX, MIXES
from hbll_seq.utils.arguments import Parser
from hbll_seq.utils.values import as_whole

RESULTS = Path(__file__).resolve().parents[1] / "results"
#: beside backprop-N of 1 to D blocks and of all
METHODS = ["tree", "sweeps", "mix", "backprop-mix"]
GENERATED = "generated"
#: what a short run changes of the defaults
QUICK = dict(data=GENERATED, epochs=2, train_images=2000, validation_images=500, batch_size=50, patch_size=8, n_embd=32,
             n_head=2, lrs=[2e-3], alignment_every=40, warmup_steps=10,
             methods=["backprop-3", "backprop-7", "tree", "sweeps", "mix"])  # fmt: skip
#: generated images: for training and validation, and for the test
N_GENERATED = (2500, 1000)


def options() -> Parser:
    """What the command line takes."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--data", default="uoft-cs/cifar10", help="folder with train/CLASS/*.png and test/CLASS/*.png, or with CIFAR's "
        f"binary files; a Hub id; or {GENERATED!r} (default: uoft-cs/cifar10)")  # fmt: skip
    add("--cache", type=Path, help="folder that keeps images that were read (default: that of train/lm.py)")
    add("--methods", nargs="+", help=f"what is compared (default: backprop-N of 1 to D and of all blocks, "
        f"{' '.join(METHODS)}; with --report-only all that is stored)")
    add("--depth-mix", choices=MIXES, default=DEFAULT_MIX, help=f"what mix and backprop-mix train (default: {DEFAULT_MIX})")
    add("--missing", type=float, default=0.0, help="share of the patches that every image lacks (default: 0)")
    add("--wrong-labels", type=float, default=0.0, help="share of the training images with a wrong label (default: 0)")
    add("--augment", action=argparse.BooleanOptionalAction, default=True, help="training images are shifted by up to 4 "
        "pixels and mirrored at random (default: on)")
    add("--train-images", type=int, help="use only so many (default: all that are not held out)")
    add("--validation-images", type=int, default=5000, help="hold out so many of the training images (default: 5000)")
    add("--n-level", type=int, default=3, help="levels D: 2**D - 1 blocks (default: 3)")
    add("--n-embd", "--width", dest="n_embd", type=int, default=128, help="width of the stream (default: 128)")
    add("--n-head", type=int, default=4, help="attention heads (default: 4)")
    add("--patch-size", type=int, default=4, help="height and width of a patch in pixels (default: 4)")
    add("--pooling", choices=POOLINGS, default="mean", help="what the head reads: the mean of all states, or a class token's "
        "(default: mean)")
    add("--batch-size", type=int, default=256, help="images of a step (default: 256, the paper's)")
    add("--epochs", type=int, default=20, help="passes over the images (default: 20; the paper: 500)")
    add("--warmup-steps", type=int, default=100, help="of linear warm-up (default: 100)")
    add("--lrs", "--lr", dest="lrs", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3], help="learning rates that every "
        "method tries (default: 5e-4 1e-3 2e-3; the paper: 5e-4)")
    add("--seeds", type=int, nargs="+", default=[0], help="the first one tunes the learning rate (default: 0)")
    add("--eval-every", type=int, help="steps between two evaluations on validation images (default: a fifth of the run)")
    add("--alignment-every", type=int, default=250, help="steps between two comparisons of the gradient with the exact one "
        "(default: 250)")  # fmt: skip
    add("--threads", type=int, help="CPU threads (default: as torch is set up)")
    add("--output", type=Path, help="JSON file of results (default: "
        "train/results/cifar-DATA[-missing-SHARE][-wrong-SHARE][-quick].json)")
    add("--quick", action="store_true", help=f"defaults for a short run: {QUICK}")
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
    for name in ("n_level", "n_embd", "n_head", "patch_size", "batch_size", "epochs", "alignment_every"):
        as_whole(name.replace("_", "-"), getattr(args, name), 1)
    if args.threads is not None:
        torch.set_num_threads(as_whole("threads", args.threads, 1))
    if args.methods is None and not args.report_only:
        depths = dict.fromkeys([*range(1, args.n_level + 1), 2**args.n_level - 1])
        args.methods = [*(f"backprop-{depth}" for depth in depths), *METHODS]
    if args.output is None:
        changes = [f"{word}-{share:g}" for word, share in (("missing", args.missing), ("wrong", args.wrong_labels)) if share]
        name = "-".join(["cifar", Path(args.data).name, *changes, *(["quick"] if args.quick else [])])
        args.output = RESULTS / f"{name}.json"
    if args.report_only:
        check_stored(args.output)
    return args


def task_of(args: argparse.Namespace) -> ImageTask:
    """What is learned. Raises ValueError when the images cannot be had."""
    if args.data == GENERATED:
        train, test = (generated(n, seed) for seed, n in enumerate(N_GENERATED))
    else:
        train, test = (load_images(args.data, split, cache_dir=args.cache) for split in ("train", "test"))
    images = divide(train, test, args.train_images, args.validation_images)
    return ImageTask(images, args.patch_size, args.pooling, args.missing, args.wrong_labels, args.augment, a_device())


def shape_of(args: argparse.Namespace, task: ImageTask) -> DepthShape:
    """The model and the length of every run. Raises ValueError when a batch has more images than there are."""
    n_train = len(task.data["train"][1])
    if args.batch_size > n_train:
        raise ValueError(f"batch-size={args.batch_size} of {n_train} training images: choose 1 to {n_train}")
    steps = args.epochs * (n_train // args.batch_size)
    every = max(1, steps // 5) if args.eval_every is None else as_whole("eval-every", args.eval_every, 1)
    longest = max(len(task.data[split][1]) for split in ("validation", "test"))
    given = {name: getattr(args, name) for name in ("n_level", "n_embd", "n_head", "batch_size", "warmup_steps",
                                                    "alignment_every")}  # fmt: skip
    return DepthShape(steps=steps, eval_every=every, eval_batches=math.ceil(longest / BATCH), **given)


def setting_of(args: argparse.Namespace, task: ImageTask, shape: DepthShape) -> dict[str, object]:
    """What all runs of a file of results have in common."""
    names = ("depth_mix", "missing", "wrong_labels", "augment", "patch_size", "pooling", "epochs")
    counts = {f"{split}_images": len(labels) for split, (_, labels) in task.data.items()}
    return {"task": "images", "data": task.fingerprint, "paper": paper_of(task.classes), "n_classes": len(task.classes),
            **counts, **{name: getattr(args, name) for name in names}, **asdict(shape)}  # fmt: skip


def error_rate(run: dict) -> float:
    """What decides between learning rates, in percent of the validation images."""
    return 100.0 - deepest(run)["accuracy"]


def new_comparison(args: argparse.Namespace) -> tuple[Comparison, list[DepthMethod]]:
    """A comparison that makes what is missing, and its methods; all arguments are checked before the first run."""
    methods = methods_of(args, args.n_level, args.methods)
    task = task_of(args)
    shape = shape_of(args, task)
    for method in methods:
        task.model(method, shape.n_level, n_embd=shape.n_embd, n_head=shape.n_head)
    results = Results(args.output, setting_of(args, task, shape), "depth")

    def train(method: DepthMethod, lr: float, seed: int) -> dict:
        return train_depth(method, lr, seed, task, shape)

    return Comparison(results, train, error_rate), methods


def stored_comparison(args: argparse.Namespace) -> tuple[Comparison, list[DepthMethod]]:
    """A comparison that only finds what the file of results holds, and its methods."""
    setting = stored_setting(args.output)
    args.depth_mix = setting["depth_mix"]
    results = Results(args.output, setting, "depth")
    return Comparison(results, None, error_rate), methods_of(args, setting["n_level"], args.methods or results.methods())


def methods_of(args: argparse.Namespace, n_level: int, names: Sequence[str]) -> list[DepthMethod]:
    """The methods of these names. Raises ValueError where one does not fit the model."""
    methods = distinct(DepthMethod.named(name, args.depth_mix, n_level) for name in names)
    for method in methods:
        method.check()
    return methods


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing and prints the tables."""
    args = parse(argv)
    comparison, methods = (stored_comparison if args.report_only else new_comparison)(args)
    runs = comparison.at_rates(methods, lambda method: comparison.rate(method, args.lrs, args.seeds[0]), args.seeds)
    print(report_images(runs, comparison.results.setting))


if __name__ == "__main__":
    as_program(main)
