"""The file of a comparison's results, the learning rates that its runs decide, and which runs are made."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from comparisons.methods import Method
from comparisons.words import current_run, current_setting
from hbll_seq.utils.atomic import atomic_write


def stored_setting(path: Path) -> dict:
    """What the runs of a file of results have in common, in today's words. Raises ValueError where it is no such file."""
    return current_setting(_read_file(path)["setting"])


def _read_file(path: Path) -> dict:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(data, dict) and {"setting", "runs"} <= data.keys():
            return data
    except ValueError:
        pass
    raise ValueError(f"{path} holds no runs with their setting, as a comparison stores them: move it away, or give another "
                     "--output") from None  # fmt: skip


class Results:
    """The JSON file: the setting of the comparison, one entry per finished run, and where they were taken the times of a step
    by turns (``turns.py``). Processes may share it.

    Args:
        path: of the file; it need not be there.
        setting: what all its runs have in common.
        over: ``"depth"`` or ``"time"``: what its methods work along.

    Raises:
        ValueError: the file holds runs of another setting.
    """

    def __init__(self, path: Path, setting: dict, over: str):
        self.path, self.setting, self.over = path, current_setting(setting), over
        self.runs: list[dict] = []
        self.step_times: dict[str, float] = {}
        self._read()

    def _read(self) -> None:
        if not self.path.exists():
            return
        data = _read_file(self.path)
        stored = current_setting(data["setting"])
        names = dict.fromkeys([*self.setting, *stored])  # what came later is None, or left out where it is as before
        changed = [k for k in names if stored.get(k) != self.setting.get(k)]
        if changed:
            raise ValueError(
                f"{self.path} holds a comparison with other settings ({', '.join(changed)}): its runs cannot be compared "
                "with these; give another --output"
            )
        self.runs = [current_run(run, self.over) for run in data["runs"]]
        self.step_times = data.get("step_times", {})

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time between reading and replacing the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(self.path.parent, os.O_RDONLY)  # locked by itself: no lock file to be left behind
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def find(self, method: str, lr: float, seed: int, description: str | None = None) -> dict | None:
        """The finished run, if there is one, also one that another process has added.

        Args:
            method, lr, seed: what names a run.
            description: if given, see :attr:`Method.description`; a run that did something else under this name is not
                found.
        """
        self._read()
        named = (r for r in self.runs if (r["method"], r["lr"], r["seed"]) == (method, lr, seed))
        return next((r for r in named if description is None or r.get("description") == description), None)

    def methods(self) -> list[str]:
        """Names of the methods that have a finished run, in the order in which they came."""
        self._read()
        return list(dict.fromkeys(run["method"] for run in self.runs))

    def add(self, run: dict) -> None:
        """Appends a run and replaces the file atomically; one line per run."""
        with self._locked():
            if self.find(run["method"], run["lr"], run["seed"], run.get("description")) is None:
                self.runs.append(run)
            self._write()

    def add_step_times(self, times: dict[str, float]) -> None:
        """Stores seconds of a step by description of a method. They were taken by turns, and so those of before, which were
        not taken beside these, are left out."""
        with self._locked():
            self._read()
            self.step_times = {name: round(seconds, 6) for name, seconds in times.items()}
            self._write()

    def _write(self) -> None:
        lines = ",\n".join(json.dumps(r) for r in self.runs)
        times = f'"step_times": {json.dumps(self.step_times)},\n' if self.step_times else ""
        atomic_write(self.path, f'{{"setting": {json.dumps(self.setting)},\n{times}"runs": [\n{lines}\n]}}\n')


def tune(loss_at: Callable[[float], float], grid: Sequence[float]) -> float:
    """The learning rate of the lowest loss: on the grid, and past its edges by factors of two while the best lies there,
    but no further than three of them. A loss that is not finite is the worst."""

    def loss_or_inf(lr: float) -> float:
        loss = loss_at(lr)
        return loss if math.isfinite(loss) else math.inf

    if len(grid) == 1:  # a single rate is not tuned
        return grid[0]
    tried = {lr: loss_or_inf(lr) for lr in grid}
    while True:
        best = min(tried, key=tried.get)
        beyond = {min(tried): best / 2, max(tried): best * 2}.get(best)
        if beyond is None or len(tried) >= len(grid) + 3:
            return best
        tried[beyond] = loss_or_inf(beyond)


def deepest(run: dict, split: str = "validation") -> dict:
    """The row of a run's deepest path."""
    return max(run[split], key=lambda row: row["depth"])


def deepest_loss(run: dict) -> float:
    """What decides between learning rates: the validation loss of the deepest path."""
    return deepest(run)["loss"]


class StoredMethod(NamedTuple):
    """A method as a file of results has it: its name, and what it did (see :attr:`Method.description`)."""

    name: str
    description: str


@dataclass
class Comparison:
    """Makes or finds the runs of a comparison.

    Args:
        results: the file that holds them.
        train: ``(method, lr, seed)`` -> a run; None makes none and only finds what is stored.
        loss: of a run, lower is better: what decides between learning rates.
    """

    results: Results
    train: Callable[[Method, float, int], dict] | None
    loss: Callable[[dict], float] = deepest_loss

    def run(self, method: Method | StoredMethod, lr: float, seed: int) -> dict | None:
        """The run, made now if it is not stored; None where nothing is to be made."""
        found = self.results.find(method.name, lr, seed, method.description)
        if found is None and self.train is not None:
            found = self.train(method, lr, seed)
            self.results.add(found)
        return found

    def tuned_rate(self, method: Method, rates: Sequence[float], seed: int) -> float:
        """The learning rate of the lowest loss; a method's own, if it has one, is taken as it is."""

        def loss_at(lr: float) -> float:
            run = self.run(method, lr, seed)
            return math.inf if run is None else self.loss(run)

        return tune(loss_at, rates if method.lr is None else [method.lr])

    def stored_rate(self, method: Method | StoredMethod, seed: int) -> float | None:
        """The learning rate of the lowest loss among the method's stored runs of this seed, of equal ones the first; None
        where there is none."""
        which = method.name, method.description, seed
        own = (run for run in self.results.runs if (run["method"], run.get("description"), run["seed"]) == which)
        tried = {run["lr"]: self.loss(run) for run in own}
        return min(tried, key=tried.get) if tried else None

    def rate(self, method: Method, rates: Sequence[float], seed: int) -> float | None:
        """:meth:`tuned_rate`, or where nothing is made :meth:`stored_rate`."""
        return self.stored_rate(method, seed) if self.train is None else self.tuned_rate(method, rates, seed)

    def at_rates(
        self,
        methods: Sequence[Method | StoredMethod],
        rate: Callable[[Method | StoredMethod], float | None],
        seeds: Sequence[int],
    ) -> dict[str, list[dict]]:
        """The runs of every method, by name: one per seed, at the method's learning rate, which is found first.

        Raises:
            ValueError: there is not a single one.
        """
        chosen = [(method, rate(method)) for method in methods]
        found = [(method.name, self.run(method, lr, seed)) for seed in seeds for method, lr in chosen if lr is not None]
        runs = {method.name: [run for name, run in found if name == method.name and run is not None] for method in methods}
        runs = {name: of_method for name, of_method in runs.items() if of_method}
        if not runs:
            names = ", ".join(method.name for method in methods)
            wanted = f"no run of {names} with these options" if names else "no run"
            raise ValueError(f"{self.results.path} holds {wanted}: leave --report-only out to make them")
        return runs
