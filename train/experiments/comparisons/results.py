"""The file of a comparison's results, and the learning rates that its runs decide."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hbll_seq.atomic import atomic_write


class Results:
    """The JSON file: the setting of the comparison, and one entry per finished run. Processes may share it."""

    def __init__(self, path: Path, setting: dict):
        self.path, self.setting = path, setting
        self.runs: list[dict] = []
        self._read()

    def _read(self) -> None:
        if not self.path.exists():
            return
        data = json.loads(self.path.read_text(encoding="utf-8"))
        names = dict.fromkeys([*self.setting, *data["setting"]])  # what came later is None, or left out where it is as before
        changed = [k for k in names if data["setting"].get(k) != self.setting.get(k)]
        if changed:
            raise ValueError(
                f"{self.path} holds a comparison with other settings ({', '.join(changed)}): its runs cannot be compared "
                "with these; give another --output"
            )
        self.runs = data["runs"]

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

    def find(self, side: str, lr: float, seed: int, method: str | None = None) -> dict | None:
        """The finished run, if there is one, also one that another process has added.

        Args:
            side, lr, seed: what names a run.
            method: if given, see :meth:`Side.method`; a run that did something else under this name is not found.
        """
        self._read()
        named = (r for r in self.runs if (r["side"], r["lr"], r["seed"]) == (side, lr, seed))
        return next((r for r in named if method is None or r.get("method") == method), None)

    def sides(self) -> list[str]:
        """Names of the sides that have a finished run, in the order in which they came."""
        self._read()
        return list(dict.fromkeys(run["side"] for run in self.runs))

    def add(self, run: dict) -> None:
        """Appends a run and replaces the file atomically; one line per run."""
        with self._locked():
            if self.find(run["side"], run["lr"], run["seed"], run.get("method")) is None:
                self.runs.append(run)
            lines = ",\n".join(json.dumps(r) for r in self.runs)
            text = f'{{"setting": {json.dumps(self.setting)},\n"runs": [\n{lines}\n]}}\n'
            atomic_write(self.path, text)


def tune(loss_at: Callable[[float], float], grid: Sequence[float]) -> float:
    """The learning rate of the lowest loss: on the grid, and past its edges by factors of two while the best lies there,
    but no further than three of them. A loss that is not finite is the worst."""

    def loss_or_inf(lr: float) -> float:
        loss = loss_at(lr)
        return loss if math.isfinite(loss) else math.inf

    tried = {lr: loss_or_inf(lr) for lr in grid}
    while len(grid) > 1:
        best = min(tried, key=tried.get)
        beyond = {min(tried): best / 2, max(tried): best * 2}.get(best)
        if beyond is None or len(tried) >= len(grid) + 3:
            return best
        tried[beyond] = loss_or_inf(beyond)
    return grid[0]  # a single rate is not tuned


def deepest(run: dict, split: str = "validation") -> dict:
    """The row of a run's deepest path."""
    return max(run[split], key=lambda row: row["depth"])
