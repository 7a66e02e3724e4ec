"""What every script does around its ``main``: mistakes are told in one line, and the exit code says what kind they are."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hbll_seq.utils.arguments import Parser
from hbll_seq.utils.console import say
from hbll_seq.utils.reading import shorten

#: the folder of stored results
RESULTS = Path(__file__).resolve().parents[2] / "results"


def as_program(main: Callable[[], Any]) -> None:
    """Run a script's ``main`` and end the process: 0 done, 2 a wrong option or input, 130 Ctrl-C.

    Runs that are in the file of results by then stay there.
    """
    try:
        main()
    except ValueError as error:
        say(f"error: {shorten(error, 900)}")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def parse_benchmark(
    parser: Parser, argv: Sequence[str] | None, name: str, quick: Mapping[str, Any]
) -> argparse.Namespace:
    """The command line of a benchmark with ``--quick`` and ``--output``, both among the parser's options.

    A short run has other defaults and a file of its own: it must not replace the stored results of a full one.

    Args:
        parser, argv: what is read, and by what.
        name: of the stored file, without ".json"; a short run's ends in "-quick".
        quick: option -> its default in a short run.
    """
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(**quick)
    args = parser.parse_args(argv)
    args.output = args.output or RESULTS / f"{name}{'-quick' * args.quick}.json"
    return args


def add_figure_options(parser: Parser) -> None:
    """``--report-only`` and ``--figure``; see :func:`figure_of`."""
    parser.add_argument("--report-only", action="store_true", help="run nothing: print what the file of results holds, and "
                        "draw its figure where that is missing")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="PNG file of the figure (default: that beside the "
                        "results; one that is there stays with --report-only)")


def figure_of(args: argparse.Namespace) -> Path | None:
    """Where the figure of a comparison goes; None where a report leaves the one that is there as it is."""
    path = args.figure or args.output.with_suffix(".png")
    if args.report_only and args.figure is None and path.exists():
        say(f"{path} stays as it is; --figure FILE draws one")
        return None
    return path


def check_stored(path: Path) -> None:
    """Raises ValueError where there is no file of results to report on."""
    if not path.is_file():
        raise ValueError(f"there is no results file {path}: leave --report-only out to make it, or name --output")
