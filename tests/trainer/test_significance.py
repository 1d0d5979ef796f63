"""The test against every assignment of signs and scipy, the interval against a bootstrap in plain Python."""

import itertools
import random
import warnings
from math import sqrt
from statistics import NormalDist, fmean, stdev

import numpy as np
import pytest
from scipy.stats import false_discovery_control, permutation_test

from trainer import significance
from trainer.significance import change_interval, compare_paired, holm, randomisation_p


def draw_values(queries: int) -> tuple[list[float], list[float]]:
    """Values of a metric before and after, by query; the change is skewed."""
    generator = random.Random(3)
    before = [generator.random() for _ in range(queries)]
    return before, [value + generator.expovariate(10) - 0.05 for value in before]


# The test


def test_p_is_the_share_of_all_signs_where_there_are_few() -> None:
    before, after = draw_values(9)
    changes = [new - old for old, new in zip(before, after, strict=True)]
    sums = [
        abs(sum(sign * change for sign, change in zip(signs, changes, strict=True)))
        for signs in itertools.product((1, -1), repeat=9)
    ]
    exact = sum(total >= abs(sum(changes)) - 1e-12 for total in sums) / len(sums)
    assert 0.05 < exact < 0.95
    # Of 99,999 drawings the share has a standard error of at most 0.5 / 316.
    assert randomisation_p(before, after) == pytest.approx(exact, abs=0.005)


def test_p_is_that_of_scipy() -> None:
    before, after = draw_values(60)
    changes = np.array(after) - np.array(before)
    drawn = permutation_test((changes,), np.mean, permutation_type="samples", n_resamples=9999, batch=100, rng=1)
    assert randomisation_p(before, after) == pytest.approx(float(drawn.pvalue), abs=0.015)
    assert randomisation_p(after, before) == randomisation_p(before, after)


def test_blocks_change_p_by_chance_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = draw_values(60)
    whole = randomisation_p(before, after)
    monkeypatch.setattr(significance, "BLOCK", 1000)
    assert randomisation_p(before, after) == pytest.approx(whole, abs=0.005)


def test_a_run_against_itself_has_p_1() -> None:
    before, _ = draw_values(300)
    assert randomisation_p(before, before) == 1.0
    assert compare_paired(before, before) == significance.Difference(0.0, 0.0, 0.0, 1.0)


def test_p_is_never_0() -> None:
    assert randomisation_p([0.0] * 200, [1.0] * 200) == 1 / 100_000
    assert randomisation_p([0.0] * 200, [1.0] * 200, resamples=99) == 1 / 100


def test_gains_that_equal_the_losses_have_p_1_whatever_is_rounded() -> None:
    changes = [0.1, 0.2, 0.3, -0.1, -0.2, -0.3]
    assert sum(changes) != 0
    assert randomisation_p([0.0] * 6, changes) == 1.0


def test_one_query_says_nothing() -> None:
    assert randomisation_p([0.1], [0.9]) == 1.0


def test_of_1000_null_pairs_at_most_65_fall_below_5_percent() -> None:
    generator = np.random.default_rng(5)
    below = 0
    for _ in range(1000):
        # Queries differ in how hard they are, and many have the same value in both, as with a metric of ranks.
        hardness = generator.beta(0.5, 0.5, size=100)
        before, after = (generator.binomial(4, hardness) / 4 for _ in range(2))
        below += randomisation_p(list(before), list(after), resamples=999) < 0.05
    assert 35 <= below <= 65  # 50 of 1,000 have a standard deviation of 7


def test_a_planted_difference_is_found() -> None:
    generator = np.random.default_rng(6)
    before = generator.beta(2, 1, size=300)
    after = before + 0.05 + generator.normal(scale=0.2, size=300)
    found = compare_paired(list(before), list(after))
    assert found.mean == pytest.approx(0.05, abs=0.025)
    assert 0 < found.low < 0.05 < found.high < 0.1
    assert found.p < 0.001


# Several tests


def test_holm_is_the_step_down_by_hand() -> None:
    # Sorted 0.005 x 4, 0.01 x 3, 0.03 x 2 and 0.04 x 1, of which the last may not come before the third.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


def test_holm_keeps_the_share_of_families_with_an_error() -> None:
    generator = np.random.default_rng(7)
    families = generator.uniform(size=(4000, 6))
    wrong = sum(min(holm(list(family))) < 0.05 for family in families) / len(families)
    assert wrong == pytest.approx(0.05, abs=0.01)
    # It is never below what Benjamini and Hochberg's procedure gives, which bounds less.
    for family in families[:200]:
        assert np.all(np.array(holm(list(family))) >= false_discovery_control(family) - 1e-12)


# The interval


def test_the_interval_is_that_of_a_bootstrap_in_plain_python() -> None:
    before, after = draw_values(30)
    changes = [new - old for old, new in zip(before, after, strict=True)]
    generator = random.Random(4)
    drawn = sorted(fmean(generator.choices(changes, k=30)) for _ in range(9999))
    # Of 9,999 draws a 2.5 % percentile has a standard error of sqrt(0.025 * 0.975 / 9999) / 0.058, the normal density
    # there: 0.027 spreads of the drawn means; of two such runs' difference 0.038.
    tolerance = 0.1 * stdev(drawn)
    assert change_interval(before, after) == pytest.approx((drawn[249], drawn[9749]), abs=tolerance)


def test_the_interval_of_many_queries_is_the_normal_one_of_the_paired_change() -> None:
    before, after = draw_values(2000)
    changes = [new - old for old, new in zip(before, after, strict=True)]
    half = NormalDist().inv_cdf(0.975) * stdev(changes) / sqrt(len(changes))
    low, high = change_interval(before, after)
    assert (low, high) == pytest.approx((fmean(changes) - half, fmean(changes) + half), abs=0.1 * half)
    # Before and after swapped, the change is the opposite one.
    assert change_interval(after, before) == pytest.approx((-high, -low), abs=0.1 * half)


def test_the_interval_is_the_same_each_time() -> None:
    assert change_interval(*draw_values(20)) == change_interval(*draw_values(20))


@pytest.mark.parametrize("queries", [1, 2, 40])
@pytest.mark.parametrize("change", [0.0, 0.25])
def test_equal_changes_have_an_interval_without_width(queries: int, change: float) -> None:
    before = [number / 64 for number in range(queries)]  # exact in binary, so that all differences are the same
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert change_interval(before, [value + change for value in before]) == (change, change)


def test_queries_before_and_after_must_be_the_same() -> None:
    with pytest.raises(ValueError, match="shorter"):
        change_interval([0.5, 0.6], [0.7])
