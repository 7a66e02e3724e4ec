"""Options that several commands take, and options made from the fields of a dataclass. Nothing here imports torch."""

from __future__ import annotations

import argparse
import collections.abc
import dataclasses
import functools
import typing
from typing import Any

from hbll_seq.generation.sampling import SamplingParams
from hbll_seq.utils.arguments import Parser, did_you_mean
from hbll_seq.utils.options import allowed_range, kinds_of
from hbll_seq.utils.reading import quote

#: depths that have a name: lowest stored perplexity, fewest blocks worth it
NAMED_DEPTHS = ("best", "fast")
SPLITS = ("train", "validation", "test")
MODEL_HELP = "bundled, latest (the newest finished run under ./runs), a folder, or a Hub id"


def command_parser(prog: str, description: str, examples: str, usage: str | None = None) -> Parser:
    """The parser of one command; its help ends with examples."""
    return Parser(prog=prog, usage=usage and f"{prog} {usage}", description=description, epilog=f"examples:\n{examples}")


def add_model_option(parser: Parser) -> None:
    """``--model`` and ``--device``, of a command whose argument is a text."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="NAME", default="bundled", help=f"{MODEL_HELP} (default: bundled)")
    add_device_option(group)


def add_model_argument(parser: Parser) -> None:
    """The model as first argument, of a command that is about one, and ``--device``."""
    parser.add_argument("model", metavar="MODEL", nargs="?", default="bundled", help=f"{MODEL_HELP} (default: bundled)")
    add_device_option(parser)


def add_device_option(parser: Any) -> None:
    """``--device``."""
    parser.add_argument("--device", default="cpu", help="where the model runs, such as cuda (default: cpu)")


def add_json_option(parser: Any) -> None:
    """``--json``."""
    parser.add_argument("--json", action="store_true", help="write one JSON document to stdout, and nothing else there")


def add_text_options(parser: Any) -> None:
    """A text to be measured on: a file, stdin, or a split of a data set; see :func:`hbll_seq.cli.texts.measured_text`."""
    parser.add_argument("--data", metavar="NAME", help="in place of FILE: bundled (WikiText-2), or what train --data takes")
    parser.add_argument("--split", choices=SPLITS, help="of --data (default: test)")
    parser.add_argument("--column", metavar="NAME", help="of a table of --data, which one holds the text (default: text)")
    parser.add_argument("--max-batches", type=whole, metavar="N", help="stop after N batches (default: the whole text)")
    parser.add_argument("--batch-size", type=whole, default=16, metavar="N", help="windows of a batch (default: 16)")


def add_paths_options(parser: Any) -> None:
    """``--depth`` and ``--path``, of a command that takes several."""
    parser.add_argument("--depth", type=depths, metavar="LIST", help="numbers of blocks, best or fast, such as 1,3,7; or all "
                        "(default: all, of a large model some)")
    parser.add_argument("--path", type=path, metavar="LIST", action="append", help="block numbers, such as 1,2,4; may be "
                        "given several times")


def add_time_options(parser: Any) -> None:
    """``--no-time``, and how many tokens are timed."""
    parser.add_argument("--no-time", dest="time", action="store_false", help="do not measure the time of a token")
    parser.add_argument("--timed-tokens", type=whole, default=32, metavar="N", help="tokens of each timing (default: 32)")


def whole(text: str, low: int = 1) -> int:
    """A whole number of at least 1, or of at least ``low``."""
    if not text.isdecimal() or len(text) > 18 or int(text) < low:
        raise argparse.ArgumentTypeError(f"{quote(text)} is not a whole number of at least {low}")
    return int(text)


whole_or_zero = functools.partial(whole, low=0)


def depth(text: str) -> int | str | None:
    """A number of blocks, or the name of a depth; None for all blocks."""
    return None if text == "all" else _depth(text)


def depths(text: str) -> list[int | str] | None:
    """Depths joined by commas; None for all of them."""
    return None if text == "all" else [_depth(part.strip()) for part in text.split(",")]


def _depth(text: str) -> int | str:
    if text in NAMED_DEPTHS:
        return text
    if not text.isdecimal() or len(text) > 18:
        hint = did_you_mean(text, (*NAMED_DEPTHS, "all"))
        raise argparse.ArgumentTypeError(f"{quote(text)} is not a number of blocks, {', '.join(NAMED_DEPTHS)} or all{hint}")
    return int(text)


def path(text: str) -> list[int]:
    """Block numbers joined by commas."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 10 for part in parts):
        raise argparse.ArgumentTypeError(f"{quote(text)} is not a list of block numbers such as 1,2,4")
    return [int(part) for part in parts]


def add_fields(parser: Any, owner: type, leave_out: tuple[str, ...] = ()) -> list[str]:
    """An option for every field of a dataclass that has a help text; one that is not given does not appear in the namespace.

    What a value may be is checked by the dataclass itself.

    Args:
        parser: an argparse parser or group.
        owner: its fields were made by :func:`hbll_seq.utils.options.option`.
        leave_out: names of fields that are no options here.

    Returns:
        Names of the fields that became options.
    """
    hints, added = typing.get_type_hints(owner), []
    for field in dataclasses.fields(owner):
        if "help" not in field.metadata or field.name in leave_out:
            continue
        kinds, flag = kinds_of(hints[field.name]), "--" + field.name.replace("_", "-")
        rules: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(field).replace("%", "%%")}
        if bool in kinds:
            rules["action"] = argparse.BooleanOptionalAction
        elif str in kinds and kinds & _LISTS:
            rules |= {"action": "append", "metavar": "TEXT"}
            rules["help"] += "; may be given several times"
        elif float in kinds or int in kinds:
            rules |= {"type": _number if float in kinds else _integer, "metavar": "X" if float in kinds else "N"}
        else:
            rules |= {"choices": field.metadata["choices"]} if field.metadata.get("choices") else {"metavar": "TEXT"}
        parser.add_argument(flag, **rules)
        added.append(field.name)
    return added


def add_sampling_options(parser: Any, leave_out: tuple[str, ...] = ()) -> None:
    """The fields of ``SamplingParams``; :func:`sampling_given` takes them out again."""
    parser.set_defaults(sampling_names=add_fields(parser, SamplingParams, leave_out))


def sampling_given(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling options that a command line names."""
    return {name: getattr(args, name) for name in args.sampling_names if hasattr(args, name)}


_LISTS = {list, tuple, collections.abc.Sequence}


def _help(field: dataclasses.Field) -> str:
    rules = dict(field.metadata)
    if rules["high"] is not None and rules["high"] >= 1 << 32:  # as large as a number can be stored
        rules["high"] = None
    limits = allowed_range(rules).removeprefix("of ")
    default = f"default: {field.default}" if field.default not in (None, (), dataclasses.MISSING) else ""
    notes = "; ".join(note for note in (limits, default) if note)
    return f"{field.metadata['help']} ({notes})" if notes else field.metadata["help"]


def _integer(text: str) -> int:
    try:
        return int(text) if len(text) < 100 else int("")
    except ValueError:
        raise argparse.ArgumentTypeError(f"{quote(text)} is not a whole number") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{quote(text)} is not a number") from None
