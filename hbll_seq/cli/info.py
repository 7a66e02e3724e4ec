"""``hbll-seq info``: what a model is."""

from __future__ import annotations

import argparse
import os
from typing import Any

from hbll_seq.cli import options
from hbll_seq.cli.output import Output
from hbll_seq.utils.arguments import Parser

EXAMPLES = """\
  hbll-seq info                      the bundled model
  hbll-seq info runs/lm
  hbll-seq info runs/lm --json | jq .config
"""


def parser(prog: str) -> Parser:
    """What the command takes."""
    found = options.command_parser(prog, "What a model is: its sizes, files, trained paths and configuration, and its\n"
                                   "tree with the path of each depth.", EXAMPLES)
    options.add_model_argument(found)
    options.add_json_option(found)
    return found


def run(args: argparse.Namespace, out: Output) -> None:
    """Print what there is to know. Raises ValueError where there is no such model."""
    from hbll_seq.cli.models import find_model, model_folder, open_model
    from hbll_seq.evaluation.perplexity import default_paths

    name = find_model(args.model)
    model, folder = open_model(name, args.device), model_folder(name)
    config, n_parameters = model.config, sum(p.numel() for p in model.parameters())
    paths = default_paths(model)
    about = {
        "model": name,
        "folder": os.fspath(folder),
        "class": type(model).__name__,
        "parameters": n_parameters,
        "bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "blocks": len(config.full_path),
        "dyadic_paths": model.tree.n_paths if config.blocks is None else None,  # nobody counts those of one path's blocks
        "trained_paths": config.trained_depths,
        "tokenizer_pieces": model.tokenizer and model.tokenizer.vocab_size,
        "files": _files(folder),
        "config": config.to_dict(),
        "depths": [{"depth": len(path), "path": list(path), "parameters": model.n_parameters(path),
                    "trained": bool(config.is_trained(path))} for path in paths.values()],
    }  # fmt: skip
    if args.json:
        out.json(about)
    else:
        out.write(_shown(about, model))


def _files(folder: Any) -> dict[str, int]:
    """The model's files and their sizes in bytes."""
    from hbll_seq.models.model_files import FILES
    from hbll_seq.utils.atomic import whole_folder

    files = whole_folder(folder)
    return {name: os.stat(files / name).st_size for name in FILES if (files / name).is_file()}


def _shown(about: dict[str, Any], model: Any) -> str:
    from hbll_seq.cli.tree_picture import draw_levels, draw_paths

    pieces = about["tokenizer_pieces"]
    lines = [
        f"model          {about['model']} ({about['class']})",
        f"parameters     {about['parameters']:,} ({about['bytes'] / 1e6:,.1f} MB of {about['dtype']})",
        f"blocks         {about['blocks']}, " + (
            f"those of the path {','.join(map(str, model.config.blocks))} of a larger model" if about["dyadic_paths"] is None
            else f"which {about['dyadic_paths']:,} paths run"),
        f"trained paths  {about['trained_paths'] or 'not recorded'}",
        f"tokenizer      {f'{pieces:,} pieces' if pieces else 'none'}",
        "",
        f"files in {about['folder']}",
        *(f"  {name:<18} {size:>12,} bytes" for name, size in about["files"].items()),
        "",
        "configuration",
        *(f"  {name:<18} {value}" for name, value in about["config"].items()),
        "",
        f"tree ({model.tree.N} is the head), and the path of each depth" + " (* not trained)" * any(
            not row["trained"] for row in about["depths"]),
        "",
    ]  # fmt: skip
    named = [(f"depth {row['depth']}{'' if row['trained'] else ' *'}", row["path"]) for row in about["depths"]]
    return "\n".join(lines) + draw_levels(model.tree, "  ") + "\n" + draw_paths(model.tree, named, "  ")
