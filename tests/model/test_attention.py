"""Every way to attend to a cache, against NumPy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gtpo_jax.model.attention import attend_triton, attend_xla

RNG = np.random.default_rng(0)
WAYS = {"xla": attend_xla, "triton": functools.partial(attend_triton, interpret=True)}


def reference(q, k, v, counts):
    out = np.zeros(q.shape)
    for n, m in np.ndindex(counts.shape):
        seen = counts[n, m]
        scores = k[n, :seen] @ q[n, m]
        weights = np.exp(scores - scores.max())
        out[n, m] = weights @ v[n, :seen] / weights.sum()
    return out


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("size", [64, 192, 512])
@pytest.mark.parametrize(
    "attend",
    [attend_xla, functools.partial(attend_triton, interpret=True)],
    ids=["xla", "triton"],
)
def test_one_token_sees_what_is_written(attend, size, jit):
    q, k, v = (RNG.normal(size=(5, n, 16)) for n in (3, size, size))
    counts = np.repeat(np.array([[1], [2], [63], [64], [size]]), 3, axis=1)
    # What is beyond is stale, and may be anything.
    stale = np.arange(size)[None, :, None] >= counts[:, :1, None]
    k, v = np.where(stale, 1e4, k), np.where(stale, -1e4, v)
    out = (jax.jit(attend) if jit else attend)(
        *(jnp.asarray(x, jnp.float32) for x in (q, k, v)), jnp.asarray(counts)
    )
    np.testing.assert_allclose(out, reference(q, k, v, counts), atol=2e-5)


def test_many_tokens_see_each_its_own_past():
    q, k, v = (RNG.normal(size=(4, n, 8)) for n in (6, 20, 20))
    counts = np.sort(RNG.integers(1, 21, (4, 6)), axis=1)
    out = attend_xla(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), jnp.asarray(counts))
    np.testing.assert_allclose(out, reference(q, k, v, counts), atol=2e-5)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN and Triton need a GPU")
def test_kernels_of_a_gpu():
    from gtpo_jax.model.attention import FLAT

    q, k, v = (RNG.normal(size=(8, n, 128)) for n in (6, 1024, 1024))
    counts = np.repeat(RNG.integers(1, 1025, (8, 1)), 6, axis=1)
    expected = reference(q, k, v, counts)
    for name, attend in FLAT.items():
        arrays = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
        out = np.asarray(jax.jit(attend)(*arrays, jnp.asarray(counts)), np.float32)
        np.testing.assert_allclose(out, expected, atol=0.05, err_msg=name)
