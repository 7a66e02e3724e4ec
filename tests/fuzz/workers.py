"""Workers: forked processes that run inputs one after the other, under a limit of time and of memory.

A worker that hangs or dies is a finding of the input it was at, and another one takes its place. So does one that met any
finding: nothing that it left behind in the process reaches a later input.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import random
import re
import resource
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .oracle import Case, Outcome, examine, harness_error

#: (random numbers, an empty folder of its own) -> the input.
Target = Callable[[random.Random, Path], Case]
Job = tuple[str, int]


@dataclass(frozen=True)
class Limits:
    """Of one input: seconds of wall time, and bytes by which the process may grow."""

    seconds: float = 20.0
    memory: int = 2 << 30


class Worker:
    """One process. ``job`` is what it is at, None while it waits."""

    def __init__(self, targets: dict[str, Target], limits: Limits, scratch: Path):
        self.folder = Path(tempfile.mkdtemp(dir=scratch))
        self.job: Job | None = None
        self.since, self.limits = 0.0, limits
        self.connection, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=_work, args=(theirs, targets, limits, self.folder), daemon=True)
        self.process.start()
        theirs.close()

    def start(self, job: Job) -> None:
        """Hand it an input."""
        self.job, self.since = job, time.monotonic()
        self.connection.send(job)

    def collect(self) -> Outcome | None:
        """How its input ended, None while it runs. After a hang or a crash the worker is dead."""
        if self.connection.poll():
            try:
                return self.connection.recv()
            except EOFError:
                self.process.join()
                return Outcome(f"crash, exit code {self.process.exitcode}", "", self._where(), is_finding=True)
        if time.monotonic() - self.since > self.limits.seconds:
            self.end()
            return Outcome("hang", "", self._where(), is_finding=True)
        return None

    def _where(self) -> str:
        """The input in words, and the frames of the main thread when the time was nearly over, or at the crash."""
        paths = [path for name in ("what", "trace") if (path := self.folder / name).exists()]
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
        if len(texts) == 2:
            head, *threads = re.split(r"\n(?=(?:Current t|T)hread)", texts[1])  # the main thread comes last
            texts[1:] = [head, threads[-1] if threads else ""]
        lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
        return " | ".join(lines[:9])[:1500]

    def end(self) -> None:
        """Kill it and remove what it left."""
        self.process.kill()
        self.process.join()
        if not self.folder.exists():
            return
        kept = self._where()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._where = lambda: kept


def run_jobs(
    jobs: Iterator[Job], targets: dict[str, Target], limits: Limits, n_workers: int, scratch: Path
) -> Iterator[tuple[Job, Outcome]]:
    """Every job's outcome, in the order in which they end."""
    waiting = deque(Worker(targets, limits, scratch) for _ in range(n_workers))
    busy: list[Worker] = []
    jobs = iter(jobs)
    try:
        while True:
            while waiting and (job := next(jobs, None)) is not None:
                worker = waiting.popleft()
                worker.start(job)
                busy.append(worker)
            if not busy:
                return
            multiprocessing.connection.wait([worker.connection for worker in busy], timeout=0.2)
            for worker in list(busy):
                if (outcome := worker.collect()) is None:
                    continue
                busy.remove(worker)
                yield worker.job, outcome
                if outcome.is_finding:
                    worker.end()
                    worker = Worker(targets, limits, scratch)
                waiting.append(worker)
    finally:
        for worker in [*waiting, *busy]:
            worker.end()


# ---------------------------------------------------------------------------------------------------- in the worker


def _work(connection, targets: dict[str, Target], limits: Limits, folder: Path) -> None:
    """The worker's whole life."""
    trace = open(folder / "trace", "w")
    faulthandler.enable(trace)
    # Half as much again is allowed before the process is stopped: what merely passes the limit is measured.
    allowed = _status("VmData") + limits.memory * 3 // 2
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))
    parent = os.getppid()
    while True:
        while not connection.poll(5):
            if os.getppid() != parent:  # killed: other workers hold a copy of its end of the pipe, so that nothing closes it
                return
        name, seed = connection.recv()
        trace.truncate(0)
        faulthandler.dump_traceback_later(limits.seconds * 0.9, file=trace)
        before = time.process_time()
        outcome = run_one(name, seed, targets[name], limits, folder)
        outcome.seconds = time.process_time() - before
        faulthandler.cancel_dump_traceback_later()
        connection.send(outcome)


def run_one(name: str, seed: int, target: Target, limits: Limits, folder: Path) -> Outcome:
    """One input, a function of its target and seed alone."""
    own = folder / f"{name}-{seed}"
    own.mkdir()
    before, start = os.getcwd(), _reset_peak()
    try:
        try:
            case = target(random.Random(f"{name} {seed}"), own)
        except Exception as error:
            return harness_error(error)
        (folder / "what").write_text(case.what, encoding="utf-8", errors="replace")
        outcome = examine(case)
        grown = _status("VmHWM") - start
        if grown > limits.memory and not outcome.is_finding:
            outcome = Outcome("memory", case.what, f"{grown >> 20} MiB more than before", is_finding=True)
        return outcome
    finally:
        os.chdir(before)
        shutil.rmtree(own, ignore_errors=True)


def _reset_peak() -> int:
    """Let the kernel measure the largest size from now on; returns the size now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(key: str) -> int:
    """Bytes, of this process, in the kernel's words."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key + ":"))
