"""The update: what is skipped, what memory it takes, and what rematerialisation changes."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gtpo_jax import parallel
from gtpo_jax.metrics import CompileCounter
from gtpo_jax.model import transformer
from gtpo_jax.model.config import REMAT, ModelConfig
from gtpo_jax.rl.losses import ppo_clip
from gtpo_jax.rl.packing import Segment, pack_segments
from gtpo_jax.rl.update import build, make_optimizer, start

CONFIG = ModelConfig(64, 32, 2, 4, 2, 8, 48, 64, qk_norm=True)


def batch(count=4, row=32, advantage=1.0, vocabulary=64):
    rng = np.random.default_rng(0)
    segments = []
    for i in range(count):
        n = int(rng.integers(row // 2, row))
        sampled = (np.arange(n) > 4).astype(np.float32)
        turns = np.where(sampled, 0, -1).astype(np.int32)
        tokens = rng.integers(0, vocabulary, n).astype(np.int32)
        advantages = advantage * rng.normal(size=n).astype(np.float32) * sampled
        segments.append(Segment((i,), tokens, turns, advantages, sampled / 50, 0 * sampled))
    return pack_segments(segments, row)


def made(config=CONFIG, optimizer=None, micro_rows=4, chunk=1024):
    optimizer = optimizer or optax.adam(1e-2)
    devices = parallel.make("mesh", 1)
    update = build(config, ppo_clip, optimizer, devices, micro_rows, chunk=chunk)
    return update, start(config, transformer.init(config, 0), optimizer, devices)


def scored(update, state, rows):
    micros = update.rows(rows)
    old = update.score(state.params, state.frozen, micros)
    return [m._replace(old_logprobs=x) for m, x in zip(micros, old, strict=True)]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_update_that_is_not_finite_changes_nothing_and_is_counted(bad):
    update, state = made(optimizer=make_optimizer("adamw", 1e-2, 10))
    good = scored(update, state, batch())
    advantages = np.array(good[0].advantages)
    advantages[0, 10] = bad
    broken = [good[0]._replace(advantages=advantages)]
    state, first = update.step(state, good)
    kept = jax.device_get(state)
    for i in (1, 2):
        state, metrics = update.step(state, broken)
        assert metrics["skipped"] == i and metrics["update_norm"] == 0
        assert not np.isfinite(metrics["loss"])
    after = jax.device_get(state)
    jax.tree.map(np.testing.assert_array_equal, kept[:4], after[:4])
    state, metrics = update.step(state, good)
    assert metrics["skipped"] == 0 and int(state.step) == 2
    assert metrics["update_norm"] > 0 and first["update_norm"] > 0
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), kept.params, state.params)
    assert max(jax.tree.leaves(moved)) > 0


def test_the_largest_ratio_is_over_all_micro_batches():
    update, state = made(micro_rows=1)
    micros = scored(update, state, batch())
    old = [np.array(m.old_logprobs) for m in micros]
    old[2][0, 8] -= np.log(7.0)  # so that pi / pi_old is 7 there, and 1 elsewhere
    micros = [m._replace(old_logprobs=x) for m, x in zip(micros, old, strict=True)]
    assert micros[2].turn_ids[0, 8] == 0
    _, metrics = update.step(state, micros)
    assert float(metrics["ratio_max"]) == pytest.approx(7.0, rel=1e-4)


def test_micro_batches_at_once_share_one_program_and_give_the_same_bits_every_time():
    update, state = made(micro_rows=1)
    micros = update.rows(batch(count=8))
    compiles = CompileCounter()
    update.score(state.params, state.frozen, micros)
    assert len(micros) > 2 and compiles.take() == 1
    micros = scored(update, state, batch(count=8))
    copies = [jax.tree.map(jnp.copy, state) for _ in range(4)]  # a step uses its state up
    first, *others = (jax.device_get(update.step(copy, micros)) for copy in copies)
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, first, other)


@pytest.mark.parametrize("unroll", [1, 2])
def test_what_is_computed_again_changes_no_gradient(unroll):
    gradients = {}
    for remat in REMAT:
        config = dataclasses.replace(CONFIG, remat=remat, unroll=unroll)
        update, state = made(config)
        gradients[remat] = update.programs["gradients"](
            state.params, state.frozen, scored(update, state, batch())[0]
        )[0]
    for remat in REMAT:
        for a, b in zip(
            *map(jax.tree.leaves, (gradients["none"], gradients[remat])), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def lowered(config, rows, row, chunk):
    update, state = made(config, micro_rows=rows, chunk=chunk)
    ints = jax.ShapeDtypeStruct((rows, row), jnp.int32)
    floats = jax.ShapeDtypeStruct((rows, row), jnp.float32)
    shapes = batch()._replace(
        **dict.fromkeys(("tokens", "positions", "segment_ids", "turn_ids", "loss_index"), ints),
        **dict.fromkeys(("advantages", "weights", "behaviour_logprobs"), floats),
        old_logprobs=floats,
        ref_logprobs=floats,
    )
    return update.programs["gradients"].lower(state.params, state.frozen, shapes).compile()


def test_no_array_holds_the_logits_of_all_tokens():
    """Rows x tokens x vocabulary would be 2 x 512 x 4096 numbers, a chunk is 64 x 4096."""
    config = dataclasses.replace(CONFIG, vocab_size=4096, max_length=2048, remat="full")
    program = lowered(config, 2, 512, 64)
    sizes = [
        int(np.prod([int(n) for n in shape.split(",")]))
        for shape in re.findall(r"f32\[([\d,]+)\]", program.as_text())
    ]
    assert max(sizes) >= 64 * 4096  # the chunk is there
    assert max(sizes) < 2 * 512 * 4096 / 4
    temporary = program.memory_analysis().temp_size_in_bytes
    assert temporary < 4 * 2 * 512 * 4096 / 2
    # Four times the vocabulary is four times the chunk's logits, not four times all logits.
    wide = lowered(dataclasses.replace(config, vocab_size=16384), 2, 512, 64)
    grown = wide.memory_analysis().temp_size_in_bytes - temporary
    assert grown < 4 * (16384 - 4096) * (64 * 4 + 4 * config.width)


def test_the_first_moment_can_be_kept_in_bfloat16():
    optimizer = make_optimizer("adamw", 1e-3, 10, state_dtype="bfloat16")
    _, state = made(optimizer=optimizer)
    moments = jax.tree.leaves(state.opt_state)
    kinds = [x.dtype.name for x in moments if x.ndim]
    assert (
        kinds.count("bfloat16") == kinds.count("float32") == len(jax.tree.leaves(state.params))
    )
