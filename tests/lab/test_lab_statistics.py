"""Intervals that hold what they say, and sentences that say no more than the numbers."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from abyssal.lab.statistics import against, deviation, difference, mean, quantile, signed, spread

VALUES = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8)


@given(VALUES, st.integers(0, 1000))
def test_difference_is_scipys_paired_test(values, seed):
    stats = pytest.importorskip("scipy.stats")
    other = np.asarray(values) + np.random.default_rng(seed).normal(size=len(values))
    found = difference(values, list(other))
    theirs = stats.ttest_rel(other, values).confidence_interval(0.95)
    assert found.mean == pytest.approx(float(np.mean(other - values)), abs=1e-9)
    reach = theirs.high - theirs.low  # the table has four digits
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=2e-4 * reach + 1e-9)


def test_intervals_hold_the_truth_19_times_of_20():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(4000, 3)), rng.normal(size=(4000, 3)) + 0.5
    held = [d.low <= 0.5 <= d.high for d in (difference(list(x), list(y)) for x, y in zip(a, b, strict=True))]
    assert np.mean(held) == pytest.approx(0.95, abs=0.012)  # 3.5 standard errors


def test_quantiles_fall_to_the_normal_distributions():
    values = [quantile(n) for n in range(1, 60)]
    assert values == sorted(values, reverse=True)
    assert values[-1] == 1.960


@given(VALUES)
def test_mean_and_deviation_are_numpys(values):
    assert mean(values) == pytest.approx(float(np.mean(values)), abs=1e-9)
    assert deviation(values) == pytest.approx(float(np.std(values, ddof=1)), abs=1e-6)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="as many of both"):
        difference([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="two at least"):
        difference([1.0], [1.0])


def test_sentences_follow_from_the_numbers():
    a, b = [2.0, 2.1, 2.2], [1.5, 1.61, 1.69]
    assert against("Loss", ("A", a), ("B", b)).startswith("Loss: lower with B than with A (1.600 against 2.100")
    assert against("Loss", ("B", b), ("A", a)).startswith("Loss: higher with A than with B")
    assert "no difference between B and A that 3 seeds show" in against("Loss", ("A", a), ("B", [2.3, 1.9, 2.2]))
    assert math.isnan(mean([]))


def test_signs():
    assert signed(-0.0001) == "0.000"
    assert signed(-0.25, 2) == "−0.25"
    assert signed(0.25, 2) == "+0.25"
    assert spread([1.0, 2.0], 1) == "1.5 ± 0.7"
