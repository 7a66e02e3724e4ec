"""Sequential and permuted sequential MNIST: recurrent classifiers without backpropagation through time, beside BPTT.

    python train/seqmnist.py --data FOLDER_OF_IDX_FILES --permuted --n 16
    python train/seqmnist.py --data FOLDER_OF_IDX_FILES --quick      # a minute or so, too short to mean much

The 784 pixels of a digit are read in N steps of ceil(784 / N), with zeros before the first (the paper's task, method.md 1.5
and 3; --n 784 reads one pixel a step); --permuted, in one fixed order that is not that of the image. Sides, with options as
in "sweeps:sweeps=2,corrections=2,lr=1e-3":

    bptt      backpropagation through time over the same cell
    truncated the same within windows of steps ("truncated:window=16"), and one-step: of one step
    sweeps    our form: local losses from K sweeps and M corrections of chunks of c steps, joined by a map that is learned
    tree      the paper's form; sweeps=K of its consistency stage, 0 leaves that out

All are trained in one run on the same batches from the same weights. Reported are, in percent of the test digits:
"deployed", the cell f_0 run as an ordinary recurrent network, and for the paper's form also "tree", the readout along
0 -> N/2 -> 3N/4 -> .. -> N, and f_D alone ("top" in the file), a feed-forward net on the whole digit.

With several rates after --lr every side tries each with the first seed, and beyond the grid as long as the best lies at its
edge; the highest accuracy on the validation images decides. Results are added to a JSON file run by run, and a run that is
in the file is not done again; two processes may share one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

if __name__ == "__main__":  # before torch loads OpenMP, see train/lm.py
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor

from hbll_seq.data.mnist import load_mnist
from hbll_seq.layers.cells import CELL_KINDS
from hbll_seq.models.sequence_classification import HBLLClassifierConfig
from hbll_seq.objectives.recurrent import RECURRENT_LINEARIZATIONS
from hbll_seq.training.classification import Length, train_classifier
from hbll_seq.training.recurrent_sides import DEFAULTS, INITS, RecurrentSide, check_rate, dial_of
from hbll_seq.training.results import Results, tune
from hbll_seq.utils.atomic import whole_folder

RESULTS = Path(__file__).parent / "results"
SIDES = ["bptt", "one-step", "sweeps", "tree:sweeps=0", "tree:sweeps=4"]
#: every permuted task reads its pixels in the same order
PERMUTATION_SEED = 0
#: what a short run changes of the defaults
QUICK = dict(hidden=32, steps=60, seeds=[0])
EPOCHS = 5


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, dial = parser.add_argument, DEFAULTS["sweeps"]
    add("--data", default="ylecun/mnist", help="folder of the four idx files, or a Hub id (default: ylecun/mnist)")
    add("--permuted", action="store_true", help="read the pixels in one fixed random order")
    add("--n", "--steps-per-image", dest="n_steps", type=int, default=16, help="N, steps of an image (default: 16)")
    add("--cell", choices=CELL_KINDS, default="gru")
    add("--hidden", type=int, default=128, help="width of the state (default: 128; the paper: 2048)")
    add("--sides", nargs="+", help=f"what is compared (default: {' '.join(SIDES)}; with --report-only all that is stored)")
    add("--seeds", type=int, nargs="+", default=[0, 1], help="of weights and order; the first one tunes (default: 0 1)")
    add("--lr", type=float, nargs="+", default=[2e-3], help="learning rates that every side without one of its own tries "
        "(default: 2e-3)")  # fmt: skip
    add("--train-images", type=int, help="use only the first so many (default: all that are not held out)")
    add("--validation-images", type=int, default=0, help="hold out so many, the last ones of the training set (default: 0)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int, help=f"(default: {EPOCHS}; the paper: 200)")
    length.add_argument("--steps", type=int, help="in place of epochs")
    add("--batch-size", type=int, default=128)
    add("--warmup-steps", type=int, default=50)
    add("--weight-decay", type=float, default=1e-4)
    add("--clip", type=float, default=5.0, help="limit of the gradient's norm (default: 5)")
    add("--sweeps", type=int, default=dial["sweeps"], help=f"K of the side sweeps (default: {dial['sweeps']})")
    add("--corrections", type=int, default=dial["corrections"], help=f"M of it (default: {dial['corrections']})")
    add("--chunk", type=int, help="its c, steps that a sweep takes one after the other (default: an eighth of N)")
    add("--linearization", choices=RECURRENT_LINEARIZATIONS, help="its stand-in for Jacobians (default: "
        f"{dial['linearization']}; of mingru diagonal, which is exact)")  # fmt: skip
    add("--init", choices=INITS, default=dial["init"], help=f"its first estimate of the states (default: {dial['init']})")
    add("--eval-every", type=int, default=500, help="steps between two looks at the validation images")
    add("--probe-every", type=int, default=250, help="steps between two comparisons of the gradient with the exact one")
    add("--output", type=Path, help="JSON file of results (default: train/results/[p]smnist-N-CELL[-quick].json)")
    add("--save", type=Path, help="folder for the deployed models: SAVE/NAME-OF-OUTPUT/SIDE-lr=..-seed=..")
    add("--quick", action="store_true", help=f"defaults for a short run: {QUICK}")
    add("--threads", type=int, help="CPU threads (default: as torch is set up)")
    add("--report-only", action="store_true", help="run nothing: print what the file of results holds")
    argv = sys.argv[1:] if argv is None else argv
    if "--quick" in argv:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)
    if args.output is None:
        name = f"{'p' * args.permuted}smnist-{args.n_steps}-{args.cell}{'-quick' * args.quick}"
        args.output = RESULTS / f"{name}.json"
    if args.epochs is None and args.steps is None:
        args.epochs = EPOCHS
    return args


def load(args: argparse.Namespace) -> tuple[dict[str, tuple[Tensor, Tensor]], str]:
    """Pixels and labels by split, and what identifies all of them.

    Raises:
        ValueError: they cannot be had, or there are fewer than were asked for.
    """
    train, test = (load_mnist(args.data, split) for split in ("train", "test"))
    digest = hashlib.sha256()
    for pixels, labels in (train, test):
        digest.update((pixels * 255).round().byte().numpy())
        digest.update(labels.numpy())
    (pixels, labels), n_held = train, args.validation_images
    if not 0 <= n_held < len(labels):
        raise ValueError(f"validation-images={n_held} of {len(labels)} training images: choose 0 to {len(labels) - 1}")
    rest = len(labels) - n_held
    n_train = rest if args.train_images is None else args.train_images
    if not 1 <= n_train <= rest:
        raise ValueError(
            f"train-images={n_train}: of {len(labels)} images {n_held} are held out; choose at least 1 and at most {rest}"
        )
    data = {"train": (pixels[:n_train], labels[:n_train]), "test": test}
    if n_held:
        data["validation"] = (pixels[rest:], labels[rest:])
    return data, digest.hexdigest()[:16]


def length_of(args: argparse.Namespace, n_train: int) -> Length:
    """Steps of a run. Raises ValueError when a value is out of range."""
    if not 1 <= args.batch_size <= n_train:
        raise ValueError(f"batch-size={args.batch_size} of {n_train} training images: choose 1 to {n_train}")
    if args.epochs is not None and args.epochs < 1:
        raise ValueError(f"epochs={args.epochs}: must be a whole number of at least 1")
    steps = args.steps if args.epochs is None else args.epochs * (n_train // args.batch_size)
    return Length(args.batch_size, steps, args.warmup_steps, args.weight_decay, args.clip, args.eval_every, args.probe_every)


def report(runs: Mapping[str, Sequence[dict]], setting: Mapping) -> str:
    """The figures by side, and one last line with the difference from BPTT.

    Args:
        runs: side -> its runs at its learning rate, one per seed.
        setting: of the file of results.
    """

    def cell(of_side: Sequence[dict], name: str) -> str:
        values = [run["test"][name] for run in of_side if name in run["test"]]
        return f"{sum(values) / len(values):.2f} ± {(max(values) - min(values)) / 2:.2f}" if values else "-"

    task = f"{'p' if setting['permutation_seed'] is not None else ''}sMNIST"
    width, pixels = max(map(len, runs)), -(-setting["n_inputs"] // setting["n_steps"])
    lines = [f"test accuracy in %, mean and half range over seeds; {task}, N = {setting['n_steps']} steps of "
             f"{pixels} pixel{'s' * (pixels > 1)}, {setting['cell']}, hidden {setting['hidden_size']}, "
             f"{setting['steps']} steps of {setting['batch_size']} images",
             f"{'side':>{width}}  {'lr':>7}  {'seeds':>5}  {'deployed':>13}  {'tree':>13}  {'f_D':>13}  {'s/step':>7}  "
             "cosine to the exact gradient: first, lowest, last"]  # fmt: skip
    for side, of_side in runs.items():
        cosines = [[probe[1] for probe in run["probes"]] for run in of_side if run["probes"]]
        shown = f"{cosines[0][0]:.3f}, {min(map(min, cosines)):.3f}, {cosines[-1][-1]:.3f}" if cosines else ""
        seconds = sum(run["seconds"] for run in of_side) / len(of_side) / setting["steps"]
        figures = "  ".join(f"{cell(of_side, name):>13}" for name in ("deployed", "tree", "top"))
        rate = of_side[0]["lr"]
        lines.append(f"{side:>{width}}  {rate:>7.2g}  {len(of_side):>5}  {figures}  {seconds:>7.3f}  {shown}".rstrip())
    bptt = next((side for side in runs if side.partition(":")[0] == "bptt"), None)
    reference = {run["seed"]: run["test"]["deployed"] for run in runs.get(bptt, ())}
    parts = []
    for side, of_side in runs.items():
        paired = [run["test"]["deployed"] - reference[run["seed"]] for run in of_side if run["seed"] in reference]
        if side != bptt and paired:
            parts.append(f"{side} " + ", ".join(f"{difference:+.2f}" for difference in paired))
    missing = "no run of bptt" if bptt is None else "no other side"
    lines += ["", "deployed minus BPTT in points: " + ("; ".join(parts) or missing)]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing and prints the table."""
    args = parse(argv)
    for lr in args.lr:
        check_rate("--lr", lr)
    if args.report_only:
        if not args.output.is_file():
            raise ValueError(f"there is no results file {args.output}: leave --report-only out to make it, or name --output")
        setting = json.loads(args.output.read_text(encoding="utf-8"))["setting"]
        args.n_steps, args.cell = setting["n_steps"], setting["cell"]
    dial = {name: getattr(args, name) for name in DEFAULTS["sweeps"]}
    if args.chunk is None:
        dial["chunk"] = max(1, args.n_steps // 8)
    if args.linearization is None:  # the default, which depends on the cell
        dial["linearization"] = dial_of(args.cell, DEFAULTS["sweeps"])["linearization"]
    if args.report_only:
        results = Results(args.output, setting)
    names = args.sides or (results.sides() if args.report_only else SIDES)
    sides = [RecurrentSide.parse(name, dial) for name in dict.fromkeys(names)]
    if args.report_only:

        def ensure(side: RecurrentSide, lr: float, seed: int) -> dict | None:
            return results.find(side.name, lr, seed, side.method)
    else:
        if args.threads is not None and args.threads < 1:
            raise ValueError(f"threads={args.threads}: must be a whole number of at least 1")
        config = HBLLClassifierConfig(n_steps=args.n_steps, cell=args.cell, hidden_size=args.hidden,
                                      permutation_seed=PERMUTATION_SEED if args.permuted else None)  # fmt: skip
        for side in sides:
            side.check(config.cell, config.n_steps)  # before the first run, not hours later
        data, fingerprint = load(args)
        length = length_of(args, len(data["train"][1]))
        setting = {**config.to_dict(), **asdict(length), "data": fingerprint,
                   "train_images": len(data["train"][1]), "validation_images": args.validation_images}  # fmt: skip
        results = Results(args.output, setting)
        if args.threads is not None:
            torch.set_num_threads(args.threads)

        def ensure(side: RecurrentSide, lr: float, seed: int) -> dict | None:
            found = results.find(side.name, lr, seed, side.method)
            folder = None if args.save is None else args.save / args.output.stem / f"{side.label}-lr={lr:g}-seed={seed}"
            if found is None:
                model, found = train_classifier(side, lr, seed, config, data, length)
                if folder is not None and found["finite"]:  # before the result, so that a stored run has its model
                    task = f"{'permuted ' * args.permuted}sequential MNIST"
                    settings = {"side": side.name, "method": side.method, "lr": lr, "seed": seed, **asdict(length)}
                    model.save_pretrained(folder, data=task, settings=settings, test_accuracy=found["test"]["deployed"])
                results.add(found)
            elif folder is not None and found["finite"] and not (whole_folder(folder) / "config.json").is_file():
                raise ValueError(f"{side.name} lr={lr:g} seed={seed} of {args.output} was stored without its model, and "
                                 f"{folder} holds none: give another --output to train it again, or leave --save out")
            return found

    if len(args.lr) > 1 and not setting["validation_images"]:
        raise ValueError(f"--lr of {len(args.lr)} rates with validation-images=0: nothing can choose between them; hold "
                         "images out, such as 5000, or give one rate")  # fmt: skip

    def error_rate(run: dict | None) -> float:
        return float("inf") if run is None else 100.0 - run["validation"]["deployed"]

    chosen = {}
    for side in sides:
        rates = [side.lr] if side.lr is not None else args.lr
        if len(rates) > 1:
            rates = [tune(lambda lr, side=side: error_rate(ensure(side, lr, args.seeds[0])), rates)]
        chosen[side.name] = rates[0]
    found = [(side.name, ensure(side, chosen[side.name], seed)) for seed in args.seeds for side in sides]
    runs = {side.name: [run for name, run in found if name == side.name and run is not None] for side in sides}
    runs = {name: of_side for name, of_side in runs.items() if of_side}
    if not runs:
        wanted = f"no run of {', '.join(names)} with these options" if names else "no run"
        raise ValueError(f"{args.output} holds {wanted}: leave --report-only out to make them")
    print(report(runs, setting))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
