"""``hbll-seq eval``: perplexity of a text along the paths of a model."""

from __future__ import annotations

import argparse
from typing import Any

from hbll_seq.cli import options
from hbll_seq.cli.output import Output
from hbll_seq.tree.topology import path_text
from hbll_seq.utils.arguments import Parser
from hbll_seq.utils.tables import shown_per_word, table

EXAMPLES = """\
  hbll-seq eval my.txt                              every depth, bundled model
  cat a.txt b.txt | hbll-seq eval - --depth 1,3,7   some depths
  hbll-seq eval my.txt --path 4,6,7 --path 1,2,4    any paths
  hbll-seq eval --data bundled --split test --model runs/lm
  hbll-seq eval my.txt --json | jq '.rows[].bits_per_byte'

The text is one document, read in windows of the model's context. Per token and
per word are perplexities; the end of a line counts as a word, and a dash is a
figure above 10,000 per word, which says nothing. Bits per byte compare models
of any vocabulary.
"""
COLUMNS = ["depth", "nats/token", "per token", "per word", "bits/byte", "path"]
BY_PATH = "path "  # how the names of rows begin that --path has named
FORMATS = [">", ".4f", ".2f", ".2f", ".4f", "<"]


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
    from hbll_seq.cli.models import chosen_paths, open_model, tell_untrained
    from hbll_seq.cli.texts import measured_text, windows_of
    from hbll_seq.evaluation.perplexity import evaluate_paths, part_read

    measured = measured_text(args, args.file)
    model = open_model(args.model, args.device)
    paths = chosen_paths(model, args)
    tell_untrained(model, paths)
    windows = windows_of(model, measured)
    rows = evaluate_paths(model, windows, paths, batch_size=args.batch_size, max_batches=args.max_batches,
                          progress=True)
    stream = windows.stream
    n_all, n_read = stream.n_tokens - 1, rows[0]["tokens"]
    if args.json:
        sizes = {"tokens": stream.n_tokens, "words": stream.n_words, "bytes": stream.n_bytes, "tokens_read": n_read}
        out.json({"model": args.model, "text": measured.name, **sizes, "rows": rows})
        return
    read = f"{n_all:,} tokens," if n_read == n_all else f"{part_read(n_read, stream)}; in all"
    out.write(f"{measured.name}: {read} {stream.n_words:,} words, {stream.n_bytes:,} bytes\n")
    out.write(table(COLUMNS, [[named(row), *figures(row), path_shown(model, row)] for row in rows], FORMATS))


def named(row: dict) -> str:
    """What the column of depths calls a row of ``evaluate_paths``: its depth, or the path that ``--path`` has named."""
    return row["name"].removeprefix(BY_PATH) if row["name"].startswith(BY_PATH) else str(row["depth"])


def path_shown(model: Any, row: dict) -> str:
    """The path of a row in words, and whether this model was never trained along it."""
    return path_text(row["path"]) + " (not trained)" * (not model.config.is_trained(tuple(row["path"])))


def figures(row: dict) -> list[float | None]:
    """What a row of ``evaluate_paths`` says in numbers: nats per token, perplexity per token and word, bits per byte."""
    return [row["loss"], row["perplexity"], shown_per_word(row["word_perplexity"]), row["bits_per_byte"]]
