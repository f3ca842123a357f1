"""Every way to attend, to packed rows and to a cache, against NumPy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from gtpo_jax.model import kernels
from gtpo_jax.model.attention import (
    FLAT,
    PACKED,
    Cache,
    cache_shapes,
    cached_attention,
    flat_kernel,
    packed_attention,
    packed_kernel,
)
from gtpo_jax.model.kernels import attend_paged, attend_triton, attend_turned, attend_xla

RNG = np.random.default_rng(0)
# Each row: lengths of its segments; the rest is padding.
RAGGED = {
    1: [[1]],
    20: [[7, 1, 9], [20], []],
    64: [[64], [1, 63]],
    150: [[64, 64], [3, 90, 40], [149]],
}
INTERPRETED = {
    "triton": functools.partial(kernels.packed_triton, interpret=True),
    "splash": functools.partial(kernels.packed_splash, interpret=True),
}


def packed_reference(q, k, v, segments, d_out):
    """Values, and gradients of sum(out * d_out), from the formulas, a head at a time."""
    out, d_q, d_k, d_v = (np.zeros(x.shape) for x in (q, q, k, v))
    length = segments.shape[1]
    group = q.shape[2] // k.shape[2]
    for r, n in np.ndindex(q.shape[0], q.shape[2]):
        query, key, value, d = (
            q[r, :, n],
            k[r, :, n // group],
            v[r, :, n // group],
            d_out[r, :, n],
        )
        seen = (segments[r][:, None] == segments[r]) & np.tri(length, dtype=bool)
        scores = np.where(seen, query @ key.T, -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        d_weights = d @ value.T
        d_scores = weights * (d_weights - (weights * d_weights).sum(axis=1, keepdims=True))
        out[r, :, n] = weights @ value
        d_q[r, :, n] = d_scores @ key
        d_k[r, :, n // group] += d_scores.T @ query
        d_v[r, :, n // group] += weights.T @ d
    return out, d_q, d_k, d_v


def segments_of(rows, length):
    ids = np.zeros((len(rows), length), np.int32)
    for row, lengths in zip(ids, rows, strict=True):
        row[: sum(lengths)] = np.repeat(np.arange(len(lengths)) + 1, lengths)
    return ids


def check_packed(attend, segments, groups, width, kv_heads=2):
    """Values and gradients are right for what is not padding, whatever flows into padding."""
    rows, length = segments.shape
    q, k, v, d_out = (
        RNG.normal(size=(rows, length, heads, width))
        for heads in (kv_heads * groups, kv_heads, kv_heads, kv_heads * groups)
    )
    q = q * width**-0.5

    def run(q, k, v, d_out):
        out, backward = jax.vjp(lambda *x: attend(*x, jnp.asarray(segments)), q, k, v)
        return out, *backward(d_out)

    got = jax.jit(run)(*(jnp.asarray(x, jnp.float32) for x in (q, k, v, d_out)))
    real = segments > 0
    expected = packed_reference(q, k, v, segments, d_out)
    for name, x, y in zip(("out", "d_q", "d_k", "d_v"), got, expected, strict=True):
        assert np.isfinite(x).all(), name
        error = np.abs(np.asarray(x) - y)[real].max()
        assert error < 1e-5 * (np.abs(y[real]).max() or 1), (name, error)


@pytest.mark.parametrize(
    ("length", "groups"), [(1, 3), (20, 1), (64, 4), (150, 1), (150, 3), (150, 4)]
)
def test_packed_rows(length, groups):
    check_packed(packed_attention, segments_of(RAGGED[length], length), groups, width=16)


def test_packed_rows_of_many_blocks():
    segments = segments_of([[300, 20, 1, 250], [90, 60, 30, 30, 200]], 600)
    check_packed(packed_attention, segments, groups=3, width=8, kv_heads=1)


def test_packed_rows_whose_segments_come_back():
    """Blocks are skipped by ranges of ids; that must hold where ids do not rise."""
    segments = np.repeat(RNG.integers(1, 4, (2, 30)), 10, axis=1).astype(np.int32)
    check_packed(packed_attention, segments, groups=1, width=8)


@pytest.mark.parametrize(
    ("name", "width", "groups"),
    [
        ("triton", 64, 1),
        ("triton", 64, 3),
        ("triton", 16, 4),
        ("splash", 64, 3),
        ("splash", 128, 1),
        ("splash", 128, 4),
    ],
)
def test_packed_rows_in_interpreted_kernels(name, width, groups):
    segments = segments_of([[130, 1, 40], [60, 90], []], 200)
    check_packed(INTERPRETED[name], segments, groups, width, kv_heads=1)


def test_one_segment_a_row_by_the_call_that_cudnn_takes():
    attend = functools.partial(kernels.packed_cudnn, implementation="xla")
    check_packed(attend, segments_of([[40], [33], [1]], 40), groups=3, width=16)


def test_blocks_that_nothing_sees_are_not_computed():
    """Not a number times a weight of 0 is not a number: it would show."""
    block = kernels.BLOCK
    segments = segments_of([[block, 2 * block]], 4 * block)
    q, k, v = (jnp.asarray(RNG.normal(size=(1, 4 * block, 2, 8)), jnp.float32) for _ in "qkv")
    beyond = np.array([True, False, False, True]).repeat(block)[None, :, None, None]

    def run(k, v):
        out, backward = jax.vjp(lambda *x: kernels.packed_xla(*x, segments), q, k, v)
        return [x[:, block : 3 * block] for x in (out, *backward(jnp.where(beyond, 0, q)))]

    clean, spoilt = run(k, v), run(*(jnp.where(beyond, jnp.nan, x) for x in (k, v)))
    for x, y in zip(clean, spoilt, strict=True):
        np.testing.assert_array_equal(x, y)


def test_packed_rows_in_bfloat16_follow_float32():
    segments = segments_of([[100, 28]], 128)
    q, k, v = (jnp.asarray(RNG.normal(size=(1, 128, 2, 32)), jnp.bfloat16) for _ in "qkv")
    exact = [np.asarray(x, np.float64) for x in (q * 32**-0.5, k, v)]
    out = packed_attention(q * 32**-0.5, k, v, segments)
    assert out.dtype == jnp.bfloat16
    expected, *_ = packed_reference(*exact, segments, exact[0])
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=0.02)


def test_packed_rows_inside_shard_map():
    """Every carry of the loops has to vary with the rows, as the checked types demand."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("data")
    attend = jax.shard_map(packed_attention, mesh=mesh, in_specs=(rows,) * 4, out_specs=rows)
    check_packed(attend, segments_of([[40, 60], [100]], 100), groups=2, width=8)


