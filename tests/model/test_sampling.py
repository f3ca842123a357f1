"""The nucleus, against a plain loop in float64, and how often tokens are drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gtpo_jax.model.sampling import nucleus, sample


def keep_by_hand(probabilities, top_p):
    """Indices of the smallest set of likeliest tokens that weighs at least top_p."""
    kept, weight = set(), 0.0
    for i in np.argsort(-probabilities, kind="stable"):
        if weight >= top_p:
            break
        kept.add(int(i))
        weight += probabilities[i]
    return kept


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.6, 0.95, 0.999])
@pytest.mark.parametrize("jit", [False, True])
def test_nucleus_keeps_the_smallest_set(top_p, jit):
    logits = np.random.default_rng(0).normal(0, 2, (5, 50))
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    function = jax.jit(nucleus, static_argnums=1) if jit else nucleus
    kept = np.asarray(function(jnp.asarray(logprobs, jnp.float32), top_p))
    for row, masked in zip(logprobs, kept, strict=True):
        assert set(np.flatnonzero(np.isfinite(masked))) == keep_by_hand(np.exp(row), top_p)


def test_nucleus_by_hand():
    logprobs = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]]))
    kept = np.isfinite(np.asarray(nucleus(logprobs, 0.7)))
    assert kept.tolist() == [[True, True, False, False], [False, False, True, True]]


def test_draws_stay_in_the_nucleus_and_keep_their_proportions():
    logits = jnp.tile(jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]])), (4000, 1))
    keys = jax.random.split(jax.random.key(0), 4000)
    tokens, logprobs = sample(logits, keys, 1.0, 0.7)
    counts = np.bincount(np.asarray(tokens), minlength=4)
    assert counts[2] == counts[3] == 0
    assert counts[0] / 4000 == pytest.approx(0.5 / 0.8, abs=0.03)
    # Logprobs are the policy's, not the nucleus'.
    np.testing.assert_allclose(
        np.asarray(logprobs), np.log([0.5, 0.3])[np.asarray(tokens)], rtol=1e-5
    )


def test_greedy_ignores_the_nucleus():
    logits = jnp.array([[0.0, 1.0, 0.5]])
    keys = jax.random.split(jax.random.key(1), 1)
    tokens, _ = sample(logits, keys, 0.0, 0.1)
    assert tokens.tolist() == [1]
