"""What paired runs say: differences by seed and by problem, with intervals and sign tests.

Both arms of a pair have the same seed: problems, initial weights and keys. What they share
falls out of their difference, so that few seeds tell more than they would apart.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from gtpo_jax.statistics import Interval, bootstrap

POWER = 0.8  # the chance to see a difference that is there


class Paired(NamedTuple):
    """A mean difference with its 95% interval, and the sign test of its pairs (two-sided)."""

    difference: Interval
    higher: int  # pairs in which the first arm is above the second
    lower: int
    p: float


def t_interval(values: Sequence[float]) -> Interval:
    """Mean and Student's 95% interval: mean +- t(0.975, n - 1) s / sqrt(n); NaN for n = 1."""
    x = np.asarray(values, np.float64)
    if len(x) < 2:
        return Interval(float(x.mean()) if len(x) else math.nan, math.nan, math.nan)
    reach = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))
    return Interval(float(x.mean()), float(x.mean() - reach), float(x.mean() + reach))


def by_seed(first: Sequence[float], second: Sequence[float]) -> Paired:
    """first[i] - second[i] of seed i: Student's interval."""
    differences = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    return Paired(t_interval(differences), *sign_test(differences))


def by_problem(differences: Sequence[float]) -> Paired:
    """A difference a problem, mean over what was drawn for it: bootstrap over problems.

    The interval is for these runs: it knows that other problems might have been asked, not that
    other seeds might have been trained.
    """
    x = np.asarray(differences, np.float64)
    return Paired(bootstrap(x), *sign_test(x))


def sign_test(differences: np.ndarray) -> tuple[int, int, float]:
    """How many are above and below 0, and the two-sided p of a fair coin; ties do not count."""
    higher, lower = int((differences > 0).sum()), int((differences < 0).sum())
    if higher + lower == 0:
        return 0, 0, 1.0
    return higher, lower, float(stats.binomtest(higher, higher + lower).pvalue)


def seeds_needed(differences: Sequence[float], size: float = 0.03) -> int | None:
    """Seeds for a paired t-test at 5% to see a difference of `size` with a chance of `POWER`.

        n >= (t(0.975, n - 1) + t(POWER, n - 1))^2 s^2 / size^2

    with s from the differences at hand. None where they have no spread to judge by.
    """
    x = np.asarray(differences, np.float64)
    if len(x) < 2 or x.std(ddof=1) == 0:
        return None
    for n in range(2, 100_000):
        needed = stats.t.ppf(0.975, n - 1) + stats.t.ppf(POWER, n - 1)
        if n >= (needed * x.std(ddof=1) / size) ** 2:
            return n
    return None
