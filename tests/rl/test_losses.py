"""Losses against numbers worked out by hand, and their gradients against float64 central
differences of a separate NumPy implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gtpo_jax.rl.losses import LOSSES, LossInputs

NAMES = ("ppo_clip", "gspo", "gspo_token")
CLIP = {"ppo_clip": (0.2, 0.28), "gspo": (3e-4, 4e-4), "gspo_token": (3e-4, 4e-4)}

both = pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
every_loss = pytest.mark.parametrize("name", NAMES)


def f32(x):
    return np.asarray(x, np.float32)


def one_row(ratios, advantages, sampled=None, segments=None, ref=None, behaviour=None):
    """Inputs of one row in which old logprobs are -1 and pi/pi_old is `ratios`."""
    t = len(ratios)
    old = np.full((1, t), -1.0)
    sampled = np.ones(t, bool) if sampled is None else np.asarray(sampled, bool)
    return LossInputs(
        logprobs=f32(old + np.log([ratios])),
        old_logprobs=f32(old),
        behaviour_logprobs=f32(old if behaviour is None else [behaviour]),
        ref_logprobs=None if ref is None else f32([ref]),
        advantages=f32([advantages]),
        weights=f32(sampled[None] / max(sampled.sum(), 1)),
        turn_ids=np.where(sampled, 0, -1).astype(np.int32)[None],
        segment_ids=np.asarray([[1] * t if segments is None else segments], np.int32),
    )


ROWS, TOKENS = 2, 16  # every call is padded to this shape, so that little is compiled


def padded(inputs):
    def pad(x, fill):
        sizes = zip((ROWS, TOKENS), x.shape, strict=True)
        return np.pad(x, [(0, size - n) for size, n in sizes], constant_values=fill)

    return LossInputs(
        *(
            None if x is None else pad(x, -1 if field == "turn_ids" else 0)
            for field, x in inputs._asdict().items()
        )
    )


def weighted_sum(name, options, wrt, x, inputs):
    loss, _ = LOSSES[name](inputs._replace(**{wrt: x}), **dict(options))
    return jnp.sum(inputs.weights * loss), loss


@functools.cache
def function_of(name, options, wrt, jit):
    """x, inputs -> gradient, per-token loss."""
    function = functools.partial(weighted_sum, name, options, wrt)
    grad = jax.grad(function, has_aux=True)
    return jax.jit(grad) if jit else grad


def gradient_and_loss(name, inputs, jit, wrt, options):
    whole = padded(inputs)
    function = function_of(name, tuple(options.items()), wrt, jit)
    out = function(jnp.asarray(getattr(whole, wrt)), whole)
    rows, tokens = inputs.logprobs.shape
    for array in out:
        assert array.shape == (ROWS, TOKENS)
        assert not np.any(array[rows:]) and not np.any(array[:, tokens:])
    return [np.asarray(array)[:rows, :tokens] for array in out]


def per_token(name, inputs, jit=True, **options):
    return gradient_and_loss(name, inputs, jit, "logprobs", options)[1]


def gradient(name, inputs, jit=True, wrt="logprobs", **options):
    """d sum(weights * per_token_loss) / d wrt, the loss the device computes."""
    return gradient_and_loss(name, inputs, jit, wrt, options)[0]


# --- the reference -------------------------------------------------------------------------


def ref_loss(
    name,
    inputs,
    lp,
    frozen,
    clip_low=None,
    clip_high=None,
    dual_clip=None,
    kl_coef=0.0,
    tis_cap=None,
):
    """Per-token loss in float64, token by token. `frozen` are the logprobs under sg[]."""
    low, high = CLIP[name]
    low = low if clip_low is None else clip_low
    high = high if clip_high is None else clip_high
    old, behaviour = (
        np.asarray(x, float) for x in (inputs.old_logprobs, inputs.behaviour_logprobs)
    )
    out = np.zeros(lp.shape)
    for r, t in np.argwhere(np.asarray(inputs.turn_ids) != -1):
        mates = (inputs.segment_ids[r] == inputs.segment_ids[r, t]) & (inputs.turn_ids[r] != -1)
        if name == "ppo_clip":
            w = np.exp(lp[r, t] - old[r, t])
        elif name == "gspo":
            w = np.exp(np.mean(lp[r, mates] - old[r, mates]))
        else:
            w = np.exp(np.mean(frozen[r, mates] - old[r, mates]))
            w *= np.exp(lp[r, t] - frozen[r, t])
        a = float(inputs.advantages[r, t])
        surrogate = min(w * a, min(max(w, 1 - low), 1 + high) * a)
        if dual_clip is not None and a < 0:
            surrogate = max(surrogate, dual_clip * a)
        if tis_cap is not None:
            surrogate *= min(np.exp(old[r, t] - behaviour[r, t]), tis_cap)
        out[r, t] = -surrogate
        if kl_coef:
            d = float(inputs.ref_logprobs[r, t]) - lp[r, t]
            out[r, t] += kl_coef * (np.exp(d) - d - 1)
    return out


def ref_gradient(name, inputs, h=1e-6, **options):
    """Central differences of the weighted sum."""
    lp = np.asarray(inputs.logprobs, float)
    weights = np.asarray(inputs.weights, float)
    grad = np.zeros(lp.shape)
    for cell in np.ndindex(*lp.shape):
        step = np.zeros(lp.shape)
        step[cell] = h
        up, down = (ref_loss(name, inputs, lp + s * step, lp, **options) for s in (1, -1))
        grad[cell] = (weights * (up - down)).sum() / (2 * h)
    return grad


def random_inputs(seed, rows=2, tokens=16, width=0.5):
    """Packed rows: per row two segments and padding; prompt, turn, feedback, turn in each."""
    rng = np.random.default_rng(seed)
    segments = np.zeros((rows, tokens), np.int32)
    turns = np.full((rows, tokens), -1, np.int32)
    advantages = np.zeros((rows, tokens))
    for r in range(rows):
        at = 0
        for segment in (1, 2):
            prompt, first, feedback, second = rng.integers(1, 3, 4)
            end = at + prompt + first + feedback + second
            segments[r, at:end] = segment
            turns[r, at + prompt : at + prompt + first] = 0
            turns[r, end - second : end] = 1
            for turn in (0, 1):
                here = (segments[r] == segment) & (turns[r] == turn)
                advantages[r, here] = rng.normal()
            at = end
    sampled = turns != -1
    old = -rng.uniform(0.1, 3, (rows, tokens))
    return LossInputs(
        logprobs=f32(old + width * rng.normal(size=old.shape)),
        old_logprobs=f32(old),
        behaviour_logprobs=f32(old + 0.3 * rng.normal(size=old.shape)),
        ref_logprobs=f32(old + 0.3 * rng.normal(size=old.shape)),
        advantages=f32(advantages),
        weights=f32(rng.uniform(0.1, 1, (rows, tokens)) * sampled),
        turn_ids=turns,
        segment_ids=segments,
    )


# --- golden --------------------------------------------------------------------------------

# Ratios below, inside and above 0.8 .. 1.28, each with an advantage of either sign.
RATIOS = [0.5, 0.5, 0.9, 0.9, 2.0, 2.0]
SIGNS = [1.0, -1.0, 1.0, -1.0, 1.0, -1.0]


@both
def test_ppo_clip_golden(jit):
    # A=+1: min(w, clip w) = 0.5 0.9 1.28;  A=-1: min(-w, -clip w) = -0.8 -0.9 -2
    got = per_token("ppo_clip", one_row(RATIOS, SIGNS), jit)
    np.testing.assert_allclose(got, [[-0.5, 0.8, -0.9, 0.9, -1.28, 2.0]], rtol=1e-5)


@both
def test_ppo_clip_gradient_golden(jit):
    # -w A / 6 where the unclipped term is the smaller, 0 where the clip decides
    got = gradient("ppo_clip", one_row(RATIOS, SIGNS), jit)
    want = np.array([[-0.5, 0, -0.9, 0.9, 0, 2.0]]) / 6
    np.testing.assert_allclose(got, want, rtol=1e-5)


@both
def test_own_clip_range(jit):
    got = per_token("ppo_clip", one_row(RATIOS, SIGNS), jit, clip_low=0.4, clip_high=0.5)
    np.testing.assert_allclose(got, [[-0.5, 0.6, -0.9, 0.9, -1.5, 2.0]], rtol=1e-5)


@both
def test_dual_clip_golden(jit):
    # A=-2, ratios 2, 4 and 0.5, c=3: -4 stays; -8 -> -6; min(-1, -1.6) = -1.6 stays.
    # A=+2, ratio 4: min(8, 2.56), untouched by c.
    inputs = one_row([2, 4, 0.5, 4], [-2, -2, -2, 2])
    got = per_token("ppo_clip", inputs, jit, dual_clip=3.0)
    np.testing.assert_allclose(got, [[4.0, 6.0, 1.6, -2.56]], rtol=1e-5)
    got = gradient("ppo_clip", inputs, jit, dual_clip=3.0)
    np.testing.assert_allclose(got, [[1.0, 0, 0, 0]], rtol=1e-5)


@both
def test_kl_golden(jit):
    # lp = -1 (ratio 1), A = 2.  ref - lp = 0.5, 0, -1:
    # k3 = e^.5 - .5 - 1 = 0.1487213;  0;  e^-1 + 1 - 1 = 0.3678794
    inputs = one_row([1, 1, 1], [2, 2, 2], ref=[-0.5, -1, -2])
    got = per_token("ppo_clip", inputs, jit, kl_coef=0.1)
    np.testing.assert_allclose(got, [[-1.9851279, -2.0, -1.9632121]], rtol=1e-5)
    # d k3 / d lp = 1 - e^(ref-lp) = -0.6487213, 0, 0.6321206, on top of -A
    got = gradient("ppo_clip", inputs, jit, kl_coef=0.1) * 3
    np.testing.assert_allclose(got, [[-2.0648721, -2.0, -1.9367879]], rtol=1e-5)


@both
def test_tis_golden(jit):
    # old - behaviour = ln 0.5, 0, ln 4; cap 2: the surrogate (A = -1, w = 1.1) times .5 1 2
    behaviour = -1 - np.log([0.5, 1, 4])
    inputs = one_row([1.1] * 3, [-1] * 3, behaviour=behaviour, ref=[-1 + np.log(1.1)] * 3)
    got = per_token("ppo_clip", inputs, jit, tis_cap=2.0)
    np.testing.assert_allclose(got, [[0.55, 1.1, 2.2]], rtol=1e-5)
    assert not np.any(gradient("ppo_clip", inputs, jit, "behaviour_logprobs", tis_cap=2.0))
    np.testing.assert_allclose(
        gradient("ppo_clip", inputs, jit, tis_cap=2.0) * 3, [[0.55, 1.1, 2.2]], rtol=1e-5
    )
    # the KL term is not part of the surrogate: ref - lp = 1 everywhere, k3 = e - 2
    inputs = inputs._replace(ref_logprobs=inputs.logprobs + 1)
    got = per_token("ppo_clip", inputs, jit, tis_cap=2.0, kl_coef=0.5)
    np.testing.assert_allclose(got, [[0.9091409, 1.4591409, 2.5591409]], rtol=1e-5)


@every_loss
def test_without_tis_the_sampler_does_not_enter(name):
    inputs = random_inputs(0)
    other = inputs._replace(behaviour_logprobs=inputs.behaviour_logprobs * 3 - 1)
    np.testing.assert_array_equal(per_token(name, inputs), per_token(name, other))
    np.testing.assert_array_equal(gradient(name, inputs), gradient(name, other))


# Segment 1: sampled ratios 2 and 8 around a tool's token; segment 2: a single 0.5; padding.
SEQUENCE = one_row(
    ratios=[9, 2, 9, 8, 9, 0.5, 9],
    advantages=[0, 1, 0, -1, 0, -2, 0],
    sampled=[0, 1, 0, 1, 0, 1, 0],
    segments=[1, 1, 1, 1, 2, 2, 0],
)


@both
@pytest.mark.parametrize("name", ["gspo", "gspo_token"])
def test_gspo_golden(jit, name):
    # s_1 = exp((ln 2 + ln 8)/2) = 4, s_2 = 0.5.  A=+1: min(4, 1.0004); A=-1: min(-4, -1.0004);
    # A=-2: min(-1, -2 * 0.9997)
    got = per_token(name, SEQUENCE, jit)
    np.testing.assert_allclose(got, [[0, -1.0004, 0, 4, 0, 1.9994, 0]], rtol=1e-5)
    # no clip within 0.9 .. 5: A s
    got = per_token(name, SEQUENCE, jit, clip_low=0.9, clip_high=4.0)
    np.testing.assert_allclose(got, [[0, -4, 0, 4, 0, 1, 0]], rtol=1e-5)
    got = per_token(name, SEQUENCE, jit, clip_low=0.9, clip_high=4.0, dual_clip=1.5)
    np.testing.assert_allclose(got, [[0, -4, 0, 1.5, 0, 1, 0]], rtol=1e-5)


@both
def test_gspo_and_its_token_form_differ_in_the_gradient(jit):
    # Weights 1/3. gspo: d s_1/d lp = s_1/2 on both tokens. With the default clip only the token
    # with A=-1 is unclipped: 4/2 on each of the two tokens. Token form: all of it on its own.
    got = gradient("gspo", SEQUENCE, jit) * 3
    np.testing.assert_allclose(got, [[0, 2, 0, 2, 0, 0, 0]], rtol=1e-5)
    got = gradient("gspo_token", SEQUENCE, jit) * 3
    np.testing.assert_allclose(got, [[0, 0, 0, 4, 0, 0, 0]], rtol=1e-5)
    # unclipped, the +1 and the -1 cancel over the sequence but not per token
    wide = {"clip_low": 0.9, "clip_high": 4.0}
    got = gradient("gspo", SEQUENCE, jit, **wide) * 3
    np.testing.assert_allclose(got, [[0, 0, 0, 0, 0, 1, 0]], atol=1e-5)
    got = gradient("gspo_token", SEQUENCE, jit, **wide) * 3
    np.testing.assert_allclose(got, [[0, -4, 0, 4, 0, 1, 0]], rtol=1e-5)


@both
def test_gspo_segments_of_different_rows_are_strangers(jit):
    # segment 1 in both rows: s = 2 and 0.5
    rows = [one_row([r, r], [1, 1]) for r in (2.0, 0.5)]
    inputs = LossInputs(
        *(
            None if parts[0] is None else np.concatenate(parts)
            for parts in zip(*rows, strict=True)
        )
    )
    got = per_token("gspo", inputs, jit, clip_low=0.9, clip_high=4.0)
    np.testing.assert_allclose(got, [[-2, -2], [-0.5, -0.5]], rtol=1e-5)


@every_loss
def test_on_policy_the_loss_is_minus_the_advantage(name):
    inputs = random_inputs(3)
    inputs = inputs._replace(logprobs=inputs.old_logprobs)
    sampled = inputs.turn_ids != -1
    got = per_token(name, inputs)
    np.testing.assert_allclose(got, np.where(sampled, -inputs.advantages, 0), rtol=1e-6)


# --- against the reference -----------------------------------------------------------------

OPTIONS = [
    {},
    {"dual_clip": 1.2},
    {"kl_coef": 0.2},
    {"tis_cap": 1.1},
    {"clip_low": 0.1, "clip_high": 0.15, "dual_clip": 1.1, "kl_coef": 0.05, "tis_cap": 0.9},
]


@every_loss
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(o) or "defaults")
def test_value_and_gradient_match_the_reference(name, options):
    for seed in range(3):
        inputs = random_inputs(seed)
        lp = np.asarray(inputs.logprobs, float)
        want = ref_loss(name, inputs, lp, lp, **options)
        want_grad = ref_gradient(name, inputs, **options)
        assert np.abs(want_grad).max() > 1e-2  # else it proves nothing
        for jit in (False, True):
            got = per_token(name, inputs, jit, **options)
            np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)
            got = gradient(name, inputs, jit, **options)
            np.testing.assert_allclose(got, want_grad, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", ["gspo", "gspo_token"])
def test_gspo_gradient_inside_its_narrow_clip(name):
    """With its own default range the ratio has to be within 1e-4 of 1 to be unclipped."""
    inputs = random_inputs(5, width=1e-4)
    got, want = gradient(name, inputs), ref_gradient(name, inputs)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-6)
    assert np.abs(want).max() > 1e-2


# --- what is not the policy's --------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("options", [{}, OPTIONS[-1]], ids=["defaults", "everything"])
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_masked_tokens_get_exactly_zero(name, options, jit):
    """Whatever stands on prompt, feedback and padding: loss 0, gradient 0, and no trace of it
    in the other tokens."""
    inputs = random_inputs(1)
    masked = inputs.turn_ids == -1
    loud = inputs._replace(
        logprobs=f32(np.where(masked, 500, inputs.logprobs)),  # exp overflows
        old_logprobs=f32(np.where(masked, -500, inputs.old_logprobs)),
        behaviour_logprobs=f32(np.where(masked, -2000, inputs.behaviour_logprobs)),
        ref_logprobs=f32(np.where(masked, 2000, inputs.ref_logprobs)),
        advantages=f32(np.where(masked, -7, inputs.advantages)),
        weights=f32(np.where(masked, 1, inputs.weights)),
    )
    loss, loss_loud = (per_token(name, x, jit, **options) for x in (inputs, loud))
    grad, grad_loud = (gradient(name, x, jit, **options) for x in (inputs, loud))
    for array in (loss, loss_loud, grad, grad_loud):
        assert np.all(array[masked] == 0)
    np.testing.assert_array_equal(loss, loss_loud)
    np.testing.assert_array_equal(grad, grad_loud)


@every_loss
@both
def test_a_row_of_padding(name, jit):
    inputs = one_row([1, 1], [0, 0], sampled=[0, 0], segments=[0, 0], ref=[-1, -1])
    assert np.all(per_token(name, inputs, jit, kl_coef=0.1, tis_cap=2.0) == 0)
    assert np.all(gradient(name, inputs, jit, kl_coef=0.1, tis_cap=2.0) == 0)


@every_loss
def test_the_loss_alone_at_its_own_shape(name):
    """Without padding and without a gradient."""
    inputs = random_inputs(4)
    inputs = LossInputs(*(x[:1, :11] for x in inputs))
    got, _ = LOSSES[name](inputs)
    lp = np.asarray(inputs.logprobs, float)
    assert got.shape == (1, 11)
    np.testing.assert_allclose(got, ref_loss(name, inputs, lp, lp), rtol=2e-5, atol=2e-6)


@every_loss
def test_metrics_are_arrays_per_token(name):
    inputs = random_inputs(2)
    for options in ({}, OPTIONS[-1]):
        _, metrics = LOSSES[name](inputs, **options)
        for key, value in metrics.items():
            assert value.shape == inputs.logprobs.shape, key
            assert np.all(np.isfinite(np.asarray(value, float))), key


@every_loss
def test_no_reference_is_needed_without_kl(name):
    inputs = random_inputs(2)
    bare = inputs._replace(ref_logprobs=None)
    np.testing.assert_array_equal(per_token(name, inputs), per_token(name, bare))
