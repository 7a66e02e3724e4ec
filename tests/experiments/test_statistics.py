"""What a few seeds say, beside tables and the definition."""

import math
import random

import pytest

from comparisons.statistics import mean, paired_interval, paired_test, spread, t_quantile, told, told_paired


@pytest.mark.parametrize(
    "freedom, confidence, expected",
    [(1, 0.95, 12.706), (2, 0.95, 4.303), (3, 0.95, 3.182), (4, 0.95, 2.776), (9, 0.95, 2.262), (10, 0.99, 3.169),
     (30, 0.90, 1.697), (1000, 0.95, 1.962)],
)  # fmt: skip
def test_the_quantiles_are_those_of_the_tables(freedom, confidence, expected):
    assert t_quantile(confidence, freedom) == pytest.approx(expected, abs=6e-4)


def test_mean_spread_and_interval_of_three_seeds():
    values = [1.0, 2.0, 6.0]
    assert mean(values) == 3.0 and spread(values) == pytest.approx(math.sqrt(7))
    found = paired_interval(values)
    assert (found.mean, found.n) == (3.0, 3)
    assert found.high - 3 == pytest.approx(3 - found.low) == pytest.approx(4.3027 * math.sqrt(7) / math.sqrt(3), rel=1e-4)


def test_the_interval_holds_the_true_mean_as_often_as_it_says():
    rng = random.Random(0)
    found = [paired_interval([rng.gauss(5.0, 2.0) for _ in range(3)]) for _ in range(4000)]
    assert sum(i.low <= 5.0 <= i.high for i in found) / len(found) == pytest.approx(0.95, abs=0.012)


def test_the_paired_test_is_the_intervals_other_side():
    """The null lies at the end of the 95% interval just when p is 0.05; and of no difference p is uniform."""
    values = [1.0, 2.0, 6.0, 4.5]
    found = paired_interval(values)
    for end in (found.low, found.high):
        assert paired_test(values, end) == pytest.approx(0.05, abs=1e-9)
    assert paired_test(values, found.mean) == pytest.approx(1.0)
    assert paired_test([1.0, 3.0], 0.0) == pytest.approx(1 - 2 / math.pi * math.atan(2.0))  # one degree of freedom: Cauchy
    assert paired_test([2.0, 2.0], 2.0) == 1.0 and paired_test([2.0, 2.0], 1.0) == 0.0 and paired_test([2.0], 1.0) is None
    rng = random.Random(1)
    found = [paired_test([rng.gauss(5.0, 2.0) for _ in range(3)], 5.0) for _ in range(4000)]
    assert [sum(p < level for p in found) / len(found) for level in (0.05, 0.5)] == pytest.approx([0.05, 0.5], abs=0.02)


def test_one_seed_is_called_that_and_shows_no_spread():
    assert spread([3.0]) is None and paired_interval([3.0]) is None
    assert told([3.0]) == "3.00" and told_paired([1.5]) == "1.500 (one seed)"
    assert told([]) == "-" and told_paired([]) == ""
    assert told([1.0, 3.0]) == "2.00 ± 1.41"
    assert told_paired([1.0, 1.1], ".2f") == "1.00, 1.10 (mean 1.05, 95% interval 0.41 to 1.69, p = 0.5)"
    assert told_paired([1.0, 1.1], "+.1f").endswith("p = 0.03)")  # a sign: differences, tested against 0
    assert told_paired([5.0, 5.001, 5.002]).endswith("p < 0.001)")


def test_seeds_that_agree_to_the_digit_prove_nothing():
    """Accuracies of 10,000 images are multiples of 0.01, so that two seeds often agree; the spread is then no zero."""
    for values in ([0.1, 0.1], [97.1 - 97.0, 96.5 - 96.4], [0.0, 0.0, 0.0]):
        shown = told_paired(values, "+.2f")
        assert shown == ", ".join(f"{value:+.2f}" for value in values) + \
            f" (mean {values[0]:+.2f}, the same of all seeds: no interval)"  # fmt: skip


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: t_quantile(1.0, 2), "confidence=1.0: must be above 0 and below 1"),
        (lambda: t_quantile(0.9, 0), "freedom=0: must be at least 1"),
        (lambda: mean([]), "a mean needs at least one"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
