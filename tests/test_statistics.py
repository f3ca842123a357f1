"""Estimates and intervals against enumeration, hand numbers and known coverage."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binomtest

from gtpo_jax.errors import InputError
from gtpo_jax.statistics import bootstrap, majority, pass_at_k

COUNTS = [(1, 0), (1, 1), (4, 0), (4, 1), (6, 2), (6, 5), (6, 6)]


@pytest.mark.parametrize(("n", "correct"), COUNTS)
def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_one(n, correct):
    right = [True] * correct + [False] * (n - correct)
    for k in range(1, n + 1):
        draws = list(itertools.combinations(right, k))
        assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_by_hand():
    assert pass_at_k(8, 2, 1) == pytest.approx(0.25)
    assert pass_at_k(4, 1, 2) == pytest.approx(0.5)
    assert pass_at_k(200, 1, 100) == pytest.approx(0.5)
    assert math.isnan(pass_at_k(3, 1, 4))  # too few samples to know


@pytest.mark.parametrize(("n", "correct", "k"), [(3, 4, 1), (3, -1, 1), (3, 1, 0)])
def test_pass_at_k_refuses_counts_that_cannot_be(n, correct, k):
    with pytest.raises(InputError, match=f"pass@{k} of {correct} right out of {n}"):
        pass_at_k(n, correct, k)


@pytest.mark.parametrize(
    ("answers", "correct", "value"),
    [
        (["3", "3", "4"], [True, True, False], 1.0),
        (["3", "4", "4"], [True, False, False], 0.0),
        (["3", "4"], [True, False], 0.5),
        (["3", "4", "5", "5", "4"], [True, False, True, True, False], 0.5),
        (["\\frac 12", "\\frac12", "7", None, None, None], [True, True] + [False] * 4, 1.0),
        ([None, None], [False, False], 0.0),
    ],
)
def test_majority(answers, correct, value):
    assert majority(answers, correct) == value


def test_majority_of_nothing_is_not_a_number():
    assert math.isnan(majority([], []))


def test_bootstrap_agrees_with_the_normal_interval():
    values = np.random.default_rng(3).normal(2.0, 1.0, 400)
    value, low, high = bootstrap(values)
    error = 1.96 * values.std() / math.sqrt(400)
    assert value == pytest.approx(values.mean())
    assert low == pytest.approx(values.mean() - error, abs=0.01)
    assert high == pytest.approx(values.mean() + error, abs=0.01)
    assert bootstrap(values) == (value, low, high)  # the same seed, the same interval


def test_bootstrap_resamples_problems_not_samples():
    """Ten problems, each all right or all wrong in 100 samples: ten facts, not a thousand."""
    per_problem = [1.0] * 5 + [0.0] * 5
    value, low, high = bootstrap(per_problem)
    assert value == 0.5
    # Binomial(10, 1/2): P(<= 1) = 0.011, P(<= 2) = 0.055, so 2.5% lies at 2 of 10.
    assert (low, high) == (pytest.approx(0.2), pytest.approx(0.8))


@pytest.mark.parametrize("n", [1, 2, 64, 1000])
def test_no_success_in_n_does_not_prove_zero(n):
    exact = binomtest(0, n).proportion_ci(0.95, "exact")
    assert bootstrap([0.0] * n) == (0.0, 0.0, pytest.approx(exact.high))
    assert bootstrap([1.0] * n) == (1.0, pytest.approx(1 - exact.high), 1.0)


def test_bootstrap_leaves_out_what_is_missing():
    assert bootstrap([0.5, math.nan, 0.5]) == (0.5, 0.5, 0.5)
    assert bootstrap([1.0, math.nan]) == bootstrap([1.0])
    assert all(map(math.isnan, bootstrap([math.nan])))
    assert all(map(math.isnan, bootstrap([])))


def test_bootstrap_in_blocks_draws_as_many():
    value, low, high = bootstrap(np.tile([0.0, 1.0], 10_000), draws=1000)
    assert value == 0.5
    assert (low, high) == (pytest.approx(0.4931, abs=5e-4), pytest.approx(0.5069, abs=5e-4))
