"""What is right: a refusal that a person can use, or the result of the unharmed input. All else is a finding."""

from __future__ import annotations

import contextlib
import io
import re
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: characters of a message.
MAX_MESSAGE = 500
#: one of these tells what is allowed or what to do.
_REMEDY = re.compile(
    r"\b(must|may|can|use|give|choose|load|pass|allowed|known|copy|remove|leave|set|save|start|make|train|convert|put|name|"
    r"write|add|lower|raise|restore|download|delete|replace|shorten|only|at most|at least|without|reads?|did you mean|"
    r"move|go on|needs?|is for|see|rebuild|repair|drop|try|wait|run|free|check|cut|one of|alone|expected|takes?|keep)\b"
    r"|\d \.\. \d"  # what is allowed, as in "ids are 0 .. 299"
)
_MEMORY = re.compile(r"not enough memory|can't allocate|cannot allocate|unable to allocate|out of memory|bad_alloc", re.I)


class Violation(Exception):
    """A finding: its class, such as "changed result", and what was seen."""

    def __init__(self, kind: str, detail: str):
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail


class Refused(Exception):
    """A program that ended with exit code 2, and its message."""


@dataclass
class Case:
    """One input.

    Attributes:
        what: what was harmed and how, in words.
        call: the library, given the input.
        judge: the result -> "equal" or "accepted" (another valid input). It raises Violation for a changed result; what
            it calls of the library may refuse.
        names: the message of a refusal holds one of these; any message will do where there are none.
    """

    what: str
    call: Callable[[], Any]
    judge: Callable[[Any], str]
    names: tuple[str, ...] = ()


@dataclass
class Outcome:
    """How an input ended: "refused", "equal", "accepted", or the class of a finding; and the seconds of CPU it took."""

    kind: str
    what: str
    detail: str = ""
    is_finding: bool = False
    seconds: float = 0.0


def examine(case: Case) -> Outcome:
    """Run a case in this process and judge it. Hangs, crashes and memory are the business of ``workers``."""
    names = case.names
    try:
        with quiet():
            result = case.call()
            names = ()  # from here on the input is inside, and a refusal names what it met there
            verdict = case.judge(result)
    except Violation as violation:
        return Outcome(violation.kind, case.what, violation.detail, is_finding=True)
    except BaseException as error:
        return _of_error(case.what, error, names)
    return Outcome(verdict, case.what)


@contextlib.contextmanager
def quiet():
    """What the library prints goes nowhere, and warnings are no errors."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _of_error(what: str, error: BaseException, names: tuple[str, ...]) -> Outcome:
    where = last_frames(error)
    if not isinstance(error, (ValueError, Refused)):
        return Outcome(f"exception {type(error).__name__}", what, f"{str(error)[:300]} | {where}", is_finding=True)
    if isinstance(error, UnicodeError):
        return Outcome("raw UnicodeError", what, f"{str(error)[:300]} | {where}", is_finding=True)
    message = str(error)
    if cause := out_of_memory(error):
        return Outcome("memory", what, f"refused after asking for too much: {cause} | {where}", is_finding=True)
    if fault := fault_of_message(message, names):
        return Outcome(f"message {fault}", what, f"{message[:600]!r} | {where}", is_finding=True)
    return Outcome("refused", what, message)


def fault_of_message(message: str, names: tuple[str, ...]) -> str:
    """What a refusal's message lacks; empty where it lacks nothing."""
    if len(message.splitlines()) != 1:
        return "of several lines" if message.strip() else "empty"
    if len(message) > MAX_MESSAGE:
        return "too long"
    if names and not any(name in message for name in names):
        return "names nothing"
    if not _REMEDY.search(message):
        return "without remedy"
    return ""


def out_of_memory(error: BaseException) -> str:
    """The error about memory that this one was made of, if any: the limit stopped what was not checked beforehand."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MemoryError) or _MEMORY.search(str(error)[:2000]):
            return f"{type(error).__name__}: {str(error)[:200]}"
        error = error.__cause__ or error.__context__
    return ""


def harness_error(error: BaseException) -> Outcome:
    """An error of the harness's own, while it made an input."""
    return Outcome("harness", "", f"{type(error).__name__}: {str(error)[:300]} | {last_frames(error)}", is_finding=True)


def last_frames(error: BaseException, count: int = 3) -> str:
    """The innermost frames, short."""
    frames = traceback.extract_tb(error.__traceback__)[-count:]
    return " > ".join(f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} {frame.name}" for frame in frames)
