"""Kill an operation at every kind of instant, recover as a user would, and compare with the unbroken result.

By hand, from the repository: ``python tests/kill_points.py --points 100 [--seed 0] [--scenario NAME] [--at before:17]``

A point is ``before:N`` (SIGKILL before file operation N), ``half:N`` (half of what operation N writes is written),
``power:N`` (as before:N, and no file keeps what was not flushed to the disk), or ``time:S`` (SIGKILL from outside after S
seconds). ``before:17+half:3`` kills the recovery too, at its operation 3. Operations are those of Python and safetensors
below the scenario's folder: opening for writing, flush, rename, link, make, remove. Workers are forked from one process
that has everything imported, so that a point takes no start-up time. Linux only.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kill_watch import Outcome, Point, Worker, intercept

#: kinds of points, in turn; "second" kills the recovery too.
KINDS = ("before", "half", "second", "power", "before", "half", "before", "power", "before", "time")


class Killed(Exception):
    """The recovery was killed too."""


Run = Callable[..., Outcome]


@dataclasses.dataclass
class Scenario:
    """An operation, and how its user goes on after a kill.

    Attributes:
        prepare: puts into an empty folder what is there before.
        act: the operation, in a process whose working folder that is.
        recover: called with a function that runs an action in a process there, the folder, the folder and the outcome of
            the unbroken operation, and a way; returns findings, each "class: what".
        ways: how users may go on.
        beside: whether the outcome is right that the same operation has in another process at the same time, given that and
            the unbroken one; None: there is no other process.
        weight: share of the points.
        equal: what the table calls a good result.
    """

    name: str
    prepare: Callable[[Path], None]
    act: Callable[[], Any]
    recover: Callable[[Run, Path, Path, Outcome, str], list[str]]
    ways: tuple[str, ...] = ("again",)
    beside: Callable[[Outcome, Outcome], bool] | None = None
    weight: float = 1.0
    equal: str = "intact"


class Campaign:
    """Points of scenarios in a scratch folder, and what was found."""

    def __init__(self, scratch: Path, seed: int = 0):
        self.scratch, self.seed = scratch, seed
        self.rows: list[tuple] = []  # of the table
        self.findings: list[dict[str, str]] = []
        self.n_points = self.n_folders = 0

    def _folder(self, scenario: Scenario) -> Path:
        self.n_folders += 1
        folder = self.scratch / f"{self.n_folders}" / "root"
        folder.mkdir(parents=True)
        scenario.prepare(folder)
        return folder

    def unbroken(self, scenario: Scenario) -> tuple[Path, Outcome]:
        """The operation without a kill. Raises RuntimeError when that fails already."""
        folder = self._folder(scenario)
        outcome = Worker(scenario.act, folder).wait()
        if outcome.code or outcome.value in (1, 2):
            raise RuntimeError(f"{scenario.name} fails without a kill: {outcome.output}")
        return folder, outcome

    def try_point(self, scenario: Scenario, point: Point, way: str, whole: Path, expected: Outcome) -> list[str]:
        """Kill, recover, compare: the findings."""
        folder, second, found = self._folder(scenario), point.second, []
        beside = Worker(scenario.act, folder) if scenario.beside else None
        ended = Worker(scenario.act, folder, point).wait()
        if ended.code != -signal.SIGKILL and point.kind != "time" and not beside:
            raise RuntimeError(f"{scenario.name!r} was not killed at {point}: {ended.output}")
        if beside and not scenario.beside(other := beside.wait(), expected):
            found.append(f"the other process fails: exit {other.code}, {other.last_line}")

        def run(action: Callable, *arguments, killed_at: Point | None = None) -> Outcome:
            outcome = Worker(lambda: action(*arguments), folder, killed_at).wait()
            if killed_at and outcome.code == -signal.SIGKILL:
                raise Killed
            return outcome

        def run_killed(action: Callable, *arguments) -> Outcome:
            return run(action, *arguments, killed_at=second)

        try:
            found += scenario.recover(run_killed if second else run, folder, whole, expected, way)
        except Killed:
            found += scenario.recover(run, folder, whole, expected, way)
        shutil.rmtree(folder.parent)
        return found

    def points(self, scenario: Scenario, operations: Outcome, n_points: int | None) -> list[Point]:
        """Points spread over the operation, of all kinds; without a number every operation with every kind."""
        rng = random.Random(f"{self.seed} {scenario.name}")
        numbers = range(1, len(operations.labels) + 1)
        writes = [n for n in numbers if operations.labels[n - 1].startswith(("write", "weights"))]
        if n_points is None:
            return [Point(kind, n) for n in numbers for kind in ("before", "half", "power") if kind != "half" or n in writes]
        n_points = min(n_points, 3 * len(numbers))
        kinds, points = Counter(KINDS[(self.n_points + i) % len(KINDS)] for i in range(n_points)), []
        for kind, n_kind in kinds.items():
            for i in range(n_kind):
                spot = (i + rng.random()) / n_kind
                number = numbers[int(spot * len(numbers))]
                again = Point(rng.choice(["before", "half"]), rng.choice(writes))
                points.append({
                    "before": Point("before", number),
                    "half": Point("half", writes[int(spot * len(writes))]),
                    "power": Point("power", number),
                    "time": Point("time", spot * operations.seconds),
                    "second": Point("before", number, again),
                }[kind])
        return points

    def run(self, scenario: Scenario, n_points: int | None, given: Point | None = None) -> None:
        """Try the points of one scenario; prints each finding and how to reproduce it."""
        whole, expected = self.unbroken(scenario)
        points = [given] if given else self.points(scenario, expected, n_points)
        start, good, classes = time.monotonic(), 0, Counter()
        ways = [(point, way) for point in points for way in scenario.ways] if given or n_points is None else \
            [(point, scenario.ways[i % len(scenario.ways)]) for i, point in enumerate(points)]
        for point, way in ways:
            found = self.try_point(scenario, point, way, whole, expected)
            good += not found
            classes.update({text.split(":")[0] for text in found})
            in_range = point.kind != "time" and point.at <= len(expected.labels)
            operation = expected.labels[point.at - 1] if in_range else "some time"
            for text in found:
                self.findings.append({"scenario": scenario.name, "point": str(point), "way": way, "found": text,
                                      "operation": operation})
                print(f"FINDING {scenario.name!r} at {point} ({operation}), then {way!r}: {text[:400]}\n    python "
                      f"tests/kill_points.py --scenario {scenario.name!r} --at {point}", flush=True)
        seconds = (time.monotonic() - start) / len(ways)
        self.rows.append((scenario, len(expected.labels), len(ways), good, classes, seconds))
        self.n_points += len(ways)

    def table(self) -> str:
        """One line a scenario."""
        lines = [f"{'scenario':<30} {'operations':>10} {'points':>6} {'s each':>6}  outcome"]
        for scenario, operations, points, good, classes, seconds in self.rows:
            words = "".join(f"; {count} x {text}" for text, count in classes.items())
            lines.append(f"{scenario.name:<30} {operations:>10} {points:>6} {seconds:>6.2f}  {good} {scenario.equal}{words}")
        bad = self.n_points - sum(row[3] for row in self.rows)
        return "\n".join([*lines, f"{self.n_points} points, {bad} of them with findings"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=100)
    parser.add_argument("--every", action="store_true", help="every operation, every kind, every way: 30 minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenario", action="append", help="part of a name; default: all but 'broken'")
    parser.add_argument("--at", type=Point.parse, help="one point, such as before:17 or half:3+before:4")
    parser.add_argument("--list", action="store_true", help="list the operations instead of killing")
    parser.add_argument("--json", type=Path, help="write the findings to this file")
    arguments = parser.parse_args(argv)
    intercept()
    import kill_scenarios  # after the interception, and it imports everything
    gc.collect()
    gc.freeze()  # what is imported: collections in the workers would copy its memory

    with tempfile.TemporaryDirectory() as scratch:
        wanted = kill_scenarios.scenarios(Path(scratch), arguments.scenario or [])
        campaign, weights = Campaign(Path(scratch), arguments.seed), sum(scenario.weight for scenario in wanted)
        for scenario in wanted:
            if arguments.list:
                print(scenario.name, *enumerate(campaign.unbroken(scenario)[1].labels, start=1), sep="\n")
            else:
                share = None if arguments.every else max(1, round(arguments.points * scenario.weight / weights))
                campaign.run(scenario, share, arguments.at)
        print(campaign.table())
        if arguments.json:
            arguments.json.write_text(json.dumps({"points": campaign.n_points, "findings": campaign.findings}, indent=1))
    return int(bool(campaign.findings))


if __name__ == "__main__":
    sys.modules["kill_points"] = sys.modules["__main__"]  # the scenarios import this file
    sys.exit(main())
