"""``hbll-seq compare``: several models and depths on one text, or on one prompt."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from hbll_seq.cli import options
from hbll_seq.cli.evaluate import figures, named, path_shown
from hbll_seq.cli.output import Output
from hbll_seq.generation.sampling import SamplingParams
from hbll_seq.tree.topology import path_text
from hbll_seq.utils.arguments import Parser
from hbll_seq.utils.console import say
from hbll_seq.utils.tables import table

EXAMPLES = """\
  hbll-seq compare runs/a runs/b        every depth, on the bundled test split
  hbll-seq compare runs/a runs/b --text my.txt --depth 1,3,7
  hbll-seq compare bundled --prompt "The river" --depth 1,3,7 --seed 0

Models of different vocabularies are compared by bits per byte: their tokens
differ. The time of a token is that of one text on this machine, now, the
reading of the prompt left out.
"""
COLUMNS = ["model", "depth", "nats/token", "per token", "per word", "bits/byte", "parameters", "ms/token", "path"]
FORMATS = ["<", ">", ".4f", ".2f", ".2f", ".4f", ",d", ".2f", "<"]


def parser(prog: str) -> Parser:
    """What the command takes."""
    found = options.command_parser(prog, "Several models and depths side by side: on one text, or what they write\n"
                                   "after one prompt.", EXAMPLES)
    found.add_argument("models", metavar="MODEL", nargs="+", help=options.MODEL_HELP)
    options.add_json_option(found)
    options.add_device_option(found)
    options.add_paths_options(found)
    text = found.add_argument_group("on a text")
    text.add_argument("--text", metavar="FILE", help="a text file, or - for stdin (default: the bundled test split)")
    options.add_text_options(text)
    options.add_time_options(text)
    prompt = found.add_argument_group("on a prompt")
    prompt.add_argument("--prompt", metavar="TEXT", help="write its continuation by each, below each other; or - for stdin")
    options.add_sampling_options(prompt, leave_out=("n",))
    return found


def run(args: argparse.Namespace, out: Output) -> None:
    """Print the table or the texts. Raises ValueError for what cannot be read, evaluated or continued."""
    sampling = options.sampling_given(args)
    if args.prompt is not None:
        for name in ("text", "data", "split", "column"):
            if getattr(args, name) is not None:
                raise ValueError(f"--prompt and --{name} are both given: compare on one of them")
        _on_prompt(args, SamplingParams(**sampling), out)
        return
    if sampling:
        raise ValueError(f"--{next(iter(sampling)).replace('_', '-')} belongs to --prompt: give a prompt, or leave it out")
    _on_text(args, out)


def _on_text(args: argparse.Namespace, out: Output) -> None:
    from hbll_seq.cli.models import open_model, tell_untrained
    from hbll_seq.cli.texts import measured_text, windows_of
    from hbll_seq.evaluation.perplexity import evaluate_paths, part_read
    from hbll_seq.models.depth_dial import ms_per_token

    if args.text is None and args.data is None:
        args.data = "bundled"
    measured = measured_text(args, args.text)
    rows: list[dict[str, Any]] = []
    shown: list[str] = []  # the path of each row
    parts: dict[str, str] = {}  # model -> how much of the text it has read, where that is not all
    vocabularies = set()
    for name in args.models:
        model = open_model(name, args.device)
        windows = windows_of(model, measured)
        limits = {"batch_size": args.batch_size, "max_batches": args.max_batches, "progress": True}
        paths = _paths_of(name, model, args)
        tell_untrained(model, paths if args.depth or args.path else None)
        for row in evaluate_paths(model, windows, paths, **limits):
            milliseconds = ms_per_token(model, tuple(row["path"]), args.timed_tokens) if args.time else None
            more = {"parameters": model.n_parameters(row["path"]), "ms_per_token": milliseconds}
            rows.append({"model": name, **row, **more})
            shown.append(path_shown(model, row))
        if row["tokens"] < windows.stream.n_tokens - 1:
            parts[name] = part_read(row["tokens"], windows.stream)
        vocabularies.add(model.tokenizer.fingerprint)
    if args.json:
        out.json({"text": measured.name, "rows": rows})
        return
    if len(vocabularies) > 1:
        say("hbll-seq: these models have different tokenizers: compare bits per byte, not perplexity per token")
    if len(set(parts.values())) > 1:  # windows or tokenizers differ
        read = "; ".join(f"{name}: {part}" for name, part in parts.items())
    else:
        read = "".join(set(parts.values()))
    out.write(f"{measured.name}{read and ': '}{read}\n")
    keys = ("parameters", "ms_per_token")
    cells = [[row["model"], named(row), *figures(row), *(row[key] for key in keys), path] for row, path in zip(rows, shown)]
    out.write(table(COLUMNS, cells, FORMATS))


def _on_prompt(args: argparse.Namespace, sampling: SamplingParams, out: Output) -> None:
    from hbll_seq.cli.models import open_model
    from hbll_seq.cli.texts import prompt_text

    prompt, texts = prompt_text(args.prompt), []
    for name in args.models:
        model = open_model(name, args.device)
        for path in _paths_of(name, model, args).values():
            text = model.generate(prompt, path=path, sampling=sampling)
            texts.append({"model": name, "depth": len(path), "path": list(path), "text": text})
            if not args.json:
                out.write(f"\n=== {name}, depth {len(path)} ({path_text(path)})\n{text}\n")
    if args.json:
        out.json({"prompt": prompt, "sampling": asdict(sampling), "texts": texts})


def _paths_of(name: str, model: Any, args: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    """The paths of one of the models; depths that it does not have are left out, where it has others, and told."""
    from hbll_seq.cli.models import chosen_paths
    from hbll_seq.evaluation.perplexity import default_paths

    too_deep = [k for k in args.depth or () if isinstance(k, int) and k > model.tree.n_nodes]
    depths = [k for k in args.depth or () if k not in too_deep]
    if too_deep and (depths or args.path):
        say(f"hbll-seq: {name} has {model.tree.n_nodes} blocks: depth {', '.join(map(str, too_deep))} is left out")
        args = argparse.Namespace(depth=depths, path=args.path)
    return chosen_paths(model, args) or default_paths(model)
