"""HBLL beside backprop in one run: same text, data order, initial weights and steps, a learning rate tuned for each side.

    python train/compare.py                   # about an hour and a half on two cores; goes on where it was stopped
    python train/compare.py --quick           # a few minutes: the same comparison, too short to mean much

One side is a hierarchy trained by local losses, evaluated along its default path of every depth. The others are models
trained by backprop, each with one depth only. Every side tries every learning rate with the first seed, and beyond the
grid, in factors of two, as long as its best one lies at the edge. The one with the lowest validation loss (of the side's
best path) is kept for the other seeds. The test split is only reported.

Results are added to a JSON file run by run, and a run that is in the file is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from hbll_seq.atomic import atomic_write
from hbll_seq.config import HBLLConfig
from hbll_seq.data import TokenWindows, load_tokens
from hbll_seq.evaluation import evaluate_paths
from hbll_seq.model import HBLLForCausalLM
from hbll_seq.objective import BackpropObjective, LocalObjective, Objective
from hbll_seq.tokenizer import Tokenizer
from hbll_seq.training.plots import plot_comparison
from hbll_seq.training.settings import TrainingSettings
from hbll_seq.training.trainer import learning_rate, make_optimizer

RESULTS = Path(__file__).parent / "results"
QUICK = dict(steps=60, lrs=[3e-3], seeds=[0], eval_batches=4)
LOCAL = "tree"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, help="JSON file of results (default: train/results/compare.json, or compare-quick.json)")
    add("--quick", action="store_true", help=f"defaults for a short run: {QUICK}")
    add("--data", default="bundled", help="text, as for train/lm.py (default: bundled)")
    add("--depths", type=int, nargs="+", default=[1, 2, 3, 7], help="depths of the backprop models")
    add("--n-level", type=int, default=3)
    add("--n-embd", type=int, default=128)
    add("--n-head", type=int, default=4)
    add("--block-size", type=int, default=128)
    add("--batch-size", type=int, default=8)
    add("--steps", type=int, default=1000)
    add("--warmup-steps", type=int, default=100)
    add("--lrs", type=float, nargs="+", default=[1.5e-3, 3e-3, 6e-3], help="learning rates that every side tries")
    add("--seeds", type=int, nargs="+", default=[0, 1], help="the first one tunes the learning rate")
    add("--state-weight", type=float, default=0.1, help="weight of the local losses on states")
    add("--sigma", type=float, default=0.005)
    add("--eval-batches", type=int, default=40, help="batches of 16 windows of validation and test text")
    add("--threads", type=int, help="CPU threads (default: all cores)")
    if argv is None:
        argv = sys.argv[1:]
    if "--quick" in argv:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)
    if args.output is None:
        args.output = RESULTS / ("compare-quick.json" if args.quick else "compare.json")
    return args


class Results:
    """The JSON file: the setting of the comparison, and one entry per finished run."""

    def __init__(self, path: Path, setting: dict):
        self.path = path
        self.data = {"setting": setting, "runs": []}
        if path.exists():
            self.data = json.loads(path.read_text(encoding="utf-8"))
            changed = [k for k in setting if self.data["setting"].get(k) != setting[k]]
            if changed:
                raise ValueError(
                    f"{path} holds a comparison with other settings ({', '.join(changed)}): its runs cannot be compared "
                    "with these; give another --output"
                )

    def find(self, side: str, lr: float, seed: int) -> dict | None:
        """The finished run, if there is one."""
        return next((r for r in self.data["runs"] if (r["side"], r["lr"], r["seed"]) == (side, lr, seed)), None)

    def add(self, run: dict) -> None:
        """Appends a run and replaces the file atomically."""
        self.data["runs"].append(run)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(self.path, json.dumps(self.data, indent=1) + "\n")


def make_side(side: str, args: argparse.Namespace, vocab_size: int, seed: int) -> tuple[Objective, dict]:
    """The objective of a side around a fresh model, and the paths it is judged by. One seed, one set of weights."""
    torch.manual_seed(seed)
    config = HBLLConfig(vocab_size=vocab_size, n_level=args.n_level, n_embd=args.n_embd, n_head=args.n_head,
                        block_size=args.block_size, sigma=args.sigma)  # fmt: skip
    model = HBLLForCausalLM(config)
    if side == LOCAL:
        depths = range(1, model.tree.n_nodes + 1)
        paths = {f"depth {k}": model.tree.path_for_depth(k) for k in depths}
        return LocalObjective(model, inference=LOCAL, state_weight=args.state_weight, seed=seed), paths
    depth = int(side.removeprefix("backprop-"))
    path = model.tree.path_for_depth(depth)
    return BackpropObjective(model, path=path, seed=seed), {f"depth {depth}": path}


def run(side: str, lr: float, seed: int, args: argparse.Namespace, windows: dict[str, TokenWindows], vocab: int) -> dict:
    """Trains one side once and evaluates it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    objective, paths = make_side(side, args, vocab, seed)
    objective.to(device)
    settings = TrainingSettings(max_steps=args.steps, lr=lr, warmup_steps=args.warmup_steps)
    optimizer = make_optimizer(objective, settings)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    curve, start = [], time.perf_counter()
    with tqdm(range(args.steps), desc=f"{side} lr={lr:g} seed={seed}", mininterval=5) as bar:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, peak=lr, total=args.steps, warmup=args.warmup_steps,
                                            floor=settings.min_lr_ratio)  # fmt: skip
            batch = windows["train"].batch(step, args.batch_size, seed).to(device)
            output = objective(batch, step=step)
            optimizer.zero_grad()
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
            optimizer.step()
            if step % 20 == 19 or step == args.steps - 1:
                curve.append([step + 1, output.metrics["ce"].item()])
                bar.set_postfix(ce=f"{curve[-1][1]:.3f}")
    seconds = time.perf_counter() - start
    rows = {
        split: evaluate_paths(objective.model, windows[split], paths, max_batches=args.eval_batches)
        for split in ("validation", "test")
    }
    return {"side": side, "lr": lr, "seed": seed, "seconds": round(seconds, 1), "curve": curve, **rows}


