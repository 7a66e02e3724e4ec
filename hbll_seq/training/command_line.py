"""The command line of a training run: its options are the settings."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from pathlib import Path
from typing import Any

from hbll_seq.training.presets import DEFAULT_PRESET, nearest_setting, read_preset
from hbll_seq.training.settings import TrainingSettings
from hbll_seq.utils.arguments import Parser
from hbll_seq.utils.reading import shorten

#: names that other programs give to settings of ours
OTHER_NAMES = {"learning_rate": "lr"}


class _Parser(Parser):
    """Its options may be meant by a setting's older name, or by that of another program."""

    def error(self, message: str):
        raise ValueError(f"{shorten(message, 400)} (see --help)")

    def _meant(self, option: str) -> str:
        name = option[2:].replace("-", "_")
        near = OTHER_NAMES.get(name) or nearest_setting(name)
        return f"; did you mean --{near.replace('_', '-')}?" if near else ""


def build_parser(description: str, presets: Path, epilog: str = "") -> argparse.ArgumentParser:
    """A parser whose options are the settings; one that is not given does not appear in the parsed namespace."""
    parser = _Parser(usage="%(prog)s [--preset NAME] [options]", description=description, epilog=epilog)
    names = ", ".join(sorted(path.stem for path in presets.glob("*.yaml")))
    start = parser.add_argument_group("what to run")
    start.add_argument("--preset", metavar="NAME", help=f"{names}, or the path of a .yaml file (default: {DEFAULT_PRESET}, "
                       "whose values are the defaults below)")
    start.add_argument("--resume", nargs="?", const=-1, type=int, metavar="STEP",
                       help="go on exactly from the newest checkpoint (or that of STEP) in --output-dir, with the "
                            "settings stored there; newer checkpoints, later lines and exported results are removed")
    start.add_argument("--extend", type=int, metavar="N",
                       help="go on with the finished run in --output-dir for N more steps: the rate warms up again and "
                            "comes down by a cosine; the model stays as it is until the new end")
    start.add_argument("--overwrite", action="store_true", help="replace the run that --output-dir holds")
    start.add_argument("--dry-run", action="store_true",
                       help="print the settings as YAML, with what comes of those left open, and exit; --preset reads it")
    groups: dict[str, Any] = {}
    hints = typing.get_type_hints(TrainingSettings)
    shown = {f.name: f.default for f in dataclasses.fields(TrainingSettings)} | read_preset(DEFAULT_PRESET, presets)
    for field in dataclasses.fields(TrainingSettings):
        title = field.metadata["group"]
        group = groups.setdefault(title, None) or parser.add_argument_group(title)
        groups[title] = group
        flag = "--" + field.name.replace("_", "-")
        text = field.metadata["help"]
        if hints[field.name] is bool:
            text += f" (default: {'yes' if shown[field.name] else 'no'})"
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
            continue
        choices = field.metadata["choices"]
        default = "" if shown[field.name] is None or "(default: " in text else f" (default: {shown[field.name]})"
        metavar = "|".join(choices or ()) or _metavar(hints[field.name])
        if len(metavar) > 40:
            metavar, text = "NAME", f"{text}; one of {', '.join(choices)}"
        group.add_argument(flag, metavar=metavar, default=argparse.SUPPRESS,
                           help=(text + default).replace("%", "%%"))
    return parser


def _metavar(hint: Any) -> str:
    kinds = typing.get_args(hint) or (hint,)
    return "N" if int in kinds else "X" if float in kinds else "TEXT"
