"""Tokens a second of cached greedy generation: this library by depth, beside transformers' GPT-2 of equal width and layers.

    python train/experiments/bench_generation.py                  # minutes on one core
    python train/experiments/bench_generation.py --quick          # seconds: too short to mean much
    python train/experiments/bench_generation.py --report-only    # the stored run

It needs transformers (``pip install "hbll-seq[hf]"``). Models have random weights and equal sizes; no text ends early. One
round runs every form once, so that what else the machine does falls on all of them alike; medians over the rounds are
reported. The forms:

    depth k       ``generate_ids`` along the default path of k blocks
    generate      ``GPT2LMHeadModel.generate``, as people call it
    forward loop  a bare loop over its ``forward`` with its cache, argmax and nothing else

Tokens a second are by the clock; ratios are of processor seconds, which do not count the time that other processes took (but
their use of the memory slows this one, too).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

from comparisons.program import as_program, check_stored, parse_benchmark
from hbll_seq.generation.decoding import generate_ids
from hbll_seq.generation.sampling import SamplingParams
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.config import HBLLConfig
from hbll_seq.utils.arguments import Parser
from hbll_seq.utils.atomic import atomic_write

N_LEVEL = 3
HEAD_WIDTH = 32
PEERS = ("generate", "forward loop")
QUICK = dict(widths=[128], batches=[1], repeats=1)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command-line arguments. Raises ValueError where one is not possible."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--widths", type=int, nargs="+", default=[128, 384], help="widths of the models (default: 128 384)")
    add("--batches", type=int, nargs="+", default=[1, 8], help="rows that are generated together (default: 1 8)")
    add("--new-tokens", type=int, default=128, help="tokens that are added to each prompt (default: 128)")
    add("--prompt-tokens", type=int, default=16, help="tokens of a prompt (default: 16)")
    add("--vocab-size", type=int, default=4096, help="tokens of the vocabulary (default: 4096)")
    add("--repeats", type=int, default=5, help="rounds after one warm-up; medians are reported (default: 5)")
    add("--threads", type=int, default=1, help="CPU threads (default: 1)")
    add("--quick", action="store_true", help=f"defaults for a short run: {QUICK}")
    add("--output", type=Path, help="JSON file of results (default: train/results/bench_generation.json, or "
        "bench_generation-quick.json)")  # fmt: skip
    add("--report-only", action="store_true", help="run nothing: print what the file of results holds")
    args = parse_benchmark(parser, argv, "bench_generation", QUICK)
    for name in ("new_tokens", "prompt_tokens", "vocab_size", "repeats", "threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}={getattr(args, name)}: must be at least 1")
    for width in args.widths:
        if width < 1 or width % HEAD_WIDTH:
            raise ValueError(f"widths={width}: must be a multiple of {HEAD_WIDTH}, the width of a head")
    if min(args.batches) < 1:
        raise ValueError(f"batches={min(args.batches)}: must be at least 1")
    return args


def our_forms(width: int, ids: torch.Tensor, args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """Generation along the default path of every depth."""
    config = HBLLConfig(vocab_size=args.vocab_size, n_level=N_LEVEL, n_embd=width, n_head=width // HEAD_WIDTH,
                        context_length=args.prompt_tokens + args.new_tokens)  # fmt: skip
    model, sampling = HBLLForCausalLM(config).eval(), SamplingParams(args.new_tokens, temperature=0)

    def generate(path: tuple[int, ...]) -> None:
        n_steps = sum(1 for _ in generate_ids(model, ids.tolist(), path, sampling))
        assert n_steps == args.new_tokens

    paths = {depth: model.resolve_path(depth=depth) for depth in range(1, config.n_layer + 1)}
    return {f"depth {depth}": lambda path=path: generate(path) for depth, path in reversed(paths.items())}


def peer_forms(width: int, ids: torch.Tensor, args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """transformers' GPT-2. Raises ValueError where transformers is missing."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        raise ValueError(
            'transformers is not installed, which this compares with: pip install "hbll-seq[hf]"; or see the stored run '
            "with --report-only"
        ) from None
    config = GPT2Config(vocab_size=args.vocab_size, n_positions=args.prompt_tokens + args.new_tokens, n_embd=width,
                        n_layer=2**N_LEVEL - 1, n_head=width // HEAD_WIDTH, bos_token_id=0, eos_token_id=0)  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    mask = torch.ones_like(ids)

    def generate() -> None:
        output = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=args.new_tokens)
        assert output.shape[1] == args.prompt_tokens + args.new_tokens

    @torch.inference_mode()
    def loop() -> None:
        output = model(ids, use_cache=True)
        for _ in range(args.new_tokens - 1):
            tokens = output.logits[:, -1:].argmax(-1)
            output = model(tokens, past_key_values=output.past_key_values, use_cache=True)

    return {"generate": generate, "forward loop": loop}


