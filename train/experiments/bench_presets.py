"""Time of a training step of the presets that train a small model, taken by turns on random tokens.

    python train/experiments/bench_presets.py                                                           # a minute
    python train/experiments/bench_presets.py --presets small debug --rounds 2 --output quick.json      # seconds

A step is forward, backward, clipping and AdamW. Times are processor time, see comparisons/turns.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from comparisons.program import as_program
from comparisons.turns import Training, seconds_by_turns
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.training.objective import make_objective
from hbll_seq.training.optimizer import make_optimizer
from hbll_seq.training.presets import PRESETS, read_preset, resolve
from hbll_seq.utils.arguments import Parser
from hbll_seq.utils.atomic import atomic_write

RESULTS = Path(__file__).resolve().parents[1] / "results"
VOCABULARY = 4096  # the default tokenizer's


def training_of(name: str) -> Training:
    """What ``train/lm.py --preset NAME`` trains, on random tokens. Raises ValueError where there is no such preset."""
    settings = resolve(read_preset(name, PRESETS)).resolved()
    torch.manual_seed(settings.seed)
    model = HBLLForCausalLM(settings.model_config(VOCABULARY))
    objective = make_objective(settings, model, 0)
    windows = torch.randint(VOCABULARY, (settings.batch_size, settings.context_length + 1))
    carry = "states" if settings.carry_state else None
    return Training(model, objective, make_optimizer(objective, settings), lambda step: (windows, None), settings.clip, carry)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Measures, prints and stores milliseconds of a step by preset, and returns them."""
    parser = Parser(description=__doc__)
    parser.add_argument("--presets", nargs="+", default=["small", "hybrid-small", "mingru-small", "gru-small"],
                        help="names (default: small hybrid-small mingru-small gru-small)")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=40, help="steps of each (default: 40)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--output", type=Path, default=RESULTS / "bench_presets.json", help="JSON file of results")
    args: argparse.Namespace = parser.parse_args(argv)
    if args.threads < 1:
        raise ValueError(f"threads={args.threads}: must be at least 1")
    torch.set_num_threads(args.threads)
    seconds = seconds_by_turns({name: training_of(name) for name in args.presets}, args.rounds)
    found = {name: round(1e3 * value, 1) for name, value in seconds.items()}
    for name, ms in found.items():
        print(f"{name}: {ms:.0f} ms a step")
    atomic_write(args.output, json.dumps({"rounds": args.rounds, "threads": args.threads, "ms": found}, indent=1) + "\n")
    return found


if __name__ == "__main__":
    as_program(main)
