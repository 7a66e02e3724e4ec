"""The dial from local to exact: how similar the gradient of sweeps is to backprop's, by sweeps K and corrections M.

    python train/dial.py --cache runs/dial        # trains two models, then measures; goes on where it was stopped
    python train/dial.py --quick                  # less than a minute: the same, too short to mean much
    python train/dial.py --model FOLDER           # measures a model that train/lm.py has written

Backprop and sweeps each train a model, from the same weights, data and steps. On fixed validation batches, without any
optimizer and in float32, the gradient of every setting of the dial is averaged over the batches and compared with the
exact one: cosine similarity over all parameters and over those of the blocks alone, ratio of norms, and the relative
error of the state that the head reads.

K and M are varied from 0 to L - 1 (L blocks), where sweeps are exact. The other linearisations and first estimates, and
V-cycles, are compared at M = L - 1, so that what differs is the forward part, by its span: block calls one after the
other, batched calls counting once. V-cycles take D + 1 each, sweeps one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from hbll_seq.atomic import atomic_write
from hbll_seq.config import HBLLConfig
from hbll_seq.data import TokenWindows, load_tokens
from hbll_seq.local_objective import LocalObjective
from hbll_seq.model import HBLLForCausalLM
from hbll_seq.objective import BackpropObjective, Objective
from hbll_seq.tokenizer import Tokenizer
from hbll_seq.training.plots import new_figure, save_figure
from hbll_seq.training.settings import TrainingSettings
from hbll_seq.training.trainer import learning_rate, make_optimizer

RESULTS = Path(__file__).parent / "results"
QUICK = dict(steps=30, warmup_steps=5, n_level=2, n_embd=64, block_size=64, train_sweeps=1, train_corrections=1,
             eval_batches=2)  # fmt: skip
TRAIN = ("backprop", "sweeps")
BASE = dict(inference="sweeps", linearization="identity", init="first")
#: forward parts that are compared by their span, the first of them over the whole grid of K and M.
VARIANTS: dict[str, dict[str, str]] = {
    "A = I, from f_1(z_0)": BASE,
    "A = 0, from f_1(z_0)": {**BASE, "linearization": "zero"},
    "A = I, from z_0": {**BASE, "init": "input"},
    "A = I, from the tree": {**BASE, "init": "tree"},
    "V-cycles, from the tree": {**BASE, "inference": "multigrid", "init": "tree"},
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--train", nargs="+", choices=TRAIN, help="what trains the models that are measured (default: backprop sweeps; "
        "none where --model is given)")  # fmt: skip
    add("--model", type=Path, nargs="+", default=[], help="folders of saved models to measure")
    add("--cache", type=Path, help="folder that keeps trained models, so that a stopped run goes on (default: none)")
    add("--output", type=Path, help="JSON file of results, with a PNG file beside it (default: "
        "train/results/dial.json, or dial-quick.json)")  # fmt: skip
    add("--quick", action="store_true", help=f"defaults for a short run: {QUICK}")
    add("--data", default="bundled", help="text, as for train/lm.py (default: bundled)")
    add("--n-level", type=int, default=3, help="levels D of the tree; L = 2^D - 1 blocks (default: 3)")
    add("--n-embd", type=int, default=128)
    add("--n-head", type=int, default=4)
    add("--block-size", type=int, default=128, help="tokens in a window, of training and measuring (default: 128)")
    add("--batch-size", type=int, default=4, help="windows in a batch, of training and measuring (default: 4)")
    add("--steps", type=int, default=1000, help="of training (default: 1000)")
    add("--warmup-steps", type=int, default=100)
    add("--lr", type=float, default=1.5e-3)
    add("--train-sweeps", type=int, default=3, help="K with which --train sweeps trains (default: 3)")
    add("--train-corrections", type=int, default=4, help="M with which --train sweeps trains (default: 4)")
    add("--eval-batches", type=int, default=4, help="validation batches that gradients are averaged over (default: 4)")
    add("--seed", type=int, default=0)
    add("--threads", type=int, help="CPU threads (default: torch's choice, which OMP_NUM_THREADS sets)")
    if argv is None:
        argv = sys.argv[1:]
    if "--quick" in argv:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)
    if args.train is None:
        args.train = [] if args.model else list(TRAIN)
    if args.output is None:
        args.output = RESULTS / ("dial-quick.json" if args.quick else "dial.json")
    if args.eval_batches < 1:
        raise ValueError(f"eval_batches={args.eval_batches}: must be at least 1, or there is no gradient to compare")
    names = [model_name(folder) for folder in args.model]
    if len(set(names)) < len(names):
        raise ValueError(f"model folders named {', '.join(names)}: results are told apart by it; measure one at a time")
    return args


def model_name(folder: Path) -> str:
    """What a given model is called in table, plot and JSON file: no path, which means nothing elsewhere."""
    return folder.resolve().name


def device() -> str:
    """Where everything runs."""
    return "cuda" if torch.cuda.is_available() else "cpu"


# -- training -----------------------------------------------------------------------------------------------------


def trained_model(how: str, args: argparse.Namespace, tokenizer: Tokenizer) -> HBLLForCausalLM:
    """The model that ``how`` trains: from the cache where it is there, else trained now."""
    windows = TokenWindows(load_tokens(args.data, "train", tokenizer), args.block_size)
    decisive = ["n_level", "n_embd", "n_head", "block_size", "batch_size", "steps", "warmup_steps", "lr", "seed"]
    if how == "sweeps":
        decisive += ["train_sweeps", "train_corrections"]
    setting = {name: getattr(args, name) for name in decisive} | {"text": windows.stream.fingerprint}
    folder = None
    if args.cache:
        folder = args.cache / f"{how}-{hashlib.sha256(json.dumps(setting).encode()).hexdigest()[:12]}"
        if folder.is_dir():
            return HBLLForCausalLM.from_pretrained(folder)
    model = train(how, args, windows, tokenizer)
    if folder:
        model.save_pretrained(folder, data=args.data, settings={"objective": how, **setting})
    return model


def train(how: str, args: argparse.Namespace, windows: TokenWindows, tokenizer: Tokenizer) -> HBLLForCausalLM:
    """One run; the same seed gives both kinds the same weights and batches to begin with."""
    torch.manual_seed(args.seed)
    config = HBLLConfig(vocab_size=tokenizer.vocab_size, n_level=args.n_level, n_embd=args.n_embd, n_head=args.n_head,
                        block_size=args.block_size)  # fmt: skip
    model = HBLLForCausalLM(config, tokenizer).to(device())
    objective: Objective = BackpropObjective(model, seed=args.seed)
    if how == "sweeps":
        dial = dict(sweeps=args.train_sweeps, corrections=args.train_corrections)
        objective = LocalObjective(model, **dial, **BASE, seed=args.seed)
    settings = TrainingSettings(max_steps=args.steps, lr=args.lr, warmup_steps=args.warmup_steps)
    optimizer = make_optimizer(objective, settings)
    with tqdm(range(args.steps), desc=f"training by {how}", mininterval=5) as bar:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, peak=args.lr, total=args.steps, warmup=args.warmup_steps,
                                            floor=settings.min_lr_ratio)  # fmt: skip
            output = objective(windows.batch(step, args.batch_size, args.seed).to(device()), step=step)
            optimizer.zero_grad()
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            optimizer.step()
            if step % 20 == 19:
                bar.set_postfix(ce=f"{output.metrics['ce'].item():.3f}")
    return model


# -- measuring ----------------------------------------------------------------------------------------------------


def measure(name: str, model: HBLLForCausalLM, batches: Sequence[Tensor]) -> dict:
    """Every setting of the dial on one model, beside the exact gradient."""
    model = model.float().to(device()).eval()
    n_level, n_blocks = model.tree.n_level, model.tree.n_nodes
    start = time.perf_counter()
    exact, states, ce = gradient(BackpropObjective(model), batches)
    exact_states = torch.cat(states)
    n_inner = sum(p.numel() for p in model.blocks.parameters())
    dials = [(label, k, m) for label in VARIANTS for k in range(n_blocks) for m in range(n_blocks)
             if VARIANTS[label] is BASE or m == n_blocks - 1]  # fmt: skip
    rows = []
    for label, k, m in tqdm(dials, desc=f"measuring {name}", mininterval=5):
        ours, states, _ = gradient(LocalObjective(model, sweeps=k, corrections=m, **VARIANTS[label]), batches)
        error = (torch.cat(states) - exact_states).norm() / exact_states.norm()
        rows.append({
            "variant": label, **VARIANTS[label], "sweeps": k, "corrections": m,
            "forward_span": forward_span(k, n_level, VARIANTS[label]),
            "cosine": cosine(ours, exact),
            "cosine_blocks": cosine(ours[:n_inner], exact[:n_inner]),
            "norm_ratio": (ours.norm() / exact.norm()).item(),
            "state_error": error.item(),
        })  # fmt: skip
    return {"name": name, "n_level": n_level, "n_blocks": n_blocks, "validation_ce": ce, "rows": rows,
            "seconds": round(time.perf_counter() - start, 1)}  # fmt: skip


def gradient(objective: Objective, batches: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], float]:
    """Over the batches: (mean gradient as one float64 vector, blocks first; states that the head read; mean nats)."""
    blocks = list(objective.model.blocks.parameters())
    inner = {id(p) for p in blocks}
    parameters = blocks + [p for p in objective.model.parameters() if id(p) not in inner]
    total, ce = torch.zeros((), dtype=torch.float64, device=parameters[0].device), 0.0
    with head_inputs(objective.model) as states:
        for batch in batches:
            output = objective(batch)
            parts = torch.autograd.grad(output.loss, parameters)
            total = total + torch.cat([part.flatten() for part in parts]).double() / len(batches)
            ce += output.metrics["ce"].item() / len(batches)
    return total, states, ce


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine similarity of two vectors."""
    return (a @ b / (a.norm() * b.norm())).item()


