"""Intervals and tests of paired differences, against numbers from tables and by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from experiments import statistics

# Student's sleep data (1908): hours gained by ten patients with each of two drugs.
FIRST = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SECOND = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


def test_the_interval_of_students_sleep_data():
    # As R's t.test(extra ~ group, paired = TRUE) prints it: 1.58, 0.7001142 .. 2.4598858.
    of = statistics.by_seed(SECOND, FIRST)
    np.testing.assert_allclose(of.difference, [1.58, 0.7001142, 2.4598858], atol=1e-6)
    # Nine patients gained more, none less, one the same: p = 2 / 2**9.
    assert (of.higher, of.lower) == (9, 0)
    assert of.p == pytest.approx(2 / 2**9)


@given(
    st.lists(
        st.tuples(st.floats(-1, 1, width=32), st.floats(-1, 1, width=32)),
        min_size=3,
        max_size=9,
    )
)
def test_zero_is_outside_the_interval_exactly_where_the_paired_t_test_says_so(pairs):
    first, second = np.array(pairs).T
    if np.ptp(first - second) < 1e-3:
        return
    of = statistics.by_seed(first, second)
    p = stats.ttest_rel(first, second).pvalue
    if abs(p - 0.05) > 1e-6:
        assert (p < 0.05) == (of.difference.low > 0 or of.difference.high < 0)


def test_sign_test_by_hand():
    # 5 of 5 above: 2 * (1/2)^5. 4 of 5: 2 * (1 + 5) / 32. Ties are left out.
    assert statistics.sign_test(np.array([1, 2, 3, 4, 5.0])) == (5, 0, 2 / 32)
    assert statistics.sign_test(np.array([1, 2, 0, -3, 4, 5.0])) == (4, 1, 12 / 32)
    assert statistics.sign_test(np.zeros(3)) == (0, 0, 1.0)


def test_one_seed_has_no_interval():
    of = statistics.by_seed([0.7], [0.6])
    assert of.difference.value == pytest.approx(0.1)
    assert math.isnan(of.difference.low) and math.isnan(of.difference.high)


def test_seeds_needed_is_the_textbooks_sample_size():
    # s = size: (t(.975, n-1) + t(.8, n-1))^2 <= n. At n = 9 it is (2.306 + 0.889)^2 = 10.2, at
    # n = 10 (2.262 + 0.883)^2 = 9.9.
    assert statistics.seeds_needed([0.0, 0.03 * math.sqrt(2)], 0.03) == 10
    # s = 2 size: 4 (t + t)^2 <= n. At 33 it is 4 (2.037 + 0.853)^2 = 33.4, at 34 33.3.
    assert statistics.seeds_needed([0.0, 0.06 * math.sqrt(2)], 0.03) == 34
    assert statistics.seeds_needed([0.1], 0.03) is None
    assert statistics.seeds_needed([0.1, 0.1], 0.03) is None


def test_by_problem_resamples_problems():
    of = statistics.by_problem([0.5] * 30 + [-0.5] * 10)
    assert of.difference.value == pytest.approx(0.25)
    # Its standard error is sqrt(0.1875 / 40) = 0.0685, and 1.96 of that 0.134.
    np.testing.assert_allclose(of.difference[1:], [0.25 - 0.134, 0.25 + 0.134], atol=0.02)
    assert (of.higher, of.lower) == (30, 10)
    assert of.p == pytest.approx(stats.binomtest(30, 40).pvalue)
