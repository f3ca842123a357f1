"""What is kept, against plain loops in float64, and how often tokens are drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from gtpo_jax.errors import InputError
from gtpo_jax.model.sampling import Sampling, draw, keep, sample

LOGITS = np.random.default_rng(0).normal(0, 2, (5, 50))
LOGPROBS = LOGITS - np.log(np.exp(LOGITS).sum(axis=1, keepdims=True))


def kept_by_hand(logprobs, how):
    """Indices that all of the four leave, one rule after the other, as their papers say."""
    probabilities = np.exp(logprobs)
    probabilities[list(how.banned)] = 0.0
    probabilities = probabilities / probabilities.sum()
    order = [i for i in np.argsort(-probabilities, kind="stable") if probabilities[i] > 0]
    nucleus, weight = set(), 0.0
    for i in order:
        if weight >= how.top_p:
            break
        nucleus.add(int(i))
        weight += probabilities[i]
    likeliest = {int(i) for i in order[: how.top_k or None]}
    likely = {int(i) for i in order if probabilities[i] >= how.min_p * probabilities.max()}
    return nucleus & likeliest & likely


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    "how",
    [
        *(Sampling(top_p=p) for p in (1e-6, 0.3, 0.6, 0.95, 0.999)),
        *(Sampling(top_k=k) for k in (1, 3, 50, 99)),
        *(Sampling(min_p=p) for p in (0.01, 0.2, 1.0)),
        Sampling(banned=(3, 7)),
        Sampling(top_k=5, top_p=0.7, min_p=0.1, banned=tuple(LOGITS.argmax(axis=1).tolist())),
    ],
    ids=repr,
)
def test_what_is_kept(how, jit):
    function = jax.jit(keep, static_argnums=1) if jit else keep
    kept = np.asarray(function(jnp.asarray(LOGPROBS, jnp.float32), how))
    for row, masked in zip(LOGPROBS, kept, strict=True):
        assert set(np.flatnonzero(np.isfinite(masked))) == kept_by_hand(row, how)


def test_the_nucleus_by_hand():
    logprobs = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]]))
    kept = np.isfinite(np.asarray(keep(logprobs, Sampling(top_p=0.7))))
    assert kept.tolist() == [[True, True, False, False], [False, False, True, True]]


def test_draws_stay_in_the_nucleus_and_keep_their_proportions():
    logits = jnp.tile(jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]])), (4000, 1))
    keys = jax.random.split(jax.random.key(0), 4000)
    tokens, logprobs = sample(logits, keys, Sampling(top_p=0.7))
    counts = np.bincount(np.asarray(tokens), minlength=4)
    assert counts[2] == counts[3] == 0
    assert counts[0] / 4000 == pytest.approx(0.5 / 0.8, abs=0.03)
    # Logprobs are the policy's, not the nucleus'.
    np.testing.assert_allclose(
        np.asarray(logprobs), np.log([0.5, 0.3])[np.asarray(tokens)], rtol=1e-5
    )


def test_draws_over_many_blocks_follow_the_distribution():
    """A block of the vocabulary that is all cut off, one half full, and a tiny one."""
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 1.5, 300)
    logits[10:128], logits[270:] = -np.inf, -40.0
    probabilities = np.exp(logits) / np.exp(logits).sum()
    count = 40_000
    keys = jax.random.split(jax.random.key(5), count)
    row = jnp.asarray(np.log(np.maximum(probabilities, 1e-30)), jnp.float32)
    row = jnp.where(jnp.asarray(probabilities) > 0, row, -jnp.inf)
    tokens = np.asarray(jax.jit(draw)(jnp.tile(row, (count, 1)), keys))
    seen = np.bincount(tokens, minlength=300)
    assert seen[10:128].sum() == 0 and seen[270:].sum() == 0
    often = probabilities * count > 5
    assert (
        chisquare(
            seen[often], probabilities[often] * seen[often].sum() / probabilities[often].sum()
        ).pvalue
        > 1e-3
    )
    empty = draw(jnp.tile(row, (8, 1)).at[:, 128:].set(-jnp.inf), keys[:8])
    assert np.all(np.asarray(empty) < 10)


def test_greedy_takes_the_likeliest_that_is_not_banned():
    logits = jnp.array([[0.0, 1.0, 0.5]])
    keys = jax.random.split(jax.random.key(1), 1)
    assert sample(logits, keys, Sampling(0.0, top_p=0.1, top_k=1))[0].tolist() == [1]
    tokens, logprobs = sample(logits, keys, Sampling(0.0, banned=(1,)))
    assert tokens.tolist() == [2]
    assert float(logprobs[0]) == pytest.approx(0.5 - np.log(1 + np.e + np.exp(0.5)))


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -0.1), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1), ("min_p", -0.1)],
)
def test_values_that_make_no_sense_are_named(name, value):
    with pytest.raises(InputError, match=f"{name}={value} must be"):
        Sampling(**{name: value})
