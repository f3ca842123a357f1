"""Adapters: what they compute, what is trained, and what merging them gives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gtpo_jax import parallel
from gtpo_jax.errors import InputError
from gtpo_jax.model import lora, sampling, transformer
from gtpo_jax.model.caches import per_layer
from gtpo_jax.model.config import MATRICES, ModelConfig
from gtpo_jax.model.engine import Engine
from gtpo_jax.model.sampling import Sampling
from gtpo_jax.rl.losses import ppo_clip
from gtpo_jax.rl.packing import Segment, pack_segments
from gtpo_jax.rl.update import build, start

PLAIN = ModelConfig(60, 32, 2, 4, 2, 8, 48, 64, qkv_bias=True)
CONFIG = dataclasses.replace(PLAIN, lora_rank=3, lora_alpha=6.0, lora_targets=("q", "o", "up"))
TOKENS = jnp.array([[3, 1, 4, 1, 5, 9, 2, 6]])


def params_with_adapters(seed=0):
    """Adapters whose B is not 0 any more."""
    params = transformer.init(CONFIG, seed)
    rng = np.random.default_rng(seed)

    def moved(path, x):
        name = jax.tree_util.keystr(path)
        return rng.normal(0, 0.1, x.shape).astype(np.float32) if "lora_b" in name else x

    return jax.tree_util.tree_map_with_path(moved, params)


def plain(params):
    """The same tree without adapters."""
    return lora.split(CONFIG, params)[1]


def test_an_adapter_begins_as_nothing():
    params = transformer.init(CONFIG, 0)
    np.testing.assert_array_equal(
        transformer.logits(CONFIG, params, TOKENS),
        transformer.logits(PLAIN, plain(params), TOKENS),
    )


def test_adapted_is_the_plain_model_with_w_plus_ab():
    params = params_with_adapters()
    by_hand = jax.tree.map(np.asarray, plain(params))
    for name in CONFIG.lora_targets:
        a, b = (np.asarray(params["layers"][name][x], np.float64) for x in lora.NAMES)
        kernel = by_hand["layers"][name]["kernel"]
        by_hand["layers"][name]["kernel"] = (kernel + 2.0 * (a @ b)).astype(np.float32)
    expected = transformer.logits(PLAIN, by_hand, TOKENS)
    assert np.abs(expected - transformer.logits(PLAIN, plain(params), TOKENS)).max() > 0.01
    np.testing.assert_allclose(
        transformer.logits(CONFIG, params, TOKENS), expected, rtol=1e-5, atol=1e-5
    )
    merged = lora.merged(CONFIG, params)
    assert jax.tree.structure(merged) == jax.tree.structure(plain(params))
    np.testing.assert_allclose(
        transformer.logits(PLAIN, merged, TOKENS), expected, rtol=1e-5, atol=1e-5
    )


def test_split_and_join_are_each_others_undoing():
    params = transformer.init(CONFIG, 0)
    trained, frozen = lora.split(CONFIG, params)
    names = {jax.tree_util.keystr(p, simple=True, separator="/")
             for p, _ in jax.tree_util.tree_leaves_with_path(trained)}  # fmt: skip
    assert names == {f"layers/{n}/{x}" for n in CONFIG.lora_targets for x in lora.NAMES}
    joined = lora.join(trained, frozen)
    jax.tree.map(np.testing.assert_array_equal, joined, params)
    assert lora.split(PLAIN, params) == (params, {})


def test_only_adapters_are_trained_and_in_float32():
    config = dataclasses.replace(CONFIG, dtype="bfloat16", param_dtype="bfloat16")
    tokens = np.arange(20, dtype=np.int32)
    sampled = np.array([0.0] * 5 + [1.0] * 15, np.float32)
    turns = np.where(sampled, 0, -1).astype(np.int32)
    segment = Segment((0,), tokens, turns, sampled, sampled / 15, 0 * sampled)
    devices = parallel.make("mesh", 1)
    optimizer = optax.adam(1e-2)
    update = build(config, ppo_clip, optimizer, devices, 1)
    state = start(config, transformer.init(config, 0), optimizer, devices)
    assert {x.dtype.name for x in jax.tree.leaves(state.params)} == {"float32"}
    assert {x.dtype.name for x in jax.tree.leaves(state.frozen)} == {"bfloat16"}
    moments = sum(x.size for x in jax.tree.leaves(state.opt_state))
    assert moments == 2 * sum(x.size for x in jax.tree.leaves(state.params)) + 1
    frozen, before = jax.device_get(state.frozen), jax.device_get(state.params)
    micros = update.rows(pack_segments([segment], 24))
    old = update.score(state.params, state.frozen, micros)
    micros = [micros[0]._replace(old_logprobs=old[0])]
    for _ in range(3):
        state, metrics = update.step(state, micros)
    jax.tree.map(np.testing.assert_array_equal, frozen, jax.device_get(state.frozen))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, jax.device_get(state.params))
    assert min(jax.tree.leaves(moved)) > 0
    assert metrics["ratio"] > 1  # advantages are 1: what was sampled is likelier now


def test_the_engine_decodes_with_adapters_unmerged():
    params = params_with_adapters()
    engine = Engine(CONFIG, 1, 40, (), Sampling(0.0), rows=(1,), lengths=(16,))
    engine.refresh(per_layer(CONFIG, params))
    keys = np.asarray(
        sampling.trajectory_keys(0, 0, np.zeros(1, np.uint32), np.zeros(1, np.uint32))
    )
    engine.prefill([0], [[3, 1, 4]], keys)
    tokens, _ = engine.decode([0], 12, [12])[0]
    logits = transformer.logits(CONFIG, params, jnp.array([engine.tokens[0]]))[0]
    assert tokens == np.argmax(logits[2:-1], axis=-1).tolist()


def test_a_matrix_that_there_is_not_is_refused():
    with pytest.raises(InputError, match=f"'query': one of {', '.join(MATRICES)}"):
        dataclasses.replace(CONFIG, lora_targets=("query",))
