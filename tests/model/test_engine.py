"""The engine against one full forward pass over the same ids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gtpo_jax.errors import InputError
from gtpo_jax.metrics import CompileCounter
from gtpo_jax.model import sampling, transformer
from gtpo_jax.model.caches import per_layer
from gtpo_jax.model.config import ModelConfig
from gtpo_jax.model.engine import Engine, pieces

CONFIGS = {
    "grouped": ModelConfig(61, 32, 3, 4, 2, 8, 48, 96, rope_theta=500.0),
    "one_kv_head": ModelConfig(61, 24, 2, 3, 1, 8, 40, 96, qkv_bias=True),
    "qk_norm_untied": ModelConfig(
        61, 32, 2, 4, 4, 8, 48, 96, qk_norm=True, tie_embeddings=False
    ),
}


def make(name, slots=5, temperature=0.0, stop_ids=(), **options):
    config = CONFIGS[name]
    params = jax.tree.map(lambda x: x * 1.5, transformer.init(config, 3))
    how = sampling.Sampling(temperature)
    options = {"rows": (4,), "lengths": (16,), **options}
    engine = Engine(config, slots, 80, stop_ids, how, **options)
    engine.refresh(per_layer(config, params))
    return config, params, engine


def keys(count, seed=0):
    numbers = np.arange(count, dtype=np.uint32)
    return np.asarray(sampling.trajectory_keys(seed, 0, numbers, numbers))


def full(config, params, tokens):
    """log p(next token) after each prefix, by one forward pass. [T,V]"""
    return np.asarray(
        jax.nn.log_softmax(transformer.logits(config, params, jnp.array([tokens])))
    )[0]


def play(engine, rng, slots, turns=3):
    """Ragged conversations: prompts, then turns of decode and feedback. -> sampled places."""
    prompts = [rng.integers(0, 61, rng.integers(1, 14)).tolist() for _ in slots]
    engine.prefill(slots, prompts, keys(len(slots)))
    sampled = {s: [] for s in slots}
    for _ in range(turns):
        limits = rng.integers(1, 9, len(slots)).tolist()
        before = {s: len(engine.tokens[s]) for s in slots}
        for slot, (tokens, logprobs) in zip(
            slots, engine.decode(slots, 8, limits), strict=True
        ):
            sampled[slot] += list(zip(range(before[slot], 80), tokens, logprobs, strict=False))
        talking = [s for s in slots if rng.random() < 0.8]
        if talking:
            engine.append(
                talking, [rng.integers(0, 61, rng.integers(1, 7)).tolist() for _ in talking]
            )
    return sampled


@pytest.mark.parametrize("name", CONFIGS)
def test_multi_turn_greedy_equals_full_forward(name):
    config, params, engine = make(name, rows=(1, 2))
    rng = np.random.default_rng(1)
    for slot, sampled in play(engine, rng, [0, 2, 3, 4]).items():
        reference = full(config, params, engine.tokens[slot])
        assert len(sampled) >= 3
        for place, token, logprob in sampled:
            assert engine.tokens[slot][place] == token
            assert token == reference[place - 1].argmax()
            np.testing.assert_allclose(logprob, reference[place - 1, token], atol=1e-4)


def test_sampled_logprobs_are_of_the_tempered_distribution():
    config, params, engine = make("grouped", temperature=0.7)
    sampled = play(engine, np.random.default_rng(2), [0, 1, 2])
    for slot, places in sampled.items():
        logits = transformer.logits(config, params, jnp.array([engine.tokens[slot]]))[0]
        reference = np.asarray(jax.nn.log_softmax(logits / 0.7))
        for place, token, logprob in places:
            np.testing.assert_allclose(logprob, reference[place - 1, token], atol=1e-4)


def test_sampling_follows_the_distribution():
    logits = jnp.log(jnp.array([0.1, 0.2, 0.7]))
    count = 20000
    draw = jax.random.split(jax.random.key(0), count)
    tokens, logprobs = sampling.sample(jnp.tile(logits, (count, 1)), draw, sampling.Sampling())
    shares = np.bincount(np.asarray(tokens), minlength=3) / count
    # Standard error of a share is at most 0.0036.
    np.testing.assert_allclose(shares, [0.1, 0.2, 0.7], atol=0.015)
    np.testing.assert_allclose(logprobs, np.log([0.1, 0.2, 0.7])[np.asarray(tokens)], atol=1e-5)


def test_fork_continues_like_a_prefill_of_its_own():
    _, _, engine = make("grouped", temperature=1.0)
    prompt = list(range(1, 12))
    engine.prefill([0], [prompt], keys(1))
    engine.fork([0, 0], [1, 2], [11, 11], keys(3)[1:])
    forked = engine.decode([0, 1, 2], 8, [8, 8, 8])
    assert engine.prefilled == 10  # once for the group, and the last token is decode's
    _, _, alone = make("grouped", temperature=1.0)
    alone.prefill([0, 1, 2], [prompt] * 3, keys(3))
    for (a, la), (b, lb) in zip(forked, alone.decode([0, 1, 2], 8, [8, 8, 8]), strict=True):
        assert a == b
        np.testing.assert_allclose(la, lb, atol=1e-5)
    assert len({tuple(t) for t, _ in forked}) == 3  # keys differ, so members differ


def test_rewind_forgets_exactly():
    config, params, engine = make("grouped")
    engine.prefill([1], [[5, 6, 7]], keys(1))
    ((first, _),) = engine.decode([1], 8, [8])
    engine.rewind(1, 3 + 4)
    engine.append([1], [[9, 9, 10]])
    ((after, logprobs),) = engine.decode([1], 5, [5])
    history = [5, 6, 7, *first[:4], 9, 9, 10, *after]
    assert engine.tokens[1] == history
    reference = full(config, params, history)
    for place, (token, logprob) in enumerate(zip(after, logprobs, strict=True), start=10):
        np.testing.assert_allclose(logprob, reference[place - 1, token], atol=1e-4)


def test_draws_do_not_depend_on_slot_or_neighbours():
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, 61, n).tolist() for n in (4, 9, 2)]
    _, _, many = make("grouped", slots=5, temperature=1.0)
    many.prefill([0, 3, 4], prompts, keys(3))
    together = many.decode([0, 3, 4], 12, [12] * 3)
    _, _, one = make("grouped", slots=1, temperature=1.0)
    for i, prompt in enumerate(prompts):
        one.prefill([0], [prompt], keys(3)[i : i + 1])
        tokens, logprobs = one.decode([0], 12, [12])[0]
        assert tokens == together[i][0]
        np.testing.assert_allclose(logprobs, together[i][1], atol=1e-4)


def test_stops_at_stop_ids_and_at_its_own_limit():
    _, _, free = make("grouped", temperature=1.0)
    free.prefill([0, 1], [[3, 4], [5]], keys(2))
    longest = [t for t, _ in free.decode([0, 1], 16, [16, 16])]
    end = next(t for t in longest[0][5:] if t not in (*longest[0][:5], *longest[1][:3]))
    _, _, engine = make("grouped", temperature=1.0, stop_ids=(end,))
    engine.prefill([0, 1], [[3, 4], [5]], keys(2))
    # Back as soon as one has stopped, here at its limit; the other goes on where it was.
    first = [t for t, _ in engine.decode([0, 1], 16, [16, 3])]
    assert first == [longest[0][:3], longest[1][:3]] and engine.slot_steps == 2 * 3
    ((then, _),) = engine.decode([0], 16, [13])
    assert first[0] + then == longest[0][: longest[0].index(end) + 1]
    assert engine.slot_steps == 2 * 3 + 1 * len(then)  # a slot alone decodes alone


def test_never_past_the_context():
    _, _, engine = make("grouped")
    engine.prefill([0], [list(range(40))], keys(1))
    tokens, logprobs = engine.decode([0], 64, [64])[0]
    assert len(tokens) == len(logprobs) == 40
    assert engine.decode([0], 64, [64])[0] == ([], [])


def test_bad_input_is_named():
    _, _, engine = make("grouped")
    with pytest.raises(InputError, match="prompt of 80 tokens"):
        engine.prefill([0], [[1] * 80], keys(1))
    with pytest.raises(InputError, match="exceeds the model's context of 96"):
        Engine(CONFIGS["grouped"], 2, 97, ())
    with pytest.raises(InputError, match="width=1: at least 2"):
        Engine(CONFIGS["grouped"], 2, 80, (), width=1)
    engine.prefill([0], [[1] * 70], keys(1))
    with pytest.raises(ValueError, match="leave no room"):
        engine.append([0], [[2] * 10])
    with pytest.raises(ValueError, match="rewind to 71"):
        engine.rewind(0, 71)


def test_the_cache_is_as_long_as_it_has_to_be(monkeypatch):
    """Grown in the middle of a turn: the same tokens as in one length."""
    long = make("grouped", temperature=1.0)[2]
    monkeypatch.setattr("gtpo_jax.model.engine.SHORTEST", 8)
    engine = make("grouped", temperature=1.0)[2]
    assert engine.capacities == [8, 16, 32, 64, 80] and long.capacities == [80]
    seen = []

    def both(method, *arguments):
        ours, theirs = (getattr(e, method)(*arguments) for e in (engine, long))
        seen.append(engine._capacity)
        for (a, la), (b, lb) in zip(ours or (), theirs or (), strict=True):
            assert a == b
            np.testing.assert_allclose(la, lb, atol=1e-5)

    both("prefill", [0, 1], [[3, 4, 5], [6]], keys(2))
    both("decode", [0, 1], 4, [4, 4])
    both("fork", [0], [2], [3], keys(3)[2:])
    both("decode", [0, 1, 2], 8, [8, 8, 8])
    both("append", [1], [list(range(1, 30))])
    both("decode", [0, 1, 2], 8, [8, 8, 8])
    both("release", 1)
    both("fork", [0], [1], [3], keys(4)[3:])
    both("decode", [0, 1, 2], 4, [4, 4, 4])
    both("reset")
    both("prefill", [3], [[7, 8, 9]], keys(1))
    both("decode", [3], 4, [4])
    assert seen == [8, 8, 8, 16, 64, 64, 64, 64, 64, 0, 8, 8]


@pytest.mark.parametrize("width", [2, 3])
def test_parked_slots_say_what_they_would_say_in_the_batch(width):
    """Slots that change places, forks and feedback among them, in any width of the batch."""
    wide = make("one_kv_head", temperature=1.0)[2]
    engine = make("one_kv_head", temperature=1.0, width=width, rows=(1, 2))[2]
    rng = np.random.default_rng(7)
    for e in (wide, engine):
        e.prefill([0, 3], [[3, 4, 5], list(range(20))], keys(2))
        e.fork([0, 0, 3], [1, 4, 2], [3, 2, 17], keys(5)[2:])
    said = {s: ([], []) for s in range(5)}
    for turn in range(4):
        chosen = sorted(rng.choice(5, 3, replace=False).tolist())
        expected = wide.decode(chosen, 6, [6] * 3)
        left = {s: 6 for s in chosen}
        while left:
            slots = list(left)
            out = engine.decode(slots, 6, list(left.values()))
            assert sum(bool(tokens) for tokens, _ in out) == min(width, len(slots))
            for slot, (tokens, logprobs) in zip(slots, out, strict=True):
                said[slot][0].extend(tokens)
                said[slot][1].extend(logprobs)
                left[slot] -= len(tokens)
            left = {s: n for s, n in left.items() if n}
        for slot, (tokens, logprobs) in zip(chosen, expected, strict=True):
            assert said[slot][0] == tokens
            np.testing.assert_allclose(said[slot][1], logprobs, atol=1e-5)
            said[slot] = ([], [])
        talking = chosen[: 1 + turn % 3]
        for e in (wide, engine):
            e.append(talking, [[turn + 1, s, 9] for s in talking])
            e.rewind(chosen[-1], len(e.tokens[chosen[-1]]) - 1)
    assert engine.tokens == wide.tokens and engine.prefilled == wide.prefilled


def test_what_is_written_is_cut_into_few_shapes():
    assert pieces(100, (32, 128, 512)) == [128]
    assert pieces(140, (32, 128, 512)) == [128, 32]
    assert pieces(300, (32, 128, 512)) == [512]
    assert pieces(1300, (32, 128, 512)) == [512, 512, 512]
    assert pieces(3, (1, 4, 16)) == [4] and pieces(5, (1, 4, 16)) == [4, 1]
    assert pieces(0, (1, 4)) == [] and pieces(1, (32,)) == [32]


def test_after_the_warm_up_nothing_compiles():
    compiles = CompileCounter()
    engine = make("qk_norm_untied", slots=6, width=4, temperature=0.9)[2]
    assert "programs" in engine.warm_up(8)
    assert compiles.take() > 0
    keys(6), keys(1)
    compiles.take()
    for seed in range(4):
        play(engine, np.random.default_rng(seed), list(range(6)))
        engine.fork([0], [3], [1], keys(1))
        engine.decode([0, 3], 8, [8, 8])
        engine.reset()
    assert compiles.take() == 0


def test_a_cache_of_bfloat16_is_near_one_of_float32():
    config, params, engine = make("grouped", cache_dtype="bfloat16")
    engine.prefill([0], [list(range(30))], keys(1))
    ((tokens, logprobs),) = engine.decode([0], 16, [16])
    reference = full(config, params, engine.tokens[0])
    for place, token, logprob in zip(range(30, 46), tokens, logprobs, strict=True):
        np.testing.assert_allclose(logprob, reference[place - 1, token], atol=0.1)
    assert engine._batch[0][0].dtype == jnp.bfloat16
