"""The control of drafting: it finds the faster way by what rounds cost and give, and loses little where none is faster."""

import random

import pytest

from hbll_seq.generation import draft_control
from hbll_seq.generation.draft_control import LONGEST, Control, Record


class Model:
    """Something that knowledge can be kept of."""


def write(control, n_tokens, drafters, rng, plain=1.0, noise=0.0):
    """Simulate a text; ``drafters``: (acceptance, cost of a round, cost of a token) of each. Its time in plain steps."""
    spent = written = 0
    while written < n_tokens:
        drafter, n_draft = control.choose()
        n_draft = min(n_draft, n_tokens - written - 1)
        if n_draft < 1:
            gained, cost = 1, 1.0
        else:
            chance, first, each = drafters[drafter]
            gained = 1
            while gained <= n_draft and rng.random() < chance:
                gained += 1
            cost = first + each * n_draft
        cost *= 1 + noise * rng.random() + (30 if noise and rng.random() < 0.01 else 0)
        control.note(drafter, n_draft, gained, cost * plain)
        spent, written = spent + cost, written + gained
    return spent


def texts(drafters, n_texts, n_tokens, noise=0.0):
    """Times of several texts of one model, in plain steps a token."""
    model, rng, times = Model(), random.Random(0), []
    for _ in range(n_texts):
        control = Control([str(i) for i in range(len(drafters))], model, "greedy")
        times.append(write(control, n_tokens, drafters, rng, noise=noise) / n_tokens)
    return times


@pytest.mark.parametrize("drafters", [[(0.5, 2.0, 0.4)], [(0.3, 1.2, 0.3), (0.4, 1.2, 0.6)], [(0.0, 3.0, 1.0)] * 2], ids=str)
@pytest.mark.parametrize("n_tokens", [100, 1000])
def test_it_is_hardly_slower_where_drafts_do_not_pay(drafters, n_tokens):
    times = texts(drafters, 40, n_tokens)
    assert sum(times) / len(times) < 1.02 and max(times) < 1.04 + 8 / n_tokens  # the first text measures the drafters


def test_it_is_faster_where_they_do():
    """The best length is found: 0.9 ** n tokens against a cost of 1.3 + 0.3 n."""
    times = texts([(0.9, 1.3, 0.3)], 20, 300)
    best = min((1.3 + 0.3 * n) / sum(0.9**i for i in range(n + 1)) for n in range(1, LONGEST + 1))
    assert sum(times[5:]) / 15 < 1.1 * best < 0.7


def test_it_finds_the_better_drafter():
    good, bad = (0.9, 1.1, 0.3), (0.5, 1.1, 0.2)
    alone, both = (sum(texts(drafters, 20, 300)[5:]) / 15 for drafters in ([good], [bad, good]))
    assert both < 1.1 * alone


def test_interruptions_do_not_mislead_it():
    quiet, loud = (sum(texts([(0.9, 1.3, 0.3)], 20, 300, noise)[5:]) / 15 for noise in (0.0, 0.3))
    assert loud < 1.15 * 1.45 * quiet  # all times are 1.15 times as long on average, and 1.3 with the interruptions


def test_what_is_measured_is_kept_for_the_next_text():
    model = Model()
    first = Control(["a"], model, "greedy")
    write(first, 100, [(0.9, 1.3, 0.3)], random.Random(0))
    assert Control(["a"], model, "greedy").records[0] is first.records[0]
    assert Control(["a"], model, "drawn").records[0] is not first.records[0]
    assert Control(["a"], Model(), "greedy").records[0] is not first.records[0]


def test_a_length_that_is_named_is_kept():
    control, lengths = Control(["a", "b"], Model(), "greedy", n_draft=4), set()
    for _ in range(100):
        drafter, n_draft = control.choose()
        lengths.add(n_draft)
        control.note(drafter, n_draft, 1 + n_draft, 1.0)
    assert lengths == {0, 4}


def test_texts_of_several_threads_share_what_is_known(monkeypatch):
    """Another text may note a round while this one draws its line."""
    record, shared = Record(), draft_control.median
    record.note(3, 1.5)

    def meanwhile(costs):
        record.note(4 + len(record.costs), 2.0)
        return shared(costs)

    monkeypatch.setattr(draft_control, "median", meanwhile)
    assert record.cost(3) == 1.5
