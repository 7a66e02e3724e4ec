"""Try mutants of the library in a copy of the tree: ``python -m tests.mutation --targets engine,objectives --count 100``.

Every result is a line of JSON in the file of ``--results``; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from .mutants import Mutant, mutants_of
from .targets import ROOT, files_of, modules_of

OUTPUT = "output.txt"  # of the tests, in the copy


def copy_tree(folder: Path) -> None:
    """What git has or would take of the working tree."""
    listed = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def run_tests(folder: Path, tests: list[str], limit: float) -> dict:
    """Run tests in the copy, in a fork of this process, which has imported torch: what came of it, as a result says it."""
    start, child = time.monotonic(), os.fork()
    if child == 0:
        _in_child(folder, tests)
    try:
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() - start < limit:
            time.sleep(0.05)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # also what a test has left behind
    if ended[0] == 0:
        os.waitpid(child, 0)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", (folder / OUTPUT).read_text(errors="replace"), re.MULTILINE)
    return {"outcome": "timeout" if ended[0] == 0 else "killed" if ended[1] else "survived",
            "by": failed[-1] if failed else None, "seconds": round(time.monotonic() - start, 1)}


def _in_child(folder: Path, tests: list[str]) -> None:
    code = 70
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setsid()
        os.chdir(folder)
        output = os.open(OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2)
        sys.path[:] = [str(folder), *(p for p in sys.path if Path(p or ".").resolve() not in (ROOT, folder))]
        for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "hbll_seq")]:
            del sys.modules[name]
        # without files of bytecode: that of a mutant of the same second and length would be taken for the next one's
        os.environ.update(PYTHONPATH=str(folder), PYTHONDONTWRITEBYTECODE="1", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
        sys.dont_write_bytecode = True
        import pytest

        code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


class Trial:
    """Tries mutants in a copy of the tree; with no ``limit`` of seconds, in three times what the tests take by themselves."""

    def __init__(self, folder: Path, limit: float | None):
        self.folder, self.limit = folder, limit
        self._limits: dict[str, float] = {}

    def __call__(self, path: Path, mutant: Mutant) -> dict:
        tests, place, source = files_of(path), self.folder / path.relative_to(ROOT), path.read_text()
        limit = self.limit or self._limits.get(repr(tests)) or self._measure(tests)
        place.write_text(mutant.apply(source))
        try:
            return run_tests(self.folder, tests, limit)
        finally:
            place.write_text(source)

    def _measure(self, tests: list[str]) -> float:
        own = run_tests(self.folder, tests, 3600)
        if own["outcome"] != "survived":
            said = (self.folder / OUTPUT).read_text()[-2000:]
            raise SystemExit(f"{said}\n{' '.join(tests)} fail on the code as it is: mend that first ({own})")
        self._limits[repr(tests)] = 3 * own["seconds"] + 30
        return self._limits[repr(tests)]


def drawn(targets: list[str], count: int, seed: int) -> list[tuple[Path, Mutant]]:
    """``count`` mutants of the targets' modules, drawn without replacement, the same ones for the same tree and seed."""
    everything = [(path, m) for target in targets for path in modules_of(target) for m in mutants_of(path.read_text())]
    random.Random(seed).shuffle(everything)
    return everything[:count]


def key_of(path: Path, mutant: Mutant) -> str:
    """What says that a mutant has been tried: the module as it is now, its tests' names, and the change."""
    parts = (path.relative_to(ROOT).as_posix(), path.read_text(), files_of(path), *mutant)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def known(results: Path) -> dict[str, dict]:
    """The results so far by key; a line cut off by a kill is left out."""
    lines = results.read_bytes().split(b"\n")[:-1] if results.exists() else []
    return {row["key"]: row for row in map(json.loads, lines)}


def line_of(row: dict) -> str:
    return (f"{row['outcome']} ({row['seconds']:.0f} s) {row['file']}:{row['line']} {row['kind']}: {row['before'][:80]!r} -> "
            f"{row['after'][:80]!r}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default="engine,objectives,training/trainer.py,data,generation",
                        help="folders or files of hbll_seq, by comma")
    parser.add_argument("--count", type=int, default=20, help="mutants to try")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--limit", type=float, help="seconds for a mutant; default: three times the tests' own, and 30")
    parser.add_argument("--results", type=Path, default=Path("runs/mutation.jsonl"), help="file of the results")
    parser.add_argument("--again", action="store_true", help="try the survivors once more, with the tests as they are now")
    given = parser.parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import accelerate, datasets, matplotlib, sentencepiece, torch  # noqa: E401, F401, I001  once, for all forks

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through the blocks that end the tests and remove the copy
    done, rows = known(given.results), []
    given.results.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, given.results.open("a") as file:
        folder = Path(scratch).resolve() / "tree"
        copy_tree(folder)
        trial = Trial(folder, given.limit)
        for path, mutant in drawn(given.targets.split(","), given.count, given.seed):
            row = done.get(key := key_of(path, mutant))
            if row is None or given.again and row["outcome"] == "survived":
                row = {"key": key, "file": path.relative_to(ROOT).as_posix(), **mutant._asdict(), **trial(path, mutant)}
                file.write(json.dumps(row) + "\n")
                file.flush()
                print(line_of(row), flush=True)
            rows.append(row)
    survivors = [row for row in rows if row["outcome"] == "survived"]
    print("\n".join([f"{len(survivors)} of {len(rows)} mutants survive", *map(line_of, survivors)]))
    return int(len(survivors) > 0)


if __name__ == "__main__":
    sys.exit(main())
