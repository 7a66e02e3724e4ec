"""Trains a lossless SentencePiece BPE tokenizer on any data source and writes it as a .model file.

python tokenizers/train_tokenizer.py --data my_text.txt --vocab-size 8192 --output my.model
python train/lm.py --data my_text.txt --tokenizer my.model
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from hbll_seq.data.sources import open_corpus
from hbll_seq.data.tokenizer import Tokenizer
from hbll_seq.utils.console import forgiving_output, say
from hbll_seq.utils.reading import possible_name, quote

SAMPLE_LINES = 5000  # of the validation split, to report how well the tokenizer compresses


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data",
        default="bundled",
        help="bundled, wikitext-2, wikitext-103, a .txt/.jsonl/.parquet file or folder, or a Hub id (default: bundled)",
    )
    parser.add_argument("--column", default="text", help="column of the text in .jsonl, .parquet and Hub data")
    parser.add_argument("--vocab-size", type=int, default=4096, help="number of pieces, 256 bytes included")
    parser.add_argument("--output", required=True, help="the .model file to write")
    parser.add_argument("--force", action="store_true", help="replace the output file if it is there")
    parser.add_argument(
        "--symbol",
        action="append",
        default=[],
        metavar="TEXT",
        help="a string that always is one piece, besides newline and blank + newline; may be given several times",
    )
    parser.add_argument(
        "--character-coverage",
        type=float,
        default=0.9995,
        help="share of characters that get a piece (default: 0.9995)",
    )
    parser.add_argument("--max-lines", type=int, default=500_000, help="train on a sample of at most so many lines")
    parser.add_argument("--seed", type=int, default=0, help="of that sample")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, or 1 after a message on stderr."""
    args = build_parser().parse_args(argv)
    try:
        output = check_output(args.output, args.force)
        corpus = open_corpus(args.data, "train", args.column)
        lines = (line for line in corpus.segments() if line is not None)
        tokenizer = Tokenizer.train(
            lines,
            args.vocab_size,
            symbols=("\n", " \n", *args.symbol),
            seed=args.seed,
            character_coverage=args.character_coverage,
            max_lines=args.max_lines,
        )
        tokenizer.save(output)
        say(f"wrote {output}: {tokenizer.vocab_size} pieces, fingerprint {tokenizer.fingerprint[:16]}", sys.stdout)
        say(describe(tokenizer, args.data, args.column), sys.stdout)
    except (ValueError, OSError) as error:
        say(f"error: {error}")
        return 1
    return 0


def check_output(name: str, force: bool) -> Path:
    """Finds out before the work, not after it, that the file cannot be written."""
    path = possible_name(name)
    if path.exists() and not force:
        raise ValueError(f"{quote(name)} is there already; give another --output, or --force to replace it")
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"cannot write {quote(name)}: --output must be a file in a folder that exists")
    return path


def describe(tokenizer: Tokenizer, data: str, column: str) -> str:
    """Compression on the start of the validation split."""
    try:
        segments = open_corpus(data, "validation", column).segments()
        lines = list(islice((line for line in segments if line is not None), SAMPLE_LINES))
    except (ValueError, OSError) as error:
        return f"no validation text to measure compression on ({error})"
    n_tokens = sum(map(len, tokenizer.encode_batch(lines, num_threads=4)))
    n_bytes = sum(len(line.encode()) for line in lines)
    return f"{n_bytes / max(1, n_tokens):.3f} bytes per token on {len(lines)} lines of validation text"


if __name__ == "__main__":
    with forgiving_output():
        status = main()
    sys.exit(status)
