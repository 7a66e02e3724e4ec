"""The accuracy-span trade-off: how close the gradient of sweeps is to backprop's, by forward and backward iterations.

    python train/experiments/tradeoff.py --cache runs/tradeoff     # trains two models, then measures; can be resumed
    python train/experiments/tradeoff.py --quick                   # less than a minute: too short to mean much
    python train/experiments/tradeoff.py --model FOLDER            # measures a model that train/lm.py has written

Backprop and sweeps each train a model, from the same weights, data and steps. On fixed validation batches, without any
optimizer and in float32, the gradient of every setting is averaged over the batches and compared with the exact one:
cosine similarity over all parameters and over those of the blocks alone, ratio of norms, and the relative error of the
state that the head reads.

The iterations K and M are varied from 0 to L - 1 (L blocks), where sweeps are exact. The other linearizations and first
estimates, and V-cycles, are compared at M = L - 1, so that what differs is the forward part, by its span: block calls one
after the other, batched calls counting once. V-cycles take D + 1 each, forward iterations one.

New names in version 0.2: tradeoff.py (was dial.py), --train-forward (--train-sweeps), --train-backward
(--train-corrections), --context-length (--block-size).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from comparisons.depth_methods import DepthMethod
from comparisons.fit import fit
from comparisons.plots import plot_trade_off
from comparisons.program import as_program
from comparisons.runs import a_device
from hbll_seq.data.tokenizer import Tokenizer
from hbll_seq.data.tokens import load_tokens
from hbll_seq.data.windows import TokenWindows
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.config import HBLLConfig
from hbll_seq.objectives.backprop import BackpropObjective
from hbll_seq.objectives.base import Objective
from hbll_seq.training.optimizer import make_optimizer
from hbll_seq.training.schedule import learning_rate
from hbll_seq.training.settings import TrainingSettings
from hbll_seq.utils.arguments import Parser
from hbll_seq.utils.atomic import atomic_write

RESULTS = Path(__file__).resolve().parents[1] / "results"
QUICK = dict(steps=30, warmup_steps=5, n_level=2, n_embd=64, context_length=64, train_forward=1, train_backward=1,
             eval_batches=2)  # fmt: skip
TRAIN = ("backprop", "sweeps")
#: forward parts that are compared by their span: kind and options of a method. The first is measured for all K and M.
VARIANTS: dict[str, tuple[str, dict[str, str]]] = {
    "A = I, from f_1(z_0)": ("sweeps", dict(linearization="identity", init="first")),
    "A = 0, from f_1(z_0)": ("sweeps", dict(linearization="zero", init="first")),
    "A = I, from z_0": ("sweeps", dict(linearization="identity", init="input")),
    "A = I, from the tree": ("sweeps", dict(linearization="identity", init="tree")),
    "V-cycles, from the tree": ("v_cycles", dict(linearization="identity", init="tree")),
}
BASE = next(iter(VARIANTS))


def options() -> Parser:
    """What the command line takes."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--train", nargs="+", choices=TRAIN, help="what trains the models that are measured (default: backprop sweeps; "
        "none where --model is given)")  # fmt: skip
    add("--model", type=Path, nargs="+", default=[], help="folders of saved models to measure (default: none)")
    add("--cache", type=Path, help="folder that keeps trained models, so that a stopped run goes on (default: none)")
    add("--output", type=Path, help="JSON file of results, with a PNG file beside it (default: "
        "train/results/dial.json, or dial-quick.json)")  # fmt: skip
    add("--quick", action="store_true", help=f"defaults for a short run: {QUICK}")
    add("--data", default="bundled", help="text, as for train/lm.py (default: bundled)")
    add("--n-level", type=int, default=3, help="levels D of the tree; L = 2^D - 1 blocks (default: 3)")
    add("--n-embd", type=int, default=128, help="width of the stream (default: 128)")
    add("--n-head", type=int, default=4, help="attention heads (default: 4)")
    add("--context-length", type=int, default=128, help="tokens in a window, of training and measuring (default: 128)")
    add("--batch-size", type=int, default=4, help="windows in a batch, of training and measuring (default: 4)")
    add("--steps", type=int, default=1000, help="of training (default: 1000)")
    add("--warmup-steps", type=int, default=100, help="of linear warm-up (default: 100)")
    add("--lr", type=float, default=1.5e-3, help="learning rate of AdamW (default: 1.5e-3)")
    add("--train-forward", type=int, default=3, help="K with which --train sweeps trains (default: 3)")
    add("--train-backward", type=int, default=4, help="M with which --train sweeps trains (default: 4)")
    add("--eval-batches", type=int, default=4, help="validation batches that gradients are averaged over (default: 4)")
    add("--seed", type=int, default=0, help="of weights and order (default: 0)")
    add("--threads", type=int, help="CPU threads (default: torch's choice, which OMP_NUM_THREADS sets)")
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with the defaults that depend on others of its values.

    Raises:
        ValueError: there is nothing to compare, or two results could not be told apart.
    """
    parser, argv = options(), sys.argv[1:] if argv is None else argv
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


# -------------------------------------------------------------------------------------------------------------- training


def trained_model(how: str, args: argparse.Namespace, tokenizer: Tokenizer) -> HBLLForCausalLM:
    """The model that ``how`` trains: from the cache where it is there, else trained now."""
    windows = TokenWindows(load_tokens(args.data, "train", tokenizer), args.context_length)
    decisive = ["n_level", "n_embd", "n_head", "context_length", "batch_size", "steps", "warmup_steps", "lr", "seed"]
    if how == "sweeps":
        decisive += ["train_forward", "train_backward"]
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
                        context_length=args.context_length)  # fmt: skip
    model = HBLLForCausalLM(config, tokenizer).to(a_device())
    objective: Objective = BackpropObjective(model, seed=args.seed)
    if how == "sweeps":
        objective = variant(BASE, args.train_forward, args.train_backward).objective(model, args.seed)
    settings = TrainingSettings(max_steps=args.steps, lr=args.lr, warmup_steps=args.warmup_steps)
    fit(
        objective, make_optimizer(objective, settings),
        lambda step: (windows.batch(step, args.batch_size, args.seed).to(a_device()), None), args.steps,
        rate=partial(learning_rate, peak=args.lr, total=args.steps, warmup=args.warmup_steps, floor=settings.min_lr_ratio),
        clip=settings.clip, clipped=model.parameters(), title=f"training by {how}",
    )  # fmt: skip
    return model


def variant(label: str, forward: int, backward: int) -> DepthMethod:
    """The method that a variant is with so many iterations."""
    kind, given = VARIANTS[label]
    options = {"cycles": forward} if kind == "v_cycles" else {**given, "forward": forward}  # V-cycles are so by nature
    return DepthMethod(label, kind, tuple({**options, "backward": backward}.items()))


# ------------------------------------------------------------------------------------------------------------- measuring


def measure(name: str, model: HBLLForCausalLM, batches: Sequence[Tensor]) -> dict:
    """Every variant and number of iterations on one model, beside the exact gradient."""
    model = model.float().to(a_device()).eval()
    n_level, n_blocks = model.tree.n_level, model.tree.n_nodes
    start = time.perf_counter()
    exact, states, ce = gradient(BackpropObjective(model), batches)
    exact_states = torch.cat(states)
    n_inner = sum(p.numel() for p in model.blocks.parameters())
    settings = [(label, k, m) for label in VARIANTS for k in range(n_blocks) for m in range(n_blocks)
                if label == BASE or m == n_blocks - 1]  # fmt: skip
    rows = []
    for label, k, m in tqdm(settings, desc=f"measuring {name}", mininterval=5):
        ours, states, _ = gradient(variant(label, k, m).objective(model), batches)
        error = (torch.cat(states) - exact_states).norm() / exact_states.norm()
        kind, given = VARIANTS[label]
        rows.append({
            "variant": label, "inference": kind, **given, "forward": k, "backward": m,
            "forward_span": forward_span(k, n_level, kind, given["init"]),
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


def forward_span(k: int, n_level: int, kind: str, init: str) -> int:
    """Block calls one after the other until the last state is known, the differentiated one included."""
    n_blocks = 2**n_level - 1
    if n_blocks == 1:  # its input is known
        return 1
    if kind == "v_cycles":
        return n_level + k * (n_level + 1) + 1
    if init == "tree":
        return n_level + k + 1
    # With the last input exact there are no iterations left to do: the chain has been run as it is.
    return min(n_blocks, k + 1 + (init == "first"))


# ------------------------------------------------------------------------------------------------------------- reporting


def report(measured: dict) -> str:
    """The grid of K and M, and the forward parts at M = L - 1."""
    size, rows = measured["n_blocks"], measured["rows"]
    grid = {(row["forward"], row["backward"]): row["cosine"] for row in rows if row["variant"] == BASE}
    lines = [f"{measured['name']}: {size} blocks, validation {measured['validation_ce']:.3f} nats per token",
             f"cosine to backprop's gradient ({BASE})",
             "      " + "".join(f"{f'M={m}':>8}" for m in range(size))]  # fmt: skip
    lines += [f"{f'K={k}':>6}" + "".join(f"{grid[k, m]:>8.3f}" for m in range(size)) for k in range(size)]
    lines += [f"forward parts, M = {size - 1}"]
    lines += [f"{'':24}{'K':>4}{'span':>6}{'cosine':>9}{'of blocks':>11}{'norm ratio':>12}{'state error':>13}"]
    lines += [
        f"{row['variant'] if row['forward'] == 0 else '':24}{row['forward']:>4}{row['forward_span']:>6}"
        f"{row['cosine']:>9.4f}{row['cosine_blocks']:>11.4f}{row['norm_ratio']:>12.3f}{row['state_error']:>13.2e}"
        for row in rows
        if row["backward"] == size - 1
    ]
    return "\n".join(lines)


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
        windows = TokenWindows(load_tokens(args.data, "validation", tokenizer), args.context_length)
        batches = [windows.batch(i, args.batch_size, seed=0).to(a_device()) for i in range(args.eval_batches)]
        data["models"].append(measure(name, model, batches))
        print(report(data["models"][-1]), flush=True)
        atomic_write(args.output, json.dumps(data, indent=1) + "\n")  # what a stopped run leaves
    plot_trade_off(args.output.with_suffix(".png"), data["models"], list(VARIANTS))
    return data


if __name__ == "__main__":
    as_program(main)