def measure(width: int, batch: int, args: argparse.Namespace) -> list[dict]:
    """All forms of one setting, in rounds."""
    torch.manual_seed(0)
    ids = torch.randint(args.vocab_size, (batch, args.prompt_tokens))
    forms = {**peer_forms(width, ids, args), **our_forms(width, ids, args)}
    clock: dict[str, list[float]] = {name: [] for name in forms}
    cpu: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(1 + args.repeats):
        for name, form in forms.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            form()
            cpu[name].append(time.process_time() - start_cpu)
            clock[name].append(time.perf_counter() - start)
    rows = []
    for name in forms:
        seconds, cpu_seconds = median(clock[name][1:]), median(cpu[name][1:])
        rows.append({"width": width, "batch": batch, "form": name, "seconds": seconds, "cpu_seconds": cpu_seconds,
                     "tokens_per_second": batch * args.new_tokens / seconds,
                     "tokens_per_cpu_second": batch * args.new_tokens / cpu_seconds})  # fmt: skip
    return rows


def table(rows: Sequence[dict]) -> str:
    """One line for each form: tokens a second, and how many times transformers' two forms that is."""
    lines = [f"{'width':>5} {'batch':>5}  {'form':<12} {'tokens/s':>9} {'per cpu s':>9}  {'/ generate':>10} {'/ loop':>7}"]
    for row in rows:
        ratios = [row["tokens_per_cpu_second"] / of(rows, row, peer)["tokens_per_cpu_second"] for peer in PEERS]
        lines.append(f"{row['width']:>5} {row['batch']:>5}  {row['form']:<12} {row['tokens_per_second']:>9,.0f} "
                     f"{row['tokens_per_cpu_second']:>9,.0f}  {ratios[0]:>10.2f} {ratios[1]:>7.2f}")  # fmt: skip
    return "\n".join(lines)


def of(rows: Sequence[dict], like: dict, form: str) -> dict:
    """The row of another form in the same setting."""
    return next(r for r in rows if (r["width"], r["batch"], r["form"]) == (like["width"], like["batch"], form))


def report_line(rows: Sequence[dict]) -> str:
    """Full depth against transformers, and the cost of a depth against its share of the blocks."""
    full = [row for row in rows if row["form"] == f"depth {2**N_LEVEL - 1}"]
    ratios = [f"{r['tokens_per_cpu_second'] / of(rows, r, 'generate')['tokens_per_cpu_second']:.2f} (width {r['width']}, "
              f"batch {r['batch']})" for r in full]  # fmt: skip
    costs = [f"{of(rows, r, 'depth 1')['cpu_seconds'] / r['cpu_seconds']:.2f}" for r in full]
    return f"depth 7 / transformers' generate: {', '.join(ratios)}\ncost of depth 1 in units of depth 7: {', '.join(costs)}"


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Measures every setting, prints the table and writes it as JSON."""
    args = parse(argv)
    if args.report_only:
        check_stored(args.output)
        rows = json.loads(args.output.read_text(encoding="utf-8"))["rows"]
    else:
        torch.set_num_threads(args.threads)
        rows = [row for width in args.widths for batch in args.batches for row in measure(width, batch, args)]
        setting = {k: v for k, v in vars(args).items() if k not in ("output", "quick", "report_only")}
        setting |= {"torch": torch.__version__, "transformers": version("transformers"), "load": os.getloadavg()[0]}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(args.output, json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")
    print(table(rows))
    print(report_line(rows))
    return rows


if __name__ == "__main__":
    as_program(main)
