"""A command-line program run in this process, and judged as a program is."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import NamedTuple

from .oracle import Refused, Violation, last_frames


class Ran(NamedTuple):
    """What a program that ended well, or as its options told it to, has left."""

    code: int
    out: str
    err: str


def run_program(main: Callable[[list[str]], int], argv: list[str], may_fail: bool = False) -> Ran:
    """``main(argv)``.

    Args:
        may_fail: exit code 1 with one line is right too, for options that let the training break down.

    Raises:
        Refused: exit code 2 and one line.
        Violation: any other ending.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(argv)
        except SystemExit as exit_:
            code = exit_.code
        except BaseException as error:
            raise Violation(f"traceback {type(error).__name__}", f"{str(error)[:300]} | {last_frames(error)}") from error
    text = err.getvalue()
    if "Traceback (most recent" in text:
        raise Violation("traceback", text[-600:])
    if code == 0:
        return Ran(code, out.getvalue(), text)
    if code == 2 or (code == 1 and may_fail):
        lines = [line for line in text.splitlines() if line.strip()]
        if not lines or not lines[-1].startswith("error: ") or sum(line.startswith("error: ") for line in lines) != 1:
            raise Violation(f"exit code {code} without one error line", text[-600:])
        raise Refused(lines[-1].removeprefix("error: "))
    raise Violation(f"exit code {code}", text[-600:])