def best_loss(finished: dict, split: str = "validation") -> float:
    """Loss of the best path of a run."""
    return min(row["loss"] for row in finished[split])


def tune(loss_at: Callable[[float], float], grid: Sequence[float]) -> float:
    """The learning rate of the lowest loss: on the grid, and past its edges by factors of two while the best lies there."""
    tried = {lr: loss_at(lr) for lr in grid}
    while len(grid) > 1:
        best = min(tried, key=tried.get)
        beyond = {min(tried): best / 2, max(tried): best * 2}.get(best)
        if beyond is None or len(tried) >= len(grid) + 3:
            return best
        tried[beyond] = loss_at(beyond)
    return grid[0]  # a single rate is not tuned


def report(results: Results, sides: list[str], chosen: dict[str, float], seeds: list[int]) -> str:
    """The table of METHOD part 3 in small, and one last line with the ratio."""
    perplexity: dict[tuple[str, int], list[float]] = {}
    for side in sides:
        for seed in seeds:
            for row in results.find(side, chosen[side], seed)["test"]:
                perplexity.setdefault((side, row["depth"]), []).append(row["perplexity"])
    depths = sorted({depth for _, depth in perplexity})

    def cell(values: list[float] | None) -> str:
        if not values:
            return "-"
        mean, spread = sum(values) / len(values), (max(values) - min(values)) / 2
        return f"{mean:.2f} ± {spread:.2f}"

    lines = [f"test perplexity per token, mean and half range over seeds {seeds}",
             f"{'blocks':>6}  {'backprop, own model':>20}  {'HBLL (tree), one model':>22}"]  # fmt: skip
    for depth in depths:
        backprop = perplexity.get((f"backprop-{depth}", depth))
        lines.append(f"{depth:>6}  {cell(backprop):>20}  {cell(perplexity.get((LOCAL, depth))):>22}")
    lines.append("learning rates: " + ", ".join(f"{side} {lr:g}" for side, lr in chosen.items()))
    seconds = {side: [results.find(side, chosen[side], seed)["seconds"] for seed in seeds] for side in sides}
    lines.append("seconds of training: " + ", ".join(f"{s} {sum(v) / len(v):.0f}" for s, v in seconds.items()))
    deepest = max((int(side.removeprefix("backprop-")) for side in sides if side != LOCAL), default=None)
    if deepest and LOCAL in sides:
        ratios = []
        for i in range(len(seeds)):
            reference = perplexity[f"backprop-{deepest}", deepest][i]
            local = {depth: perplexity[LOCAL, depth][i] for depth in depths}
            ratios.append((min(local.values()) / reference, local[max(local)] / reference))
        best, full = ([r[k] for r in ratios] for k in (0, 1))
        lines.append(
            f"ratio to {deepest}-block backprop at equal steps: best path "
            + ", ".join(f"{r:.3f}" for r in best) + "; full path " + ", ".join(f"{r:.3f}" for r in full)
        )  # fmt: skip
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing, then prints the table and writes the plot beside the JSON file."""
    args = parse(argv)
    torch.set_num_threads(args.threads or os.cpu_count() or 1)
    tokenizer = Tokenizer.default()
    windows = {
        split: TokenWindows(load_tokens(args.data, split, tokenizer), args.block_size)
        for split in ("train", "validation", "test")
    }
    free = {"output", "quick", "threads", "depths", "lrs", "seeds"}  # what can be added to a comparison later
    setting = {k: v for k, v in vars(args).items() if k not in free}
    setting["text"] = windows["train"].stream.fingerprint  # of text and tokenizer: a changed file is another comparison
    results = Results(args.output, setting)
    sides = [LOCAL, *(f"backprop-{depth}" for depth in args.depths)]

    def ensure(side: str, lr: float, seed: int) -> dict:
        finished = results.find(side, lr, seed)
        if finished is None:
            finished = run(side, lr, seed, args, windows, tokenizer.vocab_size)
            results.add(finished)
        return finished

    chosen = {}
    for side in sides:
        chosen[side] = tune(lambda lr, side=side: best_loss(ensure(side, lr, args.seeds[0])), args.lrs)
    for seed in args.seeds[1:]:
        for side in sides:
            ensure(side, chosen[side], seed)
    print(report(results, sides, chosen, args.seeds))
    plot_comparison(args.output.with_suffix(".png"), results.data["runs"], chosen, args.seeds, LOCAL)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