def test_which_kernel_attends():
    half, full = jnp.bfloat16, jnp.float32
    assert [packed_kernel("gpu", half, one) for one in (False, True)] == ["triton", "cudnn"]
    assert [packed_kernel("gpu", full, one) for one in (False, True)] == ["xla", "xla"]
    assert {packed_kernel("tpu", d, one) for d in (half, full) for one in (0, 1)} == {"splash"}
    assert {packed_kernel("cpu", d, one) for d in (half, full) for one in (0, 1)} == {"xla"}
    cache = jax.ShapeDtypeStruct((2, 1, 256, 128), half)
    assert [flat_kernel("tpu", cache, length) for length in (1, 2)] == ["paged", "xla"]
    assert [flat_kernel("gpu", cache, length) for length in (1, 2)] == ["xla", "xla"]
    assert [flat_kernel("cpu", cache, length) for length in (1, 2)] == ["turned", "turned"]
    for shape, dtype in (((256, 64), half), ((200, 128), half), ((256, 128), full)):
        assert flat_kernel("tpu", jax.ShapeDtypeStruct(shape, dtype)) == "xla"


def reference(q, k, v, counts):
    out = np.zeros(q.shape)
    for n, m in np.ndindex(counts.shape):
        seen = counts[n, m]
        scores = k[n, :seen] @ q[n, m]
        weights = np.exp(scores - scores.max())
        out[n, m] = weights @ v[n, :seen] / weights.sum()
    return out


def turned(q, k, v, counts):
    return attend_turned(q, jnp.swapaxes(k, 1, 2), v, counts)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("size", [64, 192, 512])
@pytest.mark.parametrize(
    "attend",
    [attend_xla, turned, functools.partial(attend_triton, interpret=True)],
    ids=["xla", "turned", "triton"],
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


@pytest.mark.parametrize("groups", [1, 3, 8])
@pytest.mark.parametrize("size", [384, 512, 1024])
def test_one_token_sees_what_is_written_in_pages(size, groups):
    """The TPU's kernel, interpreted, in a bfloat16 cache; pages of 128 and 512 tokens."""
    q, k, v = (
        np.asarray(jnp.asarray(RNG.normal(size=(5, n, 128)), jnp.bfloat16), np.float64)
        for n in (groups, size, size)
    )
    q = q * 128**-0.5
    counts = np.repeat(np.array([[1], [128], [129], [size - 1], [size]]), groups, axis=1)
    stale = np.arange(size)[None, :, None] >= counts[:, :1, None]
    k, v = np.where(stale, 1024, k), np.where(stale, -1024, v)
    with pltpu.force_tpu_interpret_mode():
        out = attend_paged(
            jnp.asarray(q, jnp.float32),
            *(jnp.asarray(x, jnp.bfloat16) for x in (k, v)),
            jnp.asarray(counts, jnp.int32),
        )
    expected = reference(q, k, v, counts)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=0.01, rtol=0.01)


