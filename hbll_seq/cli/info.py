"""``hbll-seq info``: what a model is."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from typing import Any

from hbll_seq.cli import options
from hbll_seq.cli.output import Output
from hbll_seq.utils.arguments import Parser

EXAMPLES = """\
  hbll-seq info                      the bundled model
  hbll-seq info runs/lm
  hbll-seq info my-image-classifier
  hbll-seq info runs/lm --json | jq .config
"""


def parser(prog: str) -> Parser:
    """What the command takes."""
    found = options.command_parser(prog, "What a model is: its sizes, files, trained paths and configuration, and its\n"
                                   "tree with the path of each depth. Language models, sequence and image\nclassifiers.",
                                   EXAMPLES)
    options.add_model_argument(found)
    options.add_json_option(found)
    return found


def run(args: argparse.Namespace, out: Output) -> None:
    """Print what there is to know. Raises ValueError where there is no such model, or it is of a kind not described here."""
    from hbll_seq.cli.models import find_model, kind_of, model_folder, open_model

    name = find_model(args.model)
    model, folder = open_model(name, args.device, kind_of(name)), model_folder(name)
    about = {
        "model": name,
        "folder": os.fspath(folder),
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        **_OWN[type(model).__name__](model),
        "files": _files(folder),
        "config": model.config.to_dict(),
        **({"depths": _depths(model)} if hasattr(model, "tree") else {}),
    }  # fmt: skip
    if args.json:
        out.json(about)
    else:
        out.write(_shown(about, model))


def _of_language_model(model: Any) -> dict[str, Any]:
    config = model.config
    return {
        "blocks": len(config.full_path),
        "dyadic_paths": model.tree.n_paths if config.blocks is None else None,  # nobody counts those of one path's blocks
        "trained_paths": config.trained_depths,
        "tokenizer_pieces": model.tokenizer and model.tokenizer.vocab_size,
    }


def _of_sequences(model: Any) -> dict[str, Any]:
    config = model.config
    return {"kind": "sequence classifier", "cell": config.cell, "blocks": 1, "width": config.hidden_size,
            "values": config.n_inputs, "steps": config.n_steps, "step_size": config.step_size,
            "classes": config.n_classes}  # fmt: skip


def _of_images(model: Any) -> dict[str, Any]:
    config = model.config
    return {"kind": "image classifier", "cell": "transformer", "blocks": len(config.full_path), "width": config.n_embd,
            "dyadic_paths": model.tree.n_paths, "trained_paths": config.trained_depths, "image_size": config.image_size,
            "channels": config.n_channels, "patch_size": config.patch_size, "classes": config.n_classes,
            "class_names": config.class_names}  # fmt: skip


#: class of a model -> what only its kind has
_OWN = {"HBLLForCausalLM": _of_language_model, "HBLLForSequenceClassification": _of_sequences,
        "HBLLForImageClassification": _of_images}  # fmt: skip


def _depths(model: Any) -> list[dict[str, Any]]:
    """The default path of each depth of a report."""
    from hbll_seq.evaluation.perplexity import default_paths

    return [{"depth": len(path), "path": list(path), "parameters": model.n_parameters(path),
             "trained": bool(model.config.is_trained(path))} for path in default_paths(model).values()]  # fmt: skip


def _files(folder: Any) -> dict[str, int]:
    """The model's files and their sizes in bytes."""
    from hbll_seq.models.model_files import FILES
    from hbll_seq.utils.atomic import whole_folder

    files = whole_folder(folder)
    return {name: os.stat(files / name).st_size for name in FILES if (files / name).is_file()}


def _shown(about: dict[str, Any], model: Any) -> str:
    lines = [
        f"model          {about['model']} ({about['class']})",
        *([f"kind           {about['kind']}"] if "kind" in about else []),
        f"parameters     {about['parameters']:,} ({about['bytes'] / 1e6:,.1f} MB of {about['dtype']})",
        *_own_lines(about, model.config),
        "",
        f"files in {about['folder']}",
        *(f"  {name:<18} {size:>12,} bytes" for name, size in about["files"].items()),
        "",
        "configuration",
        *(f"  {name:<18} {value}" for name, value in about["config"].items()),
        "",
    ]  # fmt: skip
    return "\n".join(lines) + (_tree(about["depths"], model.tree) if "depths" in about else "")


def _own_lines(about: dict[str, Any], config: Any) -> Iterator[str]:
    """The lines of what only this kind of model has."""
    if "cell" in about:
        yield f"cell           {about['cell']}"
    if "dyadic_paths" not in about:
        yield "blocks         1, the cell: every step runs it, and there is no other depth"
    else:
        yield f"blocks         {about['blocks']}, " + (
            f"those of the path {','.join(map(str, config.blocks))} of a larger model" if about["dyadic_paths"] is None
            else f"which {about['dyadic_paths']:,} paths run")  # fmt: skip
    if "width" in about:
        yield f"width          {about['width']}"
    if "trained_paths" in about:
        yield f"trained paths  {about['trained_paths'] or 'not recorded'}"
    if "tokenizer_pieces" in about:
        pieces = about["tokenizer_pieces"]
        yield f"tokenizer      {f'{pieces:,} pieces' if pieces else 'none'}"
    if "step_size" in about:
        order = "" if config.permutation_seed is None else ", in a fixed order of their own"
        yield f"sequences      {about['values']:,} values in {about['steps']:,} steps of {about['step_size']:,}{order}"
    if "image_size" in about:
        size, patch, channels = about["image_size"], about["patch_size"], about["channels"]
        yield (f"images         {size} x {size} pixels of {channels} channel{'s' * (channels > 1)}, in "
               f"{(size // patch) ** 2:,} patches of {patch} x {patch}")  # fmt: skip
    if "classes" in about:
        yield f"classes        {about['classes']:,}" + _names(about.get("class_names"))


def _names(names: Sequence[str] | None) -> str:
    from hbll_seq.utils.tensors import listing

    return f": {listing(list(names), limit=10)}" if names else ""


def _tree(depths: Sequence[dict[str, Any]], tree: Any) -> str:
    from hbll_seq.cli.tree_picture import draw_levels, draw_paths

    starred = " (* not trained)" * any(not row["trained"] for row in depths)
    named = [(f"depth {row['depth']}{'' if row['trained'] else ' *'}", row["path"]) for row in depths]
    return (f"\ntree ({tree.N} is the head), and the path of each depth{starred}\n" + draw_levels(tree, "  ") + "\n"
            + draw_paths(tree, named, "  "))  # fmt: skip
