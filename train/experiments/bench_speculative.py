"""Faster ways to generate: speculative decoding, and blocks side by side, beside plain decoding and smaller depths.

    python train/experiments/bench_speculative.py            # minutes
    python train/experiments/bench_speculative.py --quick    # seconds: too short to mean much

Two tables. Speculation: ms a token, how many times as fast as plain decoding, tokens a round, and the share of drafted
tokens that were taken, of each drafter and length, of the depth chosen by the clock, and of the text's repetitions. All
forms write a prompt in turn, so that a busy machine slows all of them. Side by side: ms a token and perplexity of each
depth, and of the full depth with its first k blocks in order.

With one thread on a CPU the time is the thread's own, which other programs take nothing of. It holds the prompt's reading.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from comparisons.program import as_program, parse_benchmark
from hbll_seq.data.sources import open_corpus
from hbll_seq.generation.decoding import Decoding
from hbll_seq.generation.draft_control import clock
from hbll_seq.generation.runner import Runner
from hbll_seq.generation.sampling import SamplingParams
from hbll_seq.generation.side_by_side import SideBySideRunner
from hbll_seq.generation.speculative import Speculation
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.utils.arguments import Parser
from hbll_seq.utils.atomic import atomic_write

QUICK = dict(prompts=2, tokens=20, drafts=[2], windows=2)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--model", default="bundled", help="bundled (the default), a folder or a Hub id; with a tokenizer")
    add("--split", choices=("validation", "test"), default="test", help="of the bundled text, for prompts and perplexity")
    add("--prompts", type=int, default=12, help="prompts, equally far apart in the split (default: 12)")
    add("--prompt-tokens", type=int, default=24, help="tokens of a prompt (default: 24)")
    add("--tokens", type=int, default=128, help="new tokens of each (default: 128)")
    add("--temperatures", type=float, nargs="+", default=[0.0, 0.8], help="(default: 0 0.8)")
    add("--drafts", type=int, nargs="+", default=[2, 4, 6], help="lengths of a draft (default: 2 4 6)")
    add("--drafters", type=int, nargs="+", default=[1, 2, 4], help="depths that draft (default: 1 2 4)")
    add("--in-order", type=int, nargs="+", default=[3, 4, 5], help="blocks in order (default: 3 4 5)")
    add("--windows", type=int, default=32, help="windows of the split for perplexity (default: 32)")
    add("--threads", type=int, default=1, help="CPU threads (default: 1)")
    add("--quick", action="store_true", help=f"defaults for a short run: {QUICK}")
    add("--output", type=Path, help="JSON file of results (default: train/results/bench_speculative.json, or "
        "bench_speculative-quick.json)")  # fmt: skip
    args = parse_benchmark(parser, argv, "bench_speculative", QUICK)
    for name in ("prompts", "prompt_tokens", "tokens", "windows", "threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}={getattr(args, name)}: must be at least 1")
    return args


def forms(model: HBLLForCausalLM, args: argparse.Namespace) -> dict[str, bool | Speculation]:
    """What is compared, by name; the first is plain decoding."""
    n_layer = model.config.n_layer
    found: dict[str, bool | Speculation] = {"plain": False}
    for n_draft in args.drafts:
        for depth in args.drafters:
            if depth < n_layer:
                found[f"depth {depth} drafts {n_draft}"] = Speculation(drafter=depth, n_draft=n_draft)
        for in_order in args.in_order:
            if in_order < n_layer - 1:
                found[f"{in_order} in order draft {n_draft}"] = Speculation(in_order=in_order, n_draft=n_draft)
    return {**found, "chosen depth": Speculation(), "text": Speculation(drafter="text"), "speculative=True": True}


def speculation(model: HBLLForCausalLM, prompts: list[list[int]], temperature: float, args: argparse.Namespace) -> list[dict]:
    """A row for each form: every prompt is written by all of them before the next one."""
    path, now = model.resolve_path(), clock(model.embed.weight.device)
    counts = {name: dict(seconds=0.0, tokens=0, rounds=0, of_rounds=0, drafted=0) for name in forms(model, args)}
    for prompt in prompts:
        for name, speculative in forms(model, args).items():
            count, before = counts[name], now()
            decoding = Decoding(model, [prompt], path, SamplingParams(args.tokens, temperature=temperature),
                                n_tokens=model.tokenizer.vocab_size, speculative=speculative)  # fmt: skip
            count["tokens"] += sum(1 for _ in decoding)
            count["seconds"] += now() - before
            totals = getattr(getattr(decoding.reader, "control", None), "totals", None)
            if totals is not None:
                count["rounds"] += totals.rounds
                count["of_rounds"] += totals.tokens
                count["drafted"] += totals.drafted
    rows = []
    for name, count in counts.items():
        ms = 1e3 * count["seconds"] / count["tokens"]
        rounds, taken = count["rounds"], count["of_rounds"] - count["rounds"]
        rows.append({"temperature": temperature, "form": name, "ms_a_token": ms,
                     "times_plain": rows[0]["ms_a_token"] / ms if rows else 1.0,
                     "tokens_a_round": count["of_rounds"] / rounds if rounds else None,
                     "accepted": taken / count["drafted"] if rounds else None})  # fmt: skip
        print(_line(rows[-1]), flush=True)
    return rows


def side_by_side(model: HBLLForCausalLM, prompts: list[list[int]], windows: Tensor, args: argparse.Namespace) -> list[dict]:
    """Depths, and the full depth with some blocks in order: ms a token and perplexity."""
    n_layer, full = model.config.n_layer, model.resolve_path()
    makers: dict[str, Callable] = {}
    for depth in sorted({min(depth, n_layer) for depth in (4, 5, n_layer)}):
        makers[f"depth {depth}"] = lambda path=model.resolve_path(depth): Runner(model, path)
    for k in [k for k in args.in_order if k < n_layer - 1]:
        makers[f"{k} in order"] = lambda k=k: SideBySideRunner(model, full, k)
    now, seconds, rows = clock(model.embed.weight.device), dict.fromkeys(makers, 0.0), []
    with torch.no_grad():
        for prompt in prompts:
            for name, make in makers.items():
                runner = make()
                tokens = runner.prefill(torch.tensor([prompt], device=windows.device)).argmax(-1)
                before = now()
                for _ in range(args.tokens):
                    tokens = runner.step(tokens).argmax(-1)
                tokens.tolist()
                seconds[name] += now() - before
        for name, make in makers.items():
            total = 0.0
            for window in windows.split(4):
                logits = make().read(window[:, :-1])
                total += F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction="sum").item()
            perplexity = torch.tensor(total / windows[:, 1:].numel()).exp().item()
            ms = 1e3 * seconds[name] / (len(prompts) * args.tokens)
            rows.append({"form": name, "ms_a_token": ms, "perplexity": perplexity})
            print(f"{name:<28}  {ms:>8.3f} ms a token  perplexity {perplexity:>8.2f}", flush=True)
    return rows


def _line(row: dict) -> str:
    told = f"T={row['temperature']:<4} {row['form']:<24}  {row['ms_a_token']:>8.3f} ms a token  {row['times_plain']:>5.2f} x"
    if row["accepted"] is None:
        return told
    return told + f"  {row['tokens_a_round']:>5.2f} tokens a round  {row['accepted']:>5.2f} accepted"


def _beginning(split: str, n_characters: int) -> str:
    """The beginning of a split of the bundled text."""
    text, length = [], 0
    for line in open_corpus("bundled", split).segments():
        text.append(line or "")
        length += len(text[-1])
        if length >= n_characters:
            break
    return "".join(text)


def main(argv: Sequence[str] | None = None) -> dict:
    """Measures both tables, prints them and writes them as JSON."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    model = HBLLForCausalLM.from_pretrained(args.model).eval()
    ids = model.tokenizer.encode(_beginning(args.split, 600_000))
    apart = max(1, (len(ids) - args.prompt_tokens) // args.prompts)
    prompts = [ids[i * apart : i * apart + args.prompt_tokens] for i in range(args.prompts)]
    length = model.config.context_length + 1
    windows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)[: args.windows]
    result = {"speculation": [], "side_by_side": side_by_side(model, prompts, windows, args)}
    for temperature in args.temperatures:
        torch.manual_seed(0)
        result["speculation"] += speculation(model, prompts, temperature, args)
    setting = {k: v for k, v in vars(args).items() if k not in ("output", "quick")} | {"torch": torch.__version__}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(args.output, json.dumps({"setting": setting, **result}, indent=1) + "\n")
    return result


if __name__ == "__main__":
    as_program(main)
