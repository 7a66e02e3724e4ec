"""``hbll-seq eval``: perplexity of a text along the paths of a model."""

from __future__ import annotations

import argparse

from hbll_seq.cli import options
from hbll_seq.cli.output import Output
from hbll_seq.tree.topology import path_text
from hbll_seq.utils.arguments import Parser
from hbll_seq.utils.tables import table

EXAMPLES = """\
  hbll-seq eval my.txt                              every depth, bundled model
  cat a.txt b.txt | hbll-seq eval - --depth 1,3,7   some depths
  hbll-seq eval my.txt --path 4,6,7 --path 1,2,4    any paths
  hbll-seq eval --data bundled --split test --model runs/lm
  hbll-seq eval my.txt --json | jq '.rows[].bits_per_byte'

The text is one document, read in windows of the model's context. Per token and
per word are perplexities; the end of a line counts as a word. Bits per byte
compare models of any vocabulary.
"""
COLUMNS = ["depth", "nats/token", "per token", "per word", "bits/byte", "path"]
FORMATS = ["d", ".4f", ".2f", ".2f", ".4f", "<"]


def parser(prog: str) -> Parser:
    """What the command takes."""
    found = options.command_parser(prog, "Perplexity of a text along the paths of a model, and bits per byte.", EXAMPLES,
                                   "[FILE | -] [options]")
    found.add_argument("file", metavar="FILE", nargs="?", help="a text file, or - for stdin; or give --data")
    options.add_text_options(found)
    options.add_json_option(found)
    options.add_model_option(found)
    options.add_paths_options(found.add_argument_group("paths"))
    return found


def run(args: argparse.Namespace, out: Output) -> None:
    """Print the table, or the JSON document. Raises ValueError for what cannot be read or evaluated."""
    from hbll_seq.cli.models import chosen_paths, open_model
    from hbll_seq.cli.texts import measured_text
    from hbll_seq.evaluation.perplexity import evaluate_paths
    from hbll_seq.evaluation.text import split_windows, text_windows

    measured = measured_text(args, args.file)
    model = open_model(args.model, args.device)
    paths = chosen_paths(model, args)
    windows = text_windows(model, measured.text) if measured.data is None else split_windows(model, *measured[2:])
    rows = evaluate_paths(model, windows, paths, batch_size=args.batch_size, max_batches=args.max_batches,
                          progress=True)
    stream = windows.stream
    if args.json:
        sizes = {"tokens": stream.n_tokens, "words": stream.n_words, "bytes": stream.n_bytes}
        out.json({"model": args.model, "text": measured.name, **sizes, "rows": rows})
        return
    out.write(f"{measured.name}: {stream.n_tokens - 1:,} tokens, {stream.n_words:,} words, {stream.n_bytes:,} bytes\n")
    out.write(table(COLUMNS, [[row["depth"], *figures(row), path_text(row["path"])] for row in rows], FORMATS))


def figures(row: dict) -> list[float]:
    """What a row of ``evaluate_paths`` says in numbers: nats per token, perplexity per token and word, bits per byte."""
    return [row[key] for key in ("loss", "perplexity", "word_perplexity", "bits_per_byte")]
