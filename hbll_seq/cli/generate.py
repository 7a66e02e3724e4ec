"""``hbll-seq generate``: text from a prompt."""

from __future__ import annotations

import argparse
from typing import Any

from hbll_seq.cli import options
from hbll_seq.cli.output import Output
from hbll_seq.generation.sampling import SamplingParams
from hbll_seq.utils.arguments import Parser

EXAMPLES = """\
  hbll-seq generate "The history of the city" --depth 3
  hbll-seq generate "The river" --model runs/lm --temperature 0 --max-new-tokens 20
  echo "The river" | hbll-seq generate - --path 1,2,4 --seed 0
  hbll-seq generate "The river" --json | jq -r .texts[0].text

A terminal shows the text as it comes, control characters as escapes; a pipe gets the plain text. The end of the last line of
stdin is no part of the prompt.
"""


def parser(prog: str) -> Parser:
    """What the command takes; the sampling options are the fields of SamplingParams."""
    found = options.command_parser(prog, "Continue a text. Writes the prompt and its continuation.", EXAMPLES,
                                   "[PROMPT | -] [options]")
    found.add_argument("prompt", metavar="PROMPT", nargs="?", help="the text to continue, or - to read it from stdin")
    options.add_json_option(found)
    found.add_argument("--truncate-prompt", action="store_true", help="keep the end of a prompt that is longer than the "
                       "model's context, instead of refusing it")
    options.add_model_option(found)
    group = found.add_argument_group("path").add_mutually_exclusive_group()
    group.add_argument("--depth", type=options.depth, metavar="N", help="how many blocks to run, or best, or fast (default: "
                       "all)")
    group.add_argument("--path", type=options.path, metavar="LIST", help="which blocks to run, such as 1,2,4")
    names = options.add_fields(found.add_argument_group("sampling"), SamplingParams)
    found.set_defaults(sampling_names=names)
    return found


def run(args: argparse.Namespace, out: Output) -> None:
    """Write the text, or the JSON document. Raises ValueError for a prompt or an option that is not possible."""
    given = {name: getattr(args, name) for name in args.sampling_names if hasattr(args, name)}
    sampling = SamplingParams(**given)  # before a model is loaded in vain

    from hbll_seq.cli.models import open_model
    from hbll_seq.cli.texts import prompt_text

    prompt = prompt_text(args.prompt)
    model = open_model(args.model, args.device)
    chosen: dict[str, Any] = {"depth": args.depth, "path": args.path, "truncate_prompt": args.truncate_prompt}
    if args.json:
        path = model.resolve_path(args.depth, args.path)
        text = model.generate(prompt, sampling=sampling, **chosen)
        texts = [{"text": text, "continuation": text[len(prompt) :]}]
        out.json({"model": args.model, "path": list(path), "prompt": prompt, "sampling": vars(sampling), "texts": texts})
        return
    pieces = model.stream(prompt, sampling=sampling, **chosen)
    out.write(prompt)
    for piece in pieces:
        out.write(piece)
    out.write("\n")
