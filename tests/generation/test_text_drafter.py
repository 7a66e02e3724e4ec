"""Guesses from the text itself, and the budget that bounds what they may lose."""

import random

import pytest

from hbll_seq.generation.draft_control import LONGEST
from hbll_seq.generation.text_drafter import Budget, RepeatedText


def test_what_followed_the_same_three_tokens_last_time():
    text = RepeatedText([1, 2, 3, 4, 5, 6, 1, 2, 3, 7, 8, 9])
    assert text.guesses(4) == []  # 7 8 9 stood nowhere before
    text.append([1, 2, 3])
    assert text.guesses(2) == [7, 8]  # the later of the two places
    assert text.guesses(5) == [7, 8, 9, 1, 2]
    text.append([7])
    assert text.guesses(1) == [8]


def test_a_circle_is_taken_to_go_on():
    text = RepeatedText([5, 1, 2, 1, 2, 1, 2])
    assert text.guesses(7) == [1, 2, 1, 2, 1, 2, 1]
    assert RepeatedText([3, 3, 3, 3]).guesses(3) == [3, 3, 3]


@pytest.mark.parametrize("ids", [[], [1], [1, 1], [1, 2, 3]])
def test_a_short_text_gives_none(ids):
    assert RepeatedText(ids).guesses(8) == []


def written(budget, n_tokens, right):
    """Time of a text, in plain steps, whose guesses are right with this chance each, and what drafts cost by the budget."""
    time, n = 0.0, 0
    while n < n_tokens:
        _, n_draft = budget.choose()
        assert 0 <= n_draft <= LONGEST
        gained = 1
        while gained <= n_draft and random.random() < right:
            gained += 1
        budget.note(0, n_draft, gained, seconds=0.0)
        time, n = time + budget.cost(n_draft), n + gained
    return time


@pytest.mark.parametrize("n_rows", [1, 4])
@pytest.mark.parametrize("n_tokens", [5, 40, 128, 1000])
def test_wrong_guesses_cost_at_most_two_percent(n_rows, n_tokens):
    assert written(Budget(n_rows), n_tokens, right=0.0) <= 1.02 * n_tokens


def test_guesses_that_turn_wrong_cost_little_and_right_ones_pay():
    random.seed(0)
    assert written(Budget(1), 1000, right=1.0) < 400
    budget = Budget(1)
    gained = 500 - written(budget, 500, right=1.0)
    lost = written(budget, 500, right=0.0) - 500
    assert lost < 0.02 * 1000 + 8 + 1 < gained  # what they had gained, up to the credit
