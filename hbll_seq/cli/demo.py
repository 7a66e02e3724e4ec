"""``hbll-seq demo``: a page to play with."""

from __future__ import annotations

import argparse

from hbll_seq.cli import options
from hbll_seq.cli.output import Output
from hbll_seq.utils.arguments import Parser

EXAMPLES = """\
  hbll-seq demo
  hbll-seq demo --model runs/lm --port 8000

It needs the extra: pip install "hbll_seq[demo]", or in a clone of the
repository pip install -e ".[demo]". The page is for this machine alone, unless
--host says otherwise, and loads nothing from elsewhere.
"""


def parser(prog: str) -> Parser:
    """What the command takes."""
    found = options.command_parser(prog, "A page in the browser: text at any depth, and which words need depth.", EXAMPLES)
    options.add_model_option(found)
    group = found.add_argument_group("page")
    group.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (default: 127.0.0.1, for "
                       "this machine alone)")
    group.add_argument("--port", type=options.whole, metavar="N", help="port to listen on (default: the first free one from "
                       "7860 on)")
    return found


def run(args: argparse.Namespace, out: Output) -> None:
    """Serve the page until Ctrl-C. Raises ValueError where Gradio, the model or the port cannot be had."""
    from hbll_seq.cli.models import open_model
    from hbll_seq.integrations.demo import serve

    serve(open_model(args.model, args.device), args.model, host=args.host, port=args.port)
