"""Long sequences on several processes: a recurrent model's steps shared by them, beside BPTT on one process and on all.

    python train/experiments/bench_sequence.py                      # minutes on two cores that are free; goes on
    python train/experiments/bench_sequence.py --quick              # seconds: too short to mean much
    python train/experiments/bench_sequence.py --ranks 4 --steps 1 --repeats 1      # counts; two cores give no times of 4

A step is forward, backward, reduction of gradients, clipping and AdamW of a recurrent language model whose windows hold
--context-length steps, on processes of one thread each. All methods have the same weights and batches:

{methods}

Everything is measured, counted and printed as by bench_parallel.py (see its --help): "ratio" is to bptt on one process, taken
by turns. What ours gains by fewer steps in a row, ranks=1 shows; the rest is gained by the ranks. Symbols are random, so that
nothing is said of what a method learns: that is compare_rnn.py's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from bench_parallel import add_options, check_options, measure
from comparisons import sequence_methods
from comparisons.program import as_program, parse_benchmark
from comparisons.sequence_methods import Sequences, check_method
from hbll_seq.layers.cells import CELL_KINDS
from hbll_seq.utils.arguments import Parser

__doc__ = __doc__.format(methods=sequence_methods.__doc__.split("\n\n")[1])
DEFAULTS = "ours:K=1,M=1,A=zero,c=8"  # the objective's, written out
METHODS = ("bptt", "fused", "ddp", "ddp:fused", "truncated:window=16", f"{DEFAULTS},ranks=1", DEFAULTS)
QUICK = dict(context_length=[64], hidden_size=32, steps=3, repeats=2,
             methods=["bptt", "ddp", f"{DEFAULTS},ranks=1", DEFAULTS])  # fmt: skip
#: with torch, what a result holds for
DECISIVE = ("batch_size", "vocab", "cell")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked. Raises ValueError for a value out of range, or a method that there is not."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--context-length", type=int, nargs="+", default=[256, 1024, 4096], help="steps of a window (default: 256 1024 4096)")
    add("--hidden-size", type=int, default=128, help="H, the state's width (default: 128)")
    add("--batch-size", type=int, default=4, help="windows of a step, over all processes (default: 4)")
    add("--vocab", type=int, default=256, help="symbols (default: 256)")
    add("--cell", choices=CELL_KINDS, default="gru", help="recurrent cell (default: gru)")
    add_options(parser, METHODS, QUICK, "bench_sequence")
    args = parse_benchmark(parser, argv, "bench_sequence", QUICK)
    check_options(args, ("hidden_size", "batch_size", "vocab"))
    for length in args.context_length:
        if length < 1:
            raise ValueError(f"context_length={length}: must be at least 1")
    for name in args.methods:
        check_method(name)
    return args


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Measures every method that the output does not hold yet; prints tables, writes JSON and a figure."""
    args = parse(argv)
    cases = [({"context_length": length, "width": args.hidden_size},
              Sequences(length, args.hidden_size, args.batch_size, args.vocab, args.cell, device=args.device))
             for length in args.context_length]  # fmt: skip
    return measure(cases, args, DECISIVE)


if __name__ == "__main__":
    as_program(main)
