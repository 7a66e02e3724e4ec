"""``hbll-seq generate``: text from a prompt."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from hbll_seq.cli import options
from hbll_seq.cli.output import Output
from hbll_seq.generation.sampling import SamplingParams
from hbll_seq.utils.arguments import Parser

EXAMPLES = """\
  hbll-seq generate "The history of the city" --depth 3
  hbll-seq generate "The river" --model runs/lm --temperature 0
  echo "The river" | hbll-seq generate - --path 1,2,4 --seed 0
  hbll-seq generate "The river" --n 3 --stop " ." --min-p 0.05
  hbll-seq generate "The river" --json --logprobs 3 | jq '.texts[0].tokens'

A terminal shows the text as it comes, control characters as escapes; a pipe
gets the plain text. The line break at the end of stdin is not part of the
prompt. Several texts (--n) have a line of three hyphens between them.
"""
SEPARATOR = "---\n"


def parser(prog: str) -> Parser:
    """What the command takes; the sampling options are the fields of SamplingParams."""
    found = options.command_parser(prog, "Continue a text. Writes the prompt and its continuation.", EXAMPLES,
                                   "[PROMPT | -] [options]")
    found.add_argument("prompt", metavar="PROMPT", nargs="?", help="the text to continue, or - to read it from stdin")
    options.add_json_option(found)
    found.add_argument("--logprobs", metavar="K", nargs="?", const=0, type=options.whole_or_zero, help="with --json: the "
                       "log-probability of every new token, and the K most probable tokens in its place")
    found.add_argument("--truncate-prompt", action="store_true", help="keep the end of a prompt that is longer than the "
                       "model's context, instead of refusing it")
    options.add_model_option(found)
    group = found.add_argument_group("path").add_mutually_exclusive_group()
    group.add_argument("--depth", type=options.depth, metavar="N", help="how many blocks to run, or best, fast or all "
                       "(default: all)")
    group.add_argument("--path", type=options.path, metavar="LIST", help="which blocks to run, such as 1,2,4")
    faster = found.add_argument_group("faster")
    faster.add_argument("--speculative", action=argparse.BooleanOptionalAction, help="guess what "
                        "followed the last three tokens before, and check several at once; the text is the same; with "
                        "--temperature 0 alone (default: off)")
    faster.add_argument("--in-order", type=options.whole_or_zero, metavar="K", help="take K of the blocks in order and the "
                        "others side by side: fast, and another network (default: all in order)")
    options.add_sampling_options(found.add_argument_group("sampling"))
    return found


def run(args: argparse.Namespace, out: Output) -> None:
    """Write the text, or the JSON document. Raises ValueError for a prompt or an option that is not possible."""
    sampling = SamplingParams(**options.sampling_given(args))  # before a model is loaded in vain
    if args.logprobs is not None and not args.json:
        raise ValueError("--logprobs belongs to --json: give that too, or leave it out")

    from hbll_seq.cli.models import open_model, path_of
    from hbll_seq.cli.texts import prompt_text

    prompt = prompt_text(args.prompt)
    model = open_model(args.model, args.device)
    names = ("depth", "path", "truncate_prompt", "speculative", "in_order")
    chosen: dict[str, Any] = {name: getattr(args, name) for name in names}
    if isinstance(args.depth, str):
        chosen |= {"depth": None, "path": path_of(model, args.depth)}
    if args.json:
        found = model.generate_detailed(prompt, sampling=sampling, alternatives=args.logprobs or 0, **chosen)
        texts = [_told(generation, model.tokenizer, args.logprobs is not None) for generation in found]
        document = {"model": args.model, "path": list(found[0].path), "prompt": prompt, "sampling": asdict(sampling)}
        out.json({**document, "texts": texts})
    elif sampling.n > 1:
        out.write(SEPARATOR.join(f"{text}\n" for text in model.generate(prompt, sampling=sampling, **chosen)))
    else:
        pieces = model.stream(prompt, sampling=sampling, **chosen)
        out.write(prompt)
        for piece in pieces:
            out.write(piece)
        out.write("\n")


def _told(generation: Any, tokenizer: Any, with_logprobs: bool) -> dict[str, Any]:
    """A text for the JSON document."""
    told = {
        "text": generation.prompt + generation.text,
        "continuation": generation.text,
        "ended_by": generation.reason,
        "new_tokens": len(generation.tokens),
    }
    if with_logprobs:
        steps = zip(generation.tokens, generation.logprobs, generation.alternatives)
        told["tokens"] = [
            {"token": i, "text": tokenizer.decode([i]), "logprob": p, "alternatives": [each._asdict() for each in others]}
            for i, p, others in steps
        ]
    return told
