"""What every script does around its ``main``: mistakes are told in one line, and the exit code says what kind they are."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hbll_seq.utils.console import say
from hbll_seq.utils.reading import shorten


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


def check_stored(path: Path) -> None:
    """Raises ValueError where there is no file of results to report on."""
    if not path.is_file():
        raise ValueError(f"there is no results file {path}: leave --report-only out to make it, or name --output")
