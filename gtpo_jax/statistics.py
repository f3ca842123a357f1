"""Estimates over problems that were sampled several times, each with its interval.

The k samples of one problem belong together: they share its difficulty. So an interval comes
from a bootstrap over problems, never over samples.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gtpo_jax.errors import InputError


class Interval(NamedTuple):
    """An estimate and its 95% interval; NaN where there was nothing to estimate from."""

    value: float
    low: float
    high: float


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Probability that k of n samples, drawn without replacement, hold a right one.

        pass@k = 1 - C(n - c, k) / C(n, k)

    the unbiased estimator of Chen et al. (arXiv 2107.03374). NaN where n < k.
    """
    if not 0 <= correct <= n or k < 1:
        raise InputError(
            f"pass@{k} of {correct} right out of {n}: needs 0 <= right <= n, k >= 1"
        )
    if n < k:
        return math.nan
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority(answers: Sequence[str | None], correct: Sequence[bool]) -> float:
    """Whether the most frequent answer is right; answers that tie share the vote.

    Answers are alike when their texts are, up to spaces. No answer (None) does not vote; if
    nobody votes it is 0. NaN where there are no samples at all.
    """
    if not answers:
        return math.nan
    votes: dict[str, list[bool]] = {}
    for answer, right in zip(answers, correct, strict=True):
        if answer is not None:
            votes.setdefault("".join(answer.split()), []).append(right)
    if not votes:
        return 0.0
    most = max(len(v) for v in votes.values())
    return float(np.mean([v[0] for v in votes.values() if len(v) == most]))


def bootstrap(values: Sequence[float], seed: int = 0, draws: int = 10_000) -> Interval:
    """Mean over problems, and the percentile interval of `draws` resamples of problems.

    `values`: one number a problem, NaN where it has none (left out). Where all of n values are
    0, or all 1, resampling sees no spread, though n problems cannot prove 0 or 1: the far end
    is then that of the exact binomial interval (Clopper and Pearson), 1 - 0.025^(1/n) away.
    """
    kept = np.asarray([v for v in values if not math.isnan(v)], np.float64)
    if not len(kept):
        return Interval(math.nan, math.nan, math.nan)
    if kept.min() == kept.max() and kept[0] in (0.0, 1.0):
        reach = 1.0 - 0.025 ** (1 / len(kept))
        return Interval(float(kept[0]), *((0.0, reach) if kept[0] == 0 else (1.0 - reach, 1.0)))
    rng = np.random.default_rng(seed)
    # In blocks, so that thousands of problems do not make an array of gigabytes.
    block = max(1, 5_000_000 // len(kept))
    means = [
        kept[rng.integers(0, len(kept), (min(block, draws - i), len(kept)))].mean(axis=1)
        for i in range(0, draws, block)
    ]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Interval(float(kept.mean()), float(low), float(high))