@contextmanager
def head_inputs(model: HBLLForCausalLM) -> Iterator[list[Tensor]]:
    """Collects the states that the head reads, in float64."""
    states: list[Tensor] = []
    hook = model.head.norm.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0].detach().double()))
    try:
        yield states
    finally:
        hook.remove()


def forward_span(k: int, n_level: int, variant: dict) -> int:
    """Block calls one after the other until the last state is known, the differentiated one included."""
    n_blocks = 2**n_level - 1
    if n_blocks == 1:  # its input is known
        return 1
    if variant["inference"] == "multigrid":
        return n_level + k * (n_level + 1) + 1
    if variant["init"] == "tree":
        return n_level + k + 1
    # With the last input exact there are no sweeps left to do: the chain has been run as it is.
    return min(n_blocks, k + 1 + (variant["init"] == "first"))


# -- reporting ----------------------------------------------------------------------------------------------------


def report(measured: dict) -> str:
    """The grid of K and M, and the forward parts at M = L - 1."""
    size, rows = measured["n_blocks"], measured["rows"]
    base = next(iter(VARIANTS))
    grid = {(row["sweeps"], row["corrections"]): row["cosine"] for row in rows if row["variant"] == base}
    lines = [f"{measured['name']}: {size} blocks, validation {measured['validation_ce']:.3f} nats per token",
             f"cosine to backprop's gradient ({base})",
             "      " + "".join(f"{f'M={m}':>8}" for m in range(size))]  # fmt: skip
    lines += [f"{f'K={k}':>6}" + "".join(f"{grid[k, m]:>8.3f}" for m in range(size)) for k in range(size)]
    lines += [f"forward parts, M = {size - 1}"]
    lines += [f"{'':24}{'K':>4}{'span':>6}{'cosine':>9}{'of blocks':>11}{'norm ratio':>12}{'state error':>13}"]
    lines += [
        f"{row['variant'] if row['sweeps'] == 0 else '':24}{row['sweeps']:>4}{row['forward_span']:>6}"
        f"{row['cosine']:>9.4f}{row['cosine_blocks']:>11.4f}{row['norm_ratio']:>12.3f}{row['state_error']:>13.2e}"
        for row in rows
        if row["corrections"] == size - 1
    ]
    return "\n".join(lines)


