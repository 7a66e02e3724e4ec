"""``main``: which command is meant, and what becomes of its errors."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Iterator

from hbll_seq.cli.output import Failure, Output
from hbll_seq.utils.arguments import Parser, did_you_mean
from hbll_seq.utils.console import forgiving_output, say
from hbll_seq.utils.exhausted import disk_is_full, memory_is_full
from hbll_seq.utils.reading import quote, shorten

NAME = "hbll-seq"
#: command -> its module in this folder, and what it does
COMMANDS = {
    "generate": ("generate", "continue a text, at any depth"),
    "train": ("train", "train a language model"),
    "eval": ("evaluate", "perplexity and bits per byte of a text, by depth"),
    "paths": ("paths", "the paths of a model: quality, size and speed"),
    "compare": ("compare", "several models and depths on one text, or on one prompt"),
    "info": ("info", "what a model is: sizes, files, trained paths, its tree"),
    "export": ("export", "make one path of a model a model of its own"),
    "push": ("push", "upload a model to the Hugging Face Hub"),
    "demo": ("demo", "a page in the browser: text at any depth, which words need depth"),
}
EPILOG = """\
examples:
  hbll-seq generate "The history of the city" --depth 3
  echo "The river" | hbll-seq generate - --model runs/lm --seed 0
  hbll-seq train --data my.txt --output-dir runs/mine
  hbll-seq eval my.txt --model runs/mine
  hbll-seq COMMAND --help

exit codes: 0 done, 1 it failed, 2 a wrong option or input, 130 Ctrl-C
"""
#: of a program whose reader has gone, as shells report it: 128 + SIGPIPE
READER_GONE, INTERRUPTED = 141, 130


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code; one line on stderr says what is wrong.

    Args:
        argv: the words after the program's name; None takes those that it was started with.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads OpenMP: its threads would spin
    out = Output(sys.stdout)
    with forgiving_output(), _plain_warnings():
        try:
            return _run(list(sys.argv[1:] if argv is None else argv), out)
        except SystemExit as ended:  # of argparse, after --help and --version
            return ended.code or 0
        except BrokenPipeError:
            return READER_GONE
        except KeyboardInterrupt:
            return INTERRUPTED
        except (ValueError, Failure, OSError, MemoryError, RuntimeError) as error:
            return _told(error)


def _run(argv: list[str], out: Output) -> int:
    version = f"{NAME} {importlib.import_module(__package__.partition('.')[0]).__version__}"
    parser = Parser(prog=NAME, usage=f"{NAME} COMMAND [options]", epilog=EPILOG, description="Language models that run at "
                    "the depth you choose.\n\ncommands:\n" + "".join(f"  {c:<10}{h}\n" for c, (_, h) in COMMANDS.items()))
    parser.add_argument("--version", action="version", version=version)
    if argv and not argv[0].startswith("-"):
        name, *rest = argv
        if name not in COMMANDS:
            raise ValueError(f"there is no command {quote(name)}{did_you_mean(name, COMMANDS)} (see {NAME} --help)")
        module = importlib.import_module(f"{__package__}.{COMMANDS[name][0]}")
        prog = f"{NAME} {name}"
        return module.run(module.parser(prog).parse_args(rest), out) or 0 if hasattr(module, "parser") else module.main(rest)
    parser.parse_args(argv)
    say(parser.format_help(), end="")
    return 2


def _told(error: BaseException) -> int:
    """Say what is wrong; returns the exit code."""
    if memory_is_full(error):
        code, message = 1, f"the memory is full ({shorten(error)}); choose a smaller batch, or a smaller model"
    elif disk_is_full(error):
        code, message = 1, f"{shorten(error, 400)}; make room, then give the same command again"
    elif isinstance(error, RuntimeError):
        raise error
    else:
        code, message = 2 if isinstance(error, ValueError) else 1, shorten(error, 900)
    say(f"error: {message}")
    return code


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings are one line for a person, without the place in the program."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: say(f"warning: {shorten(message, 500)}")
        yield
