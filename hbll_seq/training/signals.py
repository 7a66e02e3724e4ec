"""Stopping a run politely: SIGTERM and Ctrl-C ask for a checkpoint, a second signal ends the process at once."""

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
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopNow(Exception):
    """Raised by the signal inside :meth:`StopSignal.interruptible`."""


class StopSignal:
    """Remembers the first SIGTERM or SIGINT while its ``with`` block runs; the handlers before are restored after.

    Attributes:
        received: number of the first signal, 0 while there was none.

    The second signal ends the process at once with exit code 128 + its number. Outside the main thread, where Python
    allows no handlers, nothing is installed.
    """

    def __init__(self):
        self.received = 0
        self._since = 0.0
        self._interruptible = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            signals = [*_SIGNALS, signal.SIGUSR1] if _notice_parents_death(True) else _SIGNALS
            self._before = {number: signal.signal(number, self._handle) for number in signals}
        return self

    def __exit__(self, *_) -> None:
        if getattr(signal, "SIGUSR1", None) in self._before:
            _notice_parents_death(False)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def interruptible(self, enabled: bool = True) -> Iterator[None]:
        """A block that the first signal leaves with StopNow: for long work that changes nothing, such as evaluation."""
        self._interruptible = enabled
        try:
            if enabled and self.received:
                raise StopNow
            yield
        finally:
            self._interruptible = False

    def _handle(self, number: int, _frame) -> None:
        if not self.received:
            self.received = signal.SIGTERM if number == getattr(signal, "SIGUSR1", None) else number
            self._since = time.monotonic()
            if self._interruptible:
                raise StopNow
        elif number in _SIGNALS and time.monotonic() - self._since > ECHO_SECONDS:
            sys.stderr.write("\nsecond signal: ended without saving\n")
            os._exit(128 + number)


def _notice_parents_death(wanted: bool) -> bool:
    """On Linux under ``accelerate launch``: let the launcher's death arrive here as SIGUSR1.

    The launcher passes no SIGTERM on; without this the run would go on after ``kill`` of the process that the user
    started. A script run without the launcher must outlive its shell (nohup), so nothing is done there.
    """
    if not sys.platform.startswith("linux") or "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return False
    pr_set_pdeathsig = 1
    with contextlib.suppress(OSError, AttributeError):
        return ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(signal.SIGUSR1) if wanted else 0, 0, 0, 0) == 0
    return False
