"""Which drafter, and how many tokens it drafts: chosen from measured time and acceptance while a text is written.

All costs are in units of a plain step, so that a machine that is busy for a while changes little. A round that drafts n
tokens costs ``first + n * extra``, a line through what was measured: several tokens are checked in one call, which may cost
more than a plain step, and each drafted token adds its own draft. A drafted token is taken with the chance ``a``, so that a
round gives ``1 + a + .. + a**n`` tokens.
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch

#: the most tokens that are drafted at once
LONGEST = 8
#: the lengths of a drafter's first rounds, after which it is judged; the very first also reads the prompt and is not measured
_TRIALS = (3, 3, 6, 3, 6)
#: it must promise so much more than plain steps
_LEAST_GAIN = 1.03
#: and one that promises so much more is known to pay
_CLEAR_GAIN = 1.2
#: the share of all time that rounds may lose before nothing but plain steps are taken, and plain steps on top of that: while
#: no drafter is known to pay, and where one is, though not in this text so far
_MAY_LOSE, _MAY_LOSE_AT_FIRST, _MAY_LOSE_HERE = 0.02, 3.0, 6.0
#: plain steps before another trial; doubled at each one that fails
_PAUSE, _LONGEST_PAUSE = 64, 1024
#: plain steps before the first round, which say what one costs
_PLAIN_AT_FIRST = 3
#: after so many rounds a plain step is measured again, and a round of the drafter that was not used for longest
_REFRESH = 48
#: measurements that a median is taken of
_N_COSTS = 7
#: what is left of old counts of acceptance after a round
_FADE = 0.9


@dataclass
class Record:
    """What is known of one drafter.

    Attributes:
        costs: what the last rounds of each length cost, in plain steps.
        tried, taken: drafted tokens that were judged, and those that were taken; both fade.
        rounds: how many there were, up to the number after which it is judged.
        last: number of the last one among all rounds of its text.
    """

    costs: dict[int, deque[float]] = field(default_factory=dict)
    tried: float = 1.0
    taken: float = 0.7
    rounds: int = 0
    last: int = 0
    _line: tuple[float, float, float] | None = None  # mean length, mean cost, and what a token more costs

    def note(self, n_draft: int, cost: float) -> None:
        """A round of this length cost so many plain steps."""
        self.costs.setdefault(n_draft, deque(maxlen=_N_COSTS)).append(cost)
        self._line = None

    def cost(self, n_draft: int) -> float:
        """Of a round of this length, by a line through the medians of those measured: an interruption moves no median."""
        line = self._line
        if line is None:  # texts of other threads may add to what is known meanwhile
            points = [(n, median(costs)) for n, costs in list(self.costs.items())] or [(0, 1.0)]
            mean_n, mean_cost = (sum(values) / len(points) for values in zip(*points))
            spread = sum((n - mean_n) ** 2 for n, _ in points)
            slope = sum((n - mean_n) * (cost - mean_cost) for n, cost in points) / spread if spread else 0.3
            self._line = line = mean_n, mean_cost, max(0.02, slope)
        mean_n, mean_cost, slope = line
        return max(1.0, mean_cost + slope * (n_draft - mean_n))

    @property
    def acceptance(self) -> float:
        """Chance that a drafted token is taken, where all before it are."""
        return self.taken / self.tried

    def best(self, lengths: Iterable[int]) -> tuple[float, int]:
        """How many times as fast as plain decoding the best length is (tokens of a round over its cost), and this length."""
        chance, found = self.acceptance, (0.0, 1)
        for n in lengths:
            tokens = (1 - chance ** (n + 1)) / (1 - chance) if chance < 1 else n + 1.0
            found = max(found, (tokens / self.cost(n), n))
        return found


@dataclass
class Totals:
    """Counts of one text. ``rounds``, ``tokens``: of rounds that drafted; ``drafted``: tokens; ``plain``: plain steps."""

    rounds: int = 0
    tokens: int = 0
    drafted: int = 0
    plain: int = 0


class Fixed:
    """Always the one drafter, and the same length."""

    def __init__(self, n_draft: int):
        self.n_draft, self.totals = n_draft, Totals()

    def choose(self) -> tuple[int, int]:
        """See :meth:`Control.choose`."""
        return 0, self.n_draft

    def note(self, drafter: int, n_draft: int, gained: int, seconds: float) -> None:
        """See :meth:`Control.note`."""
        count(self.totals, n_draft, gained)


def count(totals: Totals, n_draft: int, gained: int) -> None:
    """A round that drafted so many tokens, or a plain step, made the texts ``gained`` tokens longer."""
    if n_draft < 1:
        totals.plain += gained
        return
    totals.rounds, totals.tokens, totals.drafted = totals.rounds + 1, totals.tokens + gained, totals.drafted + n_draft


@dataclass
class Known:
    """What was learned of a model's drafters, for its next text.

    Attributes:
        records: of each drafter, by name.
        wait: plain steps before the next trial.
        pause: how many there are after a trial that fails.
    """

    records: dict[str, Record] = field(default_factory=dict)
    wait: int = 0
    pause: int = _PAUSE


_known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class Control:
    """Chooses for each round, and is told what came of it.

    Args:
        drafters: their names.
        model: what is learned is kept for its next texts.
        setting: texts of the same setting share what is learned.
        n_draft: the length, where it is not to be chosen.

    Attributes:
        records: of each drafter.
        totals: counts of this text.
        known: what outlives it.
    """

    def __init__(self, drafters: Sequence[str], model: object, setting: Hashable, *, n_draft: int | None = None):
        self.known = _known.setdefault(model, {}).setdefault(setting, Known())
        self.records = [self.known.records.setdefault(name, Record()) for name in drafters]
        self.lengths = range(1, LONGEST + 1) if n_draft is None else [n_draft]
        self.totals = Totals()
        self._plain_steps: deque[float] = deque(maxlen=_N_COSTS)  # seconds
        self._since_plain = 0  # rounds
        self._all, self._lost = 0.0, 0.0  # in plain steps: all time, and what rounds lost
        for record in self.records:
            record.last = 0

    def best(self) -> tuple[int, int, float]:
        """The drafter and the length that promise most, and how many times as fast as plain decoding they are."""
        (gain, n_draft), drafter = max((record.best(self.lengths), i) for i, record in enumerate(self.records))
        return drafter, n_draft, gain

    def choose(self) -> tuple[int, int]:
        """The drafter's number and how many tokens it drafts; 0 tokens are a plain step."""
        if self.totals.plain < _PLAIN_AT_FIRST or self._since_plain >= _REFRESH or self.known.wait > 0:
            return 0, 0
        drafter, n_draft, gain = self.best()
        is_known = gain > _CLEAR_GAIN and all(record.rounds == len(_TRIALS) for record in self.records)
        if self._lost > _MAY_LOSE * self._all + (_MAY_LOSE_HERE if is_known else _MAY_LOSE_AT_FIRST):
            self._rest(doubled=not is_known)
            return 0, 0
        for i, record in enumerate(self.records):
            if record.rounds < len(_TRIALS):
                return i, _TRIALS[record.rounds] if len(self.lengths) > 1 else n_draft
        if gain < _LEAST_GAIN:
            self._rest(doubled=True)
            self.records[drafter].rounds = len(_TRIALS) - 2  # the next trial is of this one
            return 0, 0
        oldest = min(range(len(self.records)), key=lambda i: self.records[i].last)
        if self.totals.rounds - self.records[oldest].last > 2 * _REFRESH:
            return oldest, n_draft
        return drafter, n_draft

    def note(self, drafter: int, n_draft: int, gained: int, seconds: float) -> None:
        """A round took ``seconds`` and made the texts ``gained`` tokens longer, of which it had drafted ``n_draft``."""
        count(self.totals, n_draft, gained)
        if n_draft < 1:
            self._plain_steps.append(seconds)
            self._since_plain, self.known.wait, self._all = 0, max(0, self.known.wait - 1), self._all + 1.0
            return
        self._since_plain += 1
        if not self._plain_steps:
            return
        record, cost = self.records[drafter], seconds / median(self._plain_steps)
        if record.last:  # the first round of a text also reads its prompt
            record.note(n_draft, cost)
        record.tried = _FADE * record.tried + min(gained, n_draft)
        record.taken = _FADE * record.taken + gained - 1
        record.rounds, record.last = min(record.rounds + 1, len(_TRIALS)), self.totals.rounds
        cost = min(cost, 3 * record.cost(n_draft))  # what an interruption takes is not the drafter's
        self._all += cost
        self._lost = max(-2.0, self._lost + cost - gained)
        if self._lost < 0:  # it pays
            self.known.pause = _PAUSE

    def _rest(self, doubled: bool) -> None:
        """Plain steps for a while; after the next trial that fails for twice as long."""
        self.known.wait = self.known.pause
        if doubled:
            self.known.pause = min(2 * self.known.pause, _LONGEST_PAUSE)


def clock(device: torch.device) -> Callable[[], float]:
    """What measures rounds, in seconds: of one CPU thread its own time, which other programs take nothing of."""
    return time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