@pytest.mark.parametrize("attend", [attend_xla, turned])
def test_many_tokens_see_each_its_own_past(attend):
    q, k, v = (RNG.normal(size=(4, n, 8)) for n in (6, 20, 20))
    counts = np.sort(RNG.integers(1, 21, (4, 6)), axis=1)
    out = attend(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), jnp.asarray(counts))
    np.testing.assert_allclose(out, reference(q, k, v, counts), atol=2e-5)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_cache_is_written_and_read_as_its_platform_has_it(platform):
    """Three tokens into two slots of a cache that others are in, then one more into one."""
    past = RNG.normal(size=(4, 2, 16, 8))
    keys = np.swapaxes(past, 2, 3) if platform == "cpu" else past
    shapes = cache_shapes(platform, 4, 2, 16, 8)
    assert (keys.shape, past.shape) == shapes
    cache = Cache(jnp.asarray(keys), jnp.asarray(past), jnp.array([2, 0]))
    q, k, v = (RNG.normal(size=(2, 3, n, 8)) for n in (6, 2, 2))
    positions = np.array([[4, 5, 6], [0, 1, 99]])  # the last is padding
    arrays = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    out, new = cached_attention(*arrays, jnp.asarray(positions), cache, platform)
    expected_k, expected_v = past.copy(), past.copy()
    for row, slot in enumerate([2, 0]):
        for i, at in enumerate(positions[row]):
            if at < 16:
                expected_k[slot, :, at], expected_v[slot, :, at] = k[row, i], v[row, i]
                for head in range(6):
                    seen = (x[slot, head // 3, None] for x in (expected_k, expected_v))
                    one = reference(q[row, None, i, head, None], *seen, np.array([[at + 1]]))
                    np.testing.assert_allclose(out[row, i, head], one[0, 0], atol=2e-5)
    new_keys = np.swapaxes(new.keys, 2, 3) if platform == "cpu" else new.keys
    np.testing.assert_allclose(new_keys, expected_k, atol=1e-6)
    np.testing.assert_allclose(new.values, expected_v, atol=1e-6)


def test_a_token_that_is_not_written_counts_no_further_than_the_cache(monkeypatch):
    """Kernels that read only what is seen must not be told to read beyond."""
    seen = []
    monkeypatch.setitem(FLAT, "turned", lambda q, k, v, counts: seen.append(counts) or q)
    one = jnp.ones((3, 1, 2, 4))
    cache = Cache(*(jnp.zeros(shape) for shape in cache_shapes("cpu", 3, 2, 16, 4)))
    cached_attention(one, one, one, jnp.array([[0], [15], [99]]), cache, "cpu")
    np.testing.assert_array_equal(seen[0][:, 0], [1, 1, 16, 16, 16, 16])


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN and Triton need a GPU")
def test_kernels_of_a_gpu():
    q, k, v = (RNG.normal(size=(8, n, 128)) for n in (6, 1024, 1024))
    counts = np.repeat(RNG.integers(1, 1025, (8, 1)), 6, axis=1)
    expected = reference(q, k, v, counts)
    for name in ("xla", "triton", "cudnn"):
        arrays = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
        out = np.asarray(jax.jit(FLAT[name])(*arrays, jnp.asarray(counts)), np.float32)
        np.testing.assert_allclose(out, expected, atol=0.05, err_msg=name)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN and Triton need a GPU")
def test_packed_kernels_of_a_gpu():
    cases = {"triton": [[300, 100, 80], [512]], "cudnn": [[480], [512]]}
    for name, rows in cases.items():
        segments = segments_of(rows, 512)
        q, k, v, d_out = (
            np.asarray(jnp.asarray(RNG.normal(size=(2, 512, n, 64)), jnp.bfloat16), np.float64)
            for n in (6, 2, 2, 6)
        )
        q = q / 8

        def run(*arrays, attend=PACKED[name], segments=segments):
            *inputs, d_out = (jnp.asarray(x, jnp.bfloat16) for x in arrays)
            out, backward = jax.vjp(lambda *x: attend(*x, jnp.asarray(segments)), *inputs)
            return out, *backward(d_out)

        expected = packed_reference(q, k, v, segments, d_out)
        for x, y in zip(jax.jit(run)(q, k, v, d_out), expected, strict=True):
            off = np.abs(np.asarray(x, np.float64) - y)[segments > 0].max()
            assert off / np.abs(y).max() < 0.02, name


@pytest.mark.parametrize("width", [64, 128])
def test_kernels_of_a_tpu_compile(width):
    """Ahead of time, for a TPU that need not be here; with the package libtpu only."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    device = jax.sharding.SingleDeviceSharding(topology.devices[0])

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=device)

    def gradients(q, k, v, segments):
        def total(*x):
            return kernels.packed_splash(*x, segments).astype(jnp.float32).sum()

        return jax.value_and_grad(total, argnums=(0, 1, 2))(q, k, v)

    rows = (array(2, 640, 6, width), *[array(2, 640, 2, width)] * 2)
    jax.jit(gradients).lower(*rows, array(2, 640, dtype=jnp.int32)).compile()
    cache = array(16, 1024, width)
    if flat_kernel("tpu", cache) == "paged":
        counts = array(16, 6, dtype=jnp.int32)
        jax.jit(attend_paged).lower(array(16, 6, width), cache, cache, counts).compile()
