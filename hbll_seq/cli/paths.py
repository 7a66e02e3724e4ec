"""``hbll-seq paths``: what is known of each path of a model."""

from __future__ import annotations

import argparse

from hbll_seq.cli import options
from hbll_seq.cli.output import Output
from hbll_seq.utils.arguments import Parser

EXAMPLES = """\
  hbll-seq paths                      the bundled model
  hbll-seq paths runs/lm --no-time
  hbll-seq paths runs/lm --json | jq '.rows[] | select(.trained)'

The perplexities are those that were stored when the model was trained; the
time of a token is measured now, on this machine.
"""


def parser(prog: str) -> Parser:
    """What the command takes."""
    found = options.command_parser(prog, "The paths of a model: stored perplexity, parameters, milliseconds a token.\n"
                                   "--depth best and --depth fast choose by the perplexities.", EXAMPLES)
    options.add_model_argument(found)
    options.add_json_option(found)
    options.add_time_options(found)
    return found


def run(args: argparse.Namespace, out: Output) -> None:
    """Print the table. Raises ValueError where there is no such model."""
    from hbll_seq.cli.models import open_model

    report = open_model(args.model, args.device).paths(n_tokens=args.timed_tokens, measure=args.time)
    if args.json:
        out.json({"model": args.model, "rows": report.to_dicts()})
    else:
        out.write(f"{report}\n")
