"""Targets that break every rule, one each: the harness has to see them all. Used by its own tests."""

from __future__ import annotations

import os
import signal
import time

from .oracle import Case, Violation
from .program import run_program


def _case(call, judge=lambda result: "equal", names=("thing",)):
    return lambda rng, folder: Case("a broken target", call, judge, names)


def _raise(error: BaseException):
    def call():
        raise error

    return call


def _grow() -> None:
    for _ in range(32):
        _HELD.append(bytearray(os.urandom(1 << 20) * 8))


def _swallow() -> None:
    try:
        bytearray(64 << 30)
    except MemoryError:
        raise ValueError("the thing is too large; give a smaller one") from None


def _changed(result) -> str:
    raise Violation("changed result", "2 instead of 1")


def _program(code: int, text: str):
    def main(argv):
        import sys

        print(text, file=sys.stderr)
        return code

    return lambda: run_program(main, [])


def _describes(rng, folder) -> Case:
    word = str(rng.random())
    return Case(word, _raise(KeyError(word)), lambda result: "equal")


_HELD: list = []
#: the first random number, as a finding.
DESCRIBES = _describes
#: name -> (target, class of the finding that it has to be; None: it is right).
VIOLATIONS = {
    "right": (_case(lambda: 1), None),
    "right-refusal": (_case(_raise(ValueError("thing='x': must be 1"))), None),
    "right-program": (_case(_program(2, "note\nerror: thing='x': must be 1")), None),
    "other-exception": (_case(_raise(KeyError("thing"))), "exception KeyError"),
    "system-exit": (_case(_raise(SystemExit(2))), "exception SystemExit"),
    "raw-unicode": (_case(lambda: b"thing must \xff".decode("utf-8")), "raw UnicodeError"),
    "two-lines": (_case(_raise(ValueError("thing must\nbe 1"))), "message of several lines"),
    "empty": (_case(_raise(ValueError(""))), "message empty"),
    "too-long": (_case(_raise(ValueError("thing must be 1 " + "x" * 500))), "message too long"),
    "nameless": (_case(_raise(ValueError("it must be 1"))), "message names nothing"),
    "no-remedy": (_case(_raise(ValueError("thing is bad"))), "message without remedy"),
    "hang": (_case(lambda: time.sleep(60)), "hang"),
    "busy-hang": (_case(lambda: sum(0 for _ in iter(int, 1))), "hang"),
    "grows": (_case(_grow), "memory"),
    "too-much-at-once": (_case(lambda: bytearray(64 << 30)), "exception MemoryError"),
    "swallowed": (_case(_swallow), "memory"),
    "killed": (_case(lambda: os.kill(os.getpid(), signal.SIGKILL)), "crash, exit code -9"),
    "segfault": (_case(lambda: os.kill(os.getpid(), signal.SIGSEGV)), "crash, exit code -11"),
    "exit": (_case(lambda: os._exit(0)), "crash, exit code 0"),
    "changed": (_case(lambda: 2, _changed), "changed result"),
    "judge-fails": (_case(lambda: 2, lambda result: {}["x"]), "exception KeyError"),
    "harness-fails": (lambda rng, folder: {}["x"], "harness"),
    "program-code": (_case(_program(3, "error: thing='x': must be 1")), "exit code 3"),
    "program-traceback": (_case(_program(2, "Traceback (most recent call last):\nerror: thing must be 1")), "traceback"),
    "program-silent": (_case(_program(2, "")), "exit code 2 without one error line"),
    "program-two-lines": (_case(_program(2, "error: thing must be 1\nor 2")), "exit code 2 without one error line"),
}