def plot(models: Sequence[dict], path: Path) -> None:
    """A row per model: the grid of K and M on the left, the forward parts by span on the right.

    Colours and the right axis are of 1 - cosine on a logarithmic scale: most of what is to be told apart is above 0.9.
    """
    from matplotlib.colors import LogNorm

    floor = 1e-6  # below it the two gradients differ by rounding
    figure = new_figure(12.0, 4.4 * len(models))
    for (left, right), measured in zip(figure.subplots(len(models), 2, squeeze=False), models):
        size, rows = measured["n_blocks"], measured["rows"]
        grid = [[1.0] * size for _ in range(size)]
        for row in rows:
            if row["variant"] == next(iter(VARIANTS)):
                grid[row["sweeps"]][row["corrections"]] = max(floor, 1 - row["cosine"])
        image = left.imshow(grid, norm=LogNorm(floor, 1), origin="lower", cmap="viridis_r", aspect="auto")
        figure.colorbar(image, ax=left, label="1 - cosine", extend="min")
        if size < 10:  # in more cells the numbers could not be read
            for k, m in ((k, m) for k in range(size) for m in range(size)):
                shade = "white" if grid[k][m] > 1e-3 else "black"  # the middle of the colours
                left.text(m, k, f"{1 - grid[k][m]:.4f}", ha="center", va="center", fontsize="small", color=shade)
        left.set_xlabel("corrections M")
        left.set_ylabel("sweeps K")
        left.xaxis.get_major_locator().set_params(integer=True)
        left.yaxis.get_major_locator().set_params(integer=True)
        left.set_title(f"{measured['name']}: cosine to backprop's gradient", fontsize="medium")

        for (label, style), marker in zip(VARIANTS.items(), "os^Dv"):
            points = [row for row in rows if row["variant"] == label and row["corrections"] == size - 1]
            # V-cycles of a small tree soon cost far more than the chain itself.
            points = [row for row in points if row["forward_span"] <= 2 * size]
            spans, distances = zip(*((row["forward_span"], max(floor, 1 - row["cosine"])) for row in points))
            right.plot(spans, distances, marker=marker, markersize=5, linewidth=1.2, label=label,
                       zorder=3 if style is BASE else 2)  # fmt: skip
        right.axvline(size, color="0.6", linestyle="--", linewidth=1, label=f"plain chain, exact ({size} blocks)")
        right.set_yscale("log")
        right.set_ylim(floor / 2, 3)
        right.set_xlabel("span of the forward part (block calls one after the other)")
        right.set_ylabel(f"1 - cosine (lower is closer; {floor:g}: or less)")
        right.xaxis.get_major_locator().set_params(integer=True)
        right.set_title(f"{measured['name']}: forward parts at M = {size - 1}", fontsize="medium")
        right.grid(color="0.9")
        right.legend(fontsize="small", loc="upper right")
    save_figure(figure, path)


def main(argv: Sequence[str] | None = None) -> dict:
    """Trains what is missing, measures, prints the tables, and writes JSON and PNG."""
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    free = {"output", "cache", "quick", "threads", "model"}
    data: dict = {"setting": {k: v for k, v in vars(args).items() if k not in free}, "models": []}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for source in [*args.train, *args.model]:
        if isinstance(source, Path):
            name, model = model_name(source), HBLLForCausalLM.from_pretrained(source)
        else:
            name, model = f"trained by {source}", trained_model(source, args, Tokenizer.default())
        tokenizer = model.tokenizer or Tokenizer.default()
        windows = TokenWindows(load_tokens(args.data, "validation", tokenizer), args.block_size)
        batches = [windows.batch(i, args.batch_size, seed=0).to(device()) for i in range(args.eval_batches)]
        data["models"].append(measure(name, model, batches))
        print(report(data["models"][-1]), flush=True)
        atomic_write(args.output, json.dumps(data, indent=1) + "\n")  # what a stopped run leaves
    plot(data["models"], args.output.with_suffix(".png"))
    return data


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
