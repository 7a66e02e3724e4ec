"""``hbll-seq export``: one path of a model as a model of its own."""

from __future__ import annotations

import argparse

from hbll_seq.cli import options
from hbll_seq.cli.output import Output
from hbll_seq.utils.arguments import Parser
from hbll_seq.utils.console import say

EXAMPLES = """\
  hbll-seq export runs/lm small-model --depth 3
  hbll-seq export bundled mine --path 1,2,4
  hbll-seq generate "The river" --model small-model
"""


def parser(prog: str) -> Parser:
    """What the command takes."""
    found = options.command_parser(prog, "Write the blocks of one path as a model of its own, which loads like any other.",
                                   EXAMPLES)
    found.add_argument("model", metavar="MODEL", help=options.MODEL_HELP)
    found.add_argument("folder", metavar="FOLDER", help="where the new model goes; no folder of a model or a run")
    found.add_argument("--overwrite", action="store_true", help="replace a model in FOLDER; a training run's folder never")
    group = found.add_mutually_exclusive_group(required=True)
    group.add_argument("--depth", type=options.depth, metavar="N", help="how many blocks, or best, or fast")
    group.add_argument("--path", type=options.path, metavar="LIST", help="which blocks, such as 1,2,4")
    return found


def run(args: argparse.Namespace, out: Output) -> None:
    """Write the folder. Raises ValueError where the path is not possible, or the folder is taken or cannot be written."""
    from hbll_seq.cli.models import open_model, path_of

    model = open_model(args.model)
    path = path_of(model, args.depth, args.path)
    model.export_path(path, args.folder, overwrite=args.overwrite)
    say(f"hbll-seq: {len(path)} blocks ({','.join(map(str, path))}) of {args.model} written to {args.folder}")
