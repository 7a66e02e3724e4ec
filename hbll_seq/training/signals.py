"""Stopping a run politely: SIGTERM, Ctrl-C, SIGHUP (the terminal was closed) and SIGUSR1 (Slurm's --signal=USR1) ask for a
checkpoint, a second signal ends the process at once."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

#: launchers pass a Ctrl-C on that the terminal has already sent to every process; so close a signal is no second one.
ECHO_SECONDS = 0.5
#: what of these a system has.
STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
#: the launcher's death; a number that nobody sends, so that it is never taken for a second signal.
_PARENTS_DEATH = getattr(signal, "SIGRTMIN", None)


class StopNow(BaseException):
    """Raised by the signal inside :meth:`StopSignal.interruptible`; no ``except Exception`` on the way takes it."""


class StopSignal:
    """Remembers the first of the stopping signals while its ``with`` block runs; the handlers before are restored after.

    Attributes:
        received: number of the first signal, 0 while there was none.

    The second signal ends the process at once with exit code 128 + the first one's number. A SIGHUP that was ignored before
    (nohup) stays ignored. Outside the main thread, where Python allows no handlers, nothing is installed.
    """

    def __init__(self):
        self.received = 0
        self._since = 0.0
        self._interruptible = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            signals = [number for number in STOPPING if not _ignored_hangup(number)]
            signals += [_PARENTS_DEATH] * _notice_parents_death(True)
            self._before = {number: signal.signal(number, self._handle) for number in signals}
        return self

    def __exit__(self, *_) -> None:
        if _PARENTS_DEATH in self._before:
            _notice_parents_death(False)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def interruptible(self, enabled: bool = True) -> Iterator[None]:
        """A block that the first signal leaves with StopNow: for long work that changes nothing, such as evaluation.

        Args:
            enabled: False for a block inside such a one that must be left by itself: the signal is only remembered there.
        """
        before, self._interruptible = self._interruptible, enabled
        try:
            self._raise_if_due()
            yield
            self._raise_if_due()  # code in between may have lost the exception: destructors and callbacks do
        finally:
            self._interruptible = before

    def _raise_if_due(self) -> None:
        if self._interruptible and self.received:
            raise StopNow

    def _handle(self, number: int, _frame) -> None:
        if not self.received:
            self.received = signal.SIGTERM if number == _PARENTS_DEATH else number
            self._since = time.monotonic()
            self._raise_if_due()
        elif number != _PARENTS_DEATH and time.monotonic() - self._since > ECHO_SECONDS:
            with contextlib.suppress(OSError):  # not sys.stderr, in the middle of whose own write this may be
                os.write(2, b"\nsecond signal: ended without saving\n")
            os._exit(128 + self.received)


def _ignored_hangup(number: int) -> bool:
    return number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) == signal.SIG_IGN


def _notice_parents_death(wanted: bool) -> bool:
    """On Linux under ``accelerate launch``: let the launcher's death arrive here as a signal of its own.

    The launcher passes no SIGTERM on; without this the run would go on after ``kill`` of the process that the user
    started. A script run without the launcher must outlive its shell (nohup), so nothing is done there.
    """
    if not sys.platform.startswith("linux") or "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return False
    pr_set_pdeathsig = 1
    with contextlib.suppress(OSError, AttributeError):
        return ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(_PARENTS_DEATH) if wanted else 0, 0, 0, 0) == 0
    return False
