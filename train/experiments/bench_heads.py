"""Time of the heads of a training step: the scores of 1, 4 and 7 exits and all their gradients.

    python train/experiments/bench_heads.py            # a minute
    python train/experiments/bench_heads.py --quick    # seconds: too short to mean much

    one by one     each exit is scored alone
    together       all go through the head as one batch (what objectives do)

Both with the float32 products that torch chooses by itself, and with those of hbll_seq/utils/fast_products.py; the same where
this processor or this torch has no others. All forms are measured in turn, so that a busy machine slows all of them. With one
thread the time is the thread's own, which other programs take nothing of.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import torch

from comparisons.program import as_program, parse_benchmark
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.config import HBLLConfig
from hbll_seq.models.hierarchy import DepthHierarchy
from hbll_seq.utils import fast_products
from hbll_seq.utils.arguments import Parser
from hbll_seq.utils.atomic import atomic_write

QUICK = dict(exits=[2], repeats=1, n_embd=16, vocab_size=50)
WAYS = {"one by one": DepthHierarchy.score_exits, "together": HBLLForCausalLM.score_exits}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--exits", type=int, nargs="+", default=[1, 4, 7], help="numbers of exits, 1 to 7 (default: 1 4 7)")
    add("--n-embd", type=int, default=128, help="width (default: 128)")
    add("--vocab-size", type=int, default=4096, help="pieces (default: 4096)")
    add("--batch-size", type=int, default=4, help="texts of a batch (default: 4)")
    add("--context-length", type=int, default=128, help="tokens of each (default: 128)")
    add("--repeats", type=int, default=15, help="of which the median is taken (default: 15)")
    add("--threads", type=int, default=1, help="CPU threads (default: 1)")
    add("--quick", action="store_true", help=f"defaults for a short run: {QUICK}")
    add("--output", type=Path, help="JSON file of results (default: train/results/bench_heads.json, or "
        "bench_heads-quick.json)")  # fmt: skip
    args = parse_benchmark(parser, argv, "bench_heads", QUICK)
    for name in ("vocab_size", "batch_size", "context_length", "repeats", "threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}={getattr(args, name)}: must be at least 1")
    if not all(1 <= n <= 7 for n in args.exits):
        raise ValueError(f"exits={args.exits}: each must be 1 to 7, the paths of a model of seven blocks")
    return args


def step_of(model: HBLLForCausalLM, args: argparse.Namespace, n_exits: int, way: Callable) -> Callable[[], None]:
    """A function that scores the exits and finds all gradients."""
    shape = (args.batch_size, args.context_length)
    states = [torch.randn(*shape, args.n_embd).requires_grad_() for _ in range(n_exits)]
    targets = torch.randint(args.vocab_size, shape)
    paths = [model.tree.path_for_depth(depth) for depth in range(1, n_exits + 1)]

    def step() -> None:
        for each in (*states, *model.parameters()):
            each.grad = None
        loss, _ = way(model, states, targets, paths, [1.0 + depth for depth in range(n_exits)])
        loss.backward()

    return step


def main(argv: Sequence[str] | None = None) -> dict:
    """Measures every form, prints the table and writes it as JSON."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = HBLLConfig(vocab_size=args.vocab_size, n_embd=args.n_embd, n_head=1, context_length=args.context_length,
                        default_paths="prefix", exit_rank=16, exit_by="depth")  # fmt: skip
    model = HBLLForCausalLM(config)
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    rows = []
    for n_exits in args.exits:
        steps = {name: step_of(model, args, n_exits, way) for name, way in WAYS.items()}
        seconds: dict[tuple[str, str], list[float]] = {}
        for _ in range(1 + args.repeats):  # the first is not counted
            for products, exact in (("torch's", False), ("fast", fast_products._is_exact())):
                for name, step in steps.items():
                    with mock.patch.object(fast_products, "_is_exact", lambda exact=exact: exact):
                        start = clock()
                        step()
                    seconds.setdefault((name, products), []).append(clock() - start)
        for (name, products), of_form in seconds.items():
            rows.append({"exits": n_exits, "form": name, "products": products, "ms": 1e3 * statistics.median(of_form[1:])})
            print(f"{n_exits} exits  {name:<10}  {products:>7} products  {rows[-1]['ms']:>8.2f} ms", flush=True)
    setting = {k: v for k, v in vars(args).items() if k not in ("output", "quick")} | {"torch": torch.__version__}
    result = {"setting": setting, "processor": torch.backends.cpu.get_cpu_capability(), "rows": rows}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(args.output, json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    as_program(main)
