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


def check_stored(path: Path) -> None:
    """Raises ValueError where there is no file of results to report on."""
    if not path.is_file():
        raise ValueError(f"there is no results file {path}: leave --report-only out to make it, or name --output")
