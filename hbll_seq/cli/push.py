"""``hbll-seq push``: a model on the Hugging Face Hub."""

from __future__ import annotations

import argparse

from hbll_seq.cli import options
from hbll_seq.cli.output import Failure, Output
from hbll_seq.utils.arguments import Parser

EXAMPLES = """\
  hf auth login
  hbll-seq push runs/lm me/my-model --private
  hbll-seq push runs/lm me/my-model --license mit --message "Train longer"
"""
#: what goes to the header of the card, where it is given
CARD = ("license", "language", "datasets", "data", "model_name")


def parser(prog: str) -> Parser:
    """What the command takes."""
    found = options.command_parser(prog, "Upload a model to the Hugging Face Hub, with its card. Log in first with\n"
                                   "`hf auth login`, or put a token into HF_TOKEN.", EXAMPLES)
    found.add_argument("model", metavar="MODEL", help=options.MODEL_HELP)
    found.add_argument("repo_id", metavar="OWNER/NAME", help="the repository, which is made where it is missing")
    found.add_argument("--private", action="store_true", default=None, help="a new repository is private")
    found.add_argument("--revision", metavar="BRANCH", help="branch to write to (default: the main one)")
    found.add_argument("--message", metavar="TEXT", default="Upload model", help="of the commit (default: Upload model)")
    found.add_argument("--create-pr", action="store_true", help="open a pull request instead of writing to the branch")
    group = found.add_argument_group("model card (default: the card that the model has)")
    group.add_argument("--license", metavar="ID", help="such as apache-2.0")
    group.add_argument("--language", metavar="ID", action="append", help="such as en; may be given several times")
    group.add_argument("--datasets", metavar="ID", action="append", help="Hub id of what it was trained on; several times")
    group.add_argument("--data", metavar="TEXT", help="what it was trained on, in words")
    group.add_argument("--model-name", metavar="TEXT", help="heading of the card")
    return found


def run(args: argparse.Namespace, out: Output) -> None:
    """Upload, and write the address of the commit.

    Raises:
        ValueError: the model or the id is not possible.
        Failure: the Hub refuses, or cannot be reached.
    """
    from hbll_seq.cli.models import open_model
    from hbll_seq.models.hub_source import HUB_ERRORS

    model = open_model(args.model)
    card = {name: getattr(args, name) for name in CARD if getattr(args, name) is not None}
    try:
        address = model.push_to_hub(args.repo_id, private=args.private, revision=args.revision, create_pr=args.create_pr,
                                    commit_message=args.message, **card)
    except ValueError as error:
        if isinstance(error.__cause__, HUB_ERRORS):
            raise Failure(str(error)) from error
        raise
    out.write(f"{address}\n")
