"""Advantages against numbers worked out by hand and a plain float64 NumPy reference."""

import functools

import jax
import numpy as np
import pytest

from gtpo_jax.errors import InputError
from gtpo_jax.rl.advantages import (
    ADVANTAGES,
    discounted_returns,
    equal_groups,
    normalize,
)
from gtpo_jax.rl.types import Rewards

SCOPES = ("group", "batch", "turn", "group_trajectory")
NAMES = ("gtpo", "grpo", "grpo_outcome", "grpo_sum", "dr_grpo", "rloo", "mt_grpo", "irc")

both = pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])


N, K = 14, 5  # every call is padded to this shape, so that little is compiled


@functools.cache
def compiled(function, options):
    return jax.jit(functools.partial(function, **dict(options)))


def call(function, values, mask, *groups, jit, **options):
    """`function` on arrays padded with trajectories without turns, traced as a whole where
    `jit`; the result without the padding."""

    def pad(x):
        sizes = (N, K)[: x.ndim]
        return np.pad(x, [(0, size - n) for size, n in zip(sizes, x.shape, strict=True)])

    if jit:
        function, options = compiled(function, tuple(options.items())), {}
    out = np.asarray(function(*jax.tree.map(pad, (values, mask, *groups)), **options))
    assert out.shape == (N, K)[: out.ndim]
    assert out.ndim == 1 or not np.any(out[len(mask) :])
    return out[: len(mask)] if out.ndim == 1 else out[: len(mask), : mask.shape[1]]


def f32(x):
    return np.asarray(x, np.float32)


def ragged(lengths, turns):
    """Mask [N,K] of trajectories with these numbers of turns."""
    return np.arange(turns)[None, :] < np.asarray(lengths)[:, None]


def rewards_of(turn, outcome=None, format_ok=None):
    turn = f32(turn)
    ones = np.ones(len(turn), np.float32)
    return Rewards(
        turn,
        ones if outcome is None else f32(outcome),
        ones if format_ok is None else f32(format_ok),
    )


# --- the reference: float64, one Python loop per set ---------------------------------------


def ref_returns(rewards, mask, gamma):
    out = np.zeros(mask.shape)
    for i, j in np.argwhere(mask):
        later = [m for m in range(j, mask.shape[1]) if mask[i, m]]
        out[i, j] = sum(gamma ** (m - j) * float(rewards[i, m]) for m in later)
    return out


def ref_set(values, weights, scale, eps):
    """Normalise one set; `weights` need not sum to 1."""
    values, weights = np.asarray(values, float), np.asarray(weights, float)
    if len(values) < 2 or values.max() - values.min() <= 1e-6:
        return np.zeros(len(values))
    weights = weights / weights.sum()
    mean = (weights * values).sum()
    std = np.sqrt((weights * (values - mean) ** 2).sum())
    return (values - mean) / (std + eps) if scale else values - mean


def ref_normalize(returns, mask, groups, scope, scale=True, eps=1e-6):
    sets = {}
    for i, j in np.argwhere(mask):
        key = {"batch": 0, "turn": (groups[i], j)}.get(scope, groups[i])
        sets.setdefault(key, []).append((i, j))
    out = np.zeros(mask.shape)
    for cells in sets.values():
        values = [returns[c] for c in cells]
        lengths = mask.sum(axis=1)
        weights = [1 / lengths[i] if scope == "group_trajectory" else 1.0 for i, _ in cells]
        for cell, a in zip(cells, ref_set(values, weights, scale, eps), strict=True):
            out[cell] = a
    return out


def ref_trajectory(reward, mask, groups, scale=True):
    """One advantage per trajectory -> [N], 0 for trajectories without any turn."""
    out, present = np.zeros(len(mask)), mask.any(axis=1)
    for g in set(groups[present]):
        members = np.flatnonzero(present & (groups == g))
        out[members] = ref_set(reward[members], np.ones(len(members)), scale, 1e-6)
    return out


def ref_advantage(name, rewards, mask, groups, **options):
    turn, outcome, format_ok = (np.asarray(x, float) for x in rewards)
    turn = np.where(mask, turn, 0.0)
    present, last = mask.any(axis=1), mask.sum(axis=1) - 1
    if name in ("gtpo", "irc"):
        returns = ref_returns(turn, mask, options.get("gamma", 0.9))
        a = ref_normalize(
            returns, mask, groups, options.get("scope", "group"), options.get("scale", True)
        )
        if name == "irc":
            lam = options.get("lam", 0.3)
            a = a + lam * ref_trajectory(outcome, mask, groups)[:, None]
        elif options.get("drop_equal_groups", True):
            for g in set(groups[present]):
                sums = turn.sum(axis=1)[present & (groups == g)]
                if sums.max() - sums.min() <= 1e-6:
                    a[groups == g] = 0
    elif name == "mt_grpo":
        before_last = np.arange(mask.shape[1])[None, :] < last[:, None]
        turn_reward = (turn * before_last).sum(axis=1)
        a = ref_trajectory(outcome, mask, groups)[:, None] + before_last * (
            options.get("lam", 1.0) * ref_trajectory(turn_reward, mask, groups)[:, None]
        )
    elif name == "rloo":
        a = np.zeros(mask.shape)
        for i in np.flatnonzero(present):
            others = [k for k in np.flatnonzero(present & (groups == groups[i])) if k != i]
            if others:
                a[i] = outcome[i] - outcome[others].mean()
    elif name == "dr_grpo":
        a = ref_trajectory(outcome, mask, groups, scale=False)[:, None] * np.ones(mask.shape)
    else:
        reward = {
            "grpo": np.minimum(outcome, format_ok),
            "grpo_outcome": outcome,
            "grpo_sum": turn.sum(axis=1),
        }[name]
        scale = options.get("scale", True)
        a = ref_trajectory(reward, mask, groups, scale)[:, None] * np.ones(mask.shape)
    return np.where(mask, a, 0.0)


def random_batch(seed, n=N, turns=K, n_groups=4):
    """Ragged, interleaved groups; one group of one, one without spread, some rows out."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, turns + 1, n)
    groups = rng.integers(0, n_groups, n).astype(np.int32)
    groups[3] = n_groups  # a group of one
    groups[[5, 8]] = n_groups + 1  # two members with the same rewards
    lengths[8] = lengths[5]
    lengths[[1, 10]] = 0  # out
    mask = ragged(lengths, turns)
    outcome = rng.integers(0, 2, n).astype(np.float32)
    turn = -0.1 * rng.integers(0, 2, (n, turns)) * mask
    for i in np.flatnonzero(lengths):
        turn[i, lengths[i] - 1] += outcome[i] if outcome[i] else rng.uniform(0, 0.5)
    turn[8], outcome[8] = turn[5], outcome[5]
    format_ok = (turn >= -1e-9).all(axis=1)
    return Rewards(f32(turn), outcome, f32(format_ok)), mask, groups


# --- returns -------------------------------------------------------------------------------


@both
def test_returns_golden(jit):
    rewards = f32([[0, 0, 1], [-0.1, 0, 0], [0, -0.1, 0.5]])
    mask = ragged([3, 2, 3], 3)
    # 0.9^2 = 0.81;  third row: 0.5*0.9 - 0.1 = 0.35 and 0.35*0.9 = 0.315
    want = [[0.81, 0.9, 1.0], [-0.1, 0.0, 0.0], [0.315, 0.35, 0.5]]
    got = call(discounted_returns, rewards, mask, jit=jit, gamma=0.9)
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert got.shape == (3, 3)


@both
@pytest.mark.parametrize(
    "gamma, want", [(1.0, [0.4, 0.5, 0.5]), (0.0, [-0.1, 0.0, 0.5]), (0.5, [0.025, 0.25, 0.5])]
)
def test_returns_of_other_gammas(jit, gamma, want):
    got = call(discounted_returns, f32([[-0.1, 0, 0.5]]), ragged([3], 3), jit=jit, gamma=gamma)
    np.testing.assert_allclose(got, [want], atol=1e-6)


@both
def test_returns_do_not_see_what_is_off_the_mask(jit):
    rewards = f32([[1, 7, 7], [7, 7, 7]])
    got = call(discounted_returns, rewards, ragged([1, 0], 3), jit=jit, gamma=0.9)
    np.testing.assert_array_equal(got, [[1, 0, 0], [0, 0, 0]])


# --- normalize -----------------------------------------------------------------------------

# Two trajectories of one group, of 3 and of 1 turns: returns 0, 1, 2 and 5.
UNEVEN = f32([[0, 1, 2], [5, 0, 0]])
UNEVEN_MASK = ragged([3, 1], 3)


@both
@pytest.mark.parametrize(
    "scope, want",
    [
        # set {0,1,2,5}: mean 2, variance (4+1+0+9)/4 = 3.5, std 1.8708287
        ("group", [[-1.0690450, -0.5345225, 0], [1.6035675, 0, 0]]),
        ("batch", [[-1.0690450, -0.5345225, 0], [1.6035675, 0, 0]]),
        # turn 1: {0,5} -> -1, +1; turns 2 and 3 have one element each -> 0
        ("turn", [[-1, 0, 0], [1, 0, 0]]),
        # weights 1/3,1/3,1/3,1 over 2 -> 1/6,1/6,1/6,1/2: mean 1/2 + 5/2 = 3,
        # variance (9+4+1)/6 + 4/2 = 13/3, std 2.0816660
        ("group_trajectory", [[-1.4411534, -0.9607689, -0.4803845], [0.9607689, 0, 0]]),
    ],
)
def test_normalize_golden(jit, scope, want):
    got = call(normalize, UNEVEN, UNEVEN_MASK, np.zeros(2, np.int32), jit=jit, scope=scope)
    np.testing.assert_allclose(got, want, atol=3e-6)


@both
@pytest.mark.parametrize(
    "scope, want",
    [
        ("group", [[-2, -1, 0], [3, 0, 0]]),
        ("turn", [[-2.5, 0, 0], [2.5, 0, 0]]),
        ("group_trajectory", [[-3, -2, -1], [2, 0, 0]]),
    ],
)
def test_normalize_without_scale_is_the_distance_to_the_mean(jit, scope, want):
    groups = np.zeros(2, np.int32)
    got = call(normalize, UNEVEN, UNEVEN_MASK, groups, jit=jit, scope=scope, scale=False)
    np.testing.assert_allclose(got, want, atol=1e-6)


@both
def test_group_and_batch_differ_with_two_groups(jit):
    returns, mask = f32([[0], [2], [10], [14]]), np.ones((4, 1), bool)
    groups = np.array([1, 1, 3, 3], np.int32)
    # per group {0,2} and {10,14}: std 1 and 2, so -1, 1, -1, 1
    got = call(normalize, returns, mask, groups, jit=jit, scope="group")
    np.testing.assert_allclose(got[:, 0], [-1, 1, -1, 1], atol=3e-6)
    # batch: mean 6.5, variance (42.25+20.25+12.25+56.25)/4 = 32.75, std 5.7227616
    got = call(normalize, returns, mask, groups, jit=jit, scope="batch")
    want = [-1.1358153, -0.7863336, 0.6115926, 1.3105563]
    np.testing.assert_allclose(got[:, 0], want, atol=3e-6)


@both
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("scale", [True, False])
def test_sets_without_spread_give_exactly_zero(jit, scope, scale):
    # 0.1 five times: its float32 mean need not be 0.1 to the bit
    mask = ragged([2, 3], 3)
    returns = f32(0.1 * mask)
    got = call(
        normalize, returns, mask, np.zeros(2, np.int32), jit=jit, scope=scope, scale=scale
    )
    np.testing.assert_array_equal(got, 0)
    # the same within 1e-6
    returns = f32([[0.0, 5e-7, 0.0], [5e-7, 0.0, 5e-7]]) * mask
    got = call(
        normalize, returns, mask, np.zeros(2, np.int32), jit=jit, scope=scope, scale=scale
    )
    np.testing.assert_array_equal(got, 0)


@both
@pytest.mark.parametrize("scope", SCOPES)
def test_a_set_of_one_element_gives_zero(jit, scope):
    got = call(
        normalize, f32([[3, 0]]), ragged([1], 2), np.zeros(1, np.int32), jit=jit, scope=scope
    )
    np.testing.assert_array_equal(got, 0)


@both
def test_eps_is_added_to_the_std(jit):
    # {0, 1e-5}: std 5e-6; 5e-6 / (5e-6 + 1e-6) = 0.8333333.  {0, 2}: 1 / (1 + 1) = 0.5
    mask, groups = np.ones((2, 1), bool), np.zeros(2, np.int32)
    got = call(normalize, f32([[0], [1e-5]]), mask, groups, jit=jit, scope="group")
    np.testing.assert_allclose(got[:, 0], [-0.8333333, 0.8333333], atol=1e-4)
    got = call(normalize, f32([[0], [2]]), mask, groups, jit=jit, scope="group", eps=1.0)
    np.testing.assert_allclose(got[:, 0], [-0.5, 0.5], atol=1e-6)


@both
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("scale", [True, False])
def test_normalize_matches_the_reference(jit, scope, scale):
    for seed in range(4):
        rewards, mask, groups = random_batch(seed)
        returns = f32(ref_returns(rewards.turn, mask, 0.9))
        got = call(normalize, returns, mask, groups, jit=jit, scope=scope, scale=scale)
        want = ref_normalize(returns.astype(float), mask, groups, scope, scale)
        np.testing.assert_allclose(got, want, atol=2e-5)
        np.testing.assert_array_equal(got[~mask], 0)


@pytest.mark.parametrize("scope", SCOPES)
def test_normalize_ignores_what_is_off_the_mask(scope):
    rewards, mask, groups = random_batch(0)
    returns = f32(ref_returns(rewards.turn, mask, 0.9))
    clean = call(normalize, returns, mask, groups, jit=False, scope=scope)
    dirty = call(
        normalize,
        np.where(mask, returns, 99).astype(np.float32),
        mask,
        groups,
        jit=False,
        scope=scope,
    )
    np.testing.assert_array_equal(clean, dirty)


def test_an_unknown_scope_is_refused():
    with pytest.raises(InputError, match="token"):
        normalize(UNEVEN, UNEVEN_MASK, np.zeros(2, np.int32), "token")


# --- equal groups --------------------------------------------------------------------------


@both
def test_equal_groups(jit):
    turn = [
        [0, 1, 0, 0],  # group 0: 1 and 1, in different numbers of turns: equal
        [0, 0, 0, 1],
        [0, 1, 0, 0],  # group 1: 1 and 0
        [0, 0, 0, 0],
        [0.5, 0, 0, 0],  # group 2: one member is equal to itself
        [-0.1, -0.1, -0.1, 1.0],  # group 3: both 0.7, up to rounding
        [-0.1, -0.1, 0.9, 0.0],
        [1, 0, 0, 0],  # group 4: 1 and 1; -0.1 and -0.1 in group 5; one more of each is out
        [0, 1, 0, 0],
        [-0.1, 0, 0, 0],
        [0, -0.1, 0, 0],
        [0, 0, 0, 0],
        [0, 0, 0, 0],
    ]
    mask = ragged([2, 4, 2, 2, 1, 4, 3, 1, 2, 1, 2, 0, 0], 4)
    groups = np.array([0, 0, 1, 1, 2, 3, 3, 4, 4, 5, 5, 4, 5], np.int32)
    got = call(equal_groups, rewards_of(turn), mask, groups, jit=jit)
    assert got.dtype == bool and got.shape == (13,)
    np.testing.assert_array_equal(got[:11], [1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1])


def test_equal_groups_goes_by_the_turn_rewards_and_not_by_the_outcome():
    rewards = rewards_of([[1, 0], [-0.1, 1]], outcome=[1, 1])
    got = np.asarray(equal_groups(rewards, ragged([1, 2], 2), np.zeros(2, np.int32)))
    np.testing.assert_array_equal(got, [False, False])


# --- estimators, by hand -------------------------------------------------------------------

# One group. A: three turns, right, a malformed call on turn 1. B: two turns, right.
# C: one turn, wrong, no call at all.
TURN = [[-0.1, 0, 1], [0, 1, 0], [-0.1, 0, 0]]
THREE = rewards_of(TURN, outcome=[1, 1, 0], format_ok=[0, 1, 0])
THREE_MASK = ragged([3, 2, 1], 3)
THREE_GROUP = np.zeros(3, np.int32)


def spread(per_trajectory):
    return np.asarray(per_trajectory)[:, None] * THREE_MASK


# outcome 1,1,0: mean 2/3, variance 2/9, std 0.4714045
A_OUTCOME = [0.7071068, 0.7071068, -1.4142136]

GOLDEN = [
    # returns 0.71 0.9 1 | 0.9 1 | -0.1: mean 4.41/6 = 0.735, squares sum
    # .5041+.81+1+.81+1+.01 = 4.1341, variance 4.1341/6 - .735^2 = 0.1487917, std 0.3857352
    (
        "gtpo",
        {},
        [
            [-0.0648113, 0.4277546, 0.6869997],
            [0.4277546, 0.6869997, 0],
            [-2.1646974, 0, 0],
        ],
    ),
    # gamma 1, not scaled: returns 0.9 1 1 | 1 1 | -0.1: mean 4.8/6 = 0.8
    (
        "gtpo",
        {"gamma": 1.0, "scale": False},
        [[0.1, 0.2, 0.2], [0.2, 0.2, 0], [-0.9, 0, 0]],
    ),
    # turn 1: 0.71 0.9 -0.1, mean 0.5033333; turn 2: 0.9 1, mean 0.95; turn 3: alone
    (
        "gtpo",
        {"scope": "turn", "scale": False},
        [[0.2066667, -0.05, 0], [0.3966667, 0.05, 0], [-0.6033333, 0, 0]],
    ),
    # trajectory means 0.87, 0.95, -0.1: their mean 0.5733333
    (
        "gtpo",
        {"scope": "group_trajectory", "scale": False},
        [
            [0.1366667, 0.3266667, 0.4266667],
            [0.3266667, 0.4266667, 0],
            [-0.6733333, 0, 0],
        ],
    ),
    # min(outcome, format_ok) = 0,1,0: mean 1/3, std 0.4714045
    ("grpo", {}, spread([-0.7071068, 1.4142136, -0.7071068])),
    ("grpo", {"scale": False}, spread([-1 / 3, 2 / 3, -1 / 3])),
    ("grpo_outcome", {}, spread(A_OUTCOME)),
    ("grpo_outcome", {"scale": False}, spread([1 / 3, 1 / 3, -2 / 3])),
    # sums 0.9, 1, -0.1: mean 0.6, variance (.09+.16+.49)/3, std 0.4966555
    ("grpo_sum", {}, spread([0.6040404, 0.8053872, -1.4094277])),
    ("grpo_sum", {"scale": False}, spread([0.3, 0.4, -0.7])),
    ("dr_grpo", {}, spread([1 / 3, 1 / 3, -2 / 3])),
    # the others' means: 0.5, 0.5, 1
    ("rloo", {}, spread([0.5, 0.5, -1.0])),
    # rewards before the last turn -0.1, 0, 0 (C has only a last turn): mean -1/30,
    # std 0.1*sqrt(2)/3 = 0.0471405, so -1.4142136, 0.7071068, 0.7071068
    (
        "mt_grpo",
        {},
        [[-0.7071068, -0.7071068, 0.7071068], [1.4142136, 0.7071068, 0], [-1.4142136, 0, 0]],
    ),
    (
        "mt_grpo",
        {"lam": 0.5},
        [[0, 0, 0.7071068], [1.0606602, 0.7071068, 0], [-1.4142136, 0, 0]],
    ),
    # the first golden row plus 0.3 * A_outcome (0.2121320, 0.2121320, -0.4242641)
    (
        "irc",
        {},
        [
            [0.1473207, 0.6398866, 0.8991318],
            [0.6398866, 0.8991318, 0],
            [-2.5889615, 0, 0],
        ],
    ),
]


@both
@pytest.mark.parametrize("name, options, want", GOLDEN)
def test_estimators_golden(jit, name, options, want):
    got = call(ADVANTAGES[name], THREE, THREE_MASK, THREE_GROUP, jit=jit, **options)
    # eps is 1e-6 and the smallest std 0.047: 1.4142 * 1e-6 / 0.047 = 3e-5
    np.testing.assert_allclose(got, want, atol=4e-5)
    np.testing.assert_array_equal(got[~THREE_MASK], 0)


@pytest.mark.parametrize(
    "name, want", [(name, want) for name, options, want in GOLDEN if not options]
)
def test_defaults_golden_at_their_own_shape(name, want):
    got = ADVANTAGES[name](THREE, THREE_MASK, THREE_GROUP)
    assert got.shape == (3, 3)
    np.testing.assert_allclose(got, want, atol=4e-5)


def test_the_eight_estimators_are_there():
    assert set(NAMES) <= set(ADVANTAGES)


VARIANTS = [
    *((name, {}) for name in NAMES),
    *(("gtpo", {"scope": scope}) for scope in SCOPES[1:]),
    ("gtpo", {"drop_equal_groups": False, "gamma": 0.5}),
    ("gtpo", {"scale": False, "scope": "batch"}),
    ("grpo_sum", {"scale": False}),
    ("mt_grpo", {"lam": 0.25}),
    ("irc", {"gamma": 0.7, "lam": 0.5}),
]


@both
@pytest.mark.parametrize("name, options", VARIANTS)
def test_estimators_match_the_reference(jit, name, options):
    for seed in range(3):
        rewards, mask, groups = random_batch(seed)
        got = call(ADVANTAGES[name], rewards, mask, groups, jit=jit, **options)
        want = ref_advantage(name, rewards, mask, groups, **options)
        np.testing.assert_allclose(got, want, atol=1e-4)
        assert np.all(got[~mask] == 0)


@both
@pytest.mark.parametrize("name, options", VARIANTS)
def test_a_trajectory_without_turns_is_in_no_statistic(jit, name, options):
    """Whatever rewards the left-out rows carry, the others get what they get without them."""
    rewards, mask, groups = random_batch(7)
    out = ~mask.any(axis=1)
    loud = Rewards(*(x.copy() for x in rewards))
    loud.outcome[out], loud.format_ok[out] = 50, 50
    got = call(ADVANTAGES[name], loud, mask, groups, jit=jit, **options)
    np.testing.assert_array_equal(got[out], 0)
    _, relabelled = np.unique(groups[~out], return_inverse=True)
    alone = call(
        ADVANTAGES[name],
        Rewards(*(x[~out] for x in rewards)),
        mask[~out],
        relabelled.astype(np.int32),
        jit=jit,
        **options,
    )
    np.testing.assert_allclose(got[~out], alone, atol=1e-5)


@both
@pytest.mark.parametrize("name", NAMES)
def test_a_group_of_one_gets_zero_where_there_is_nothing_to_compare(jit, name):
    rewards = rewards_of([[1.0]], outcome=[1], format_ok=[1])
    got = call(ADVANTAGES[name], rewards, ragged([1], 1), np.zeros(1, np.int32), jit=jit)
    np.testing.assert_array_equal(got, 0)


@both
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("right", [0.0, 1.0])
def test_a_group_all_right_or_all_wrong_in_one_turn_gets_zero(jit, name, right):
    rewards = rewards_of([[right]] * 3, outcome=[right] * 3)
    got = call(ADVANTAGES[name], rewards, ragged([1] * 3, 1), np.zeros(3, np.int32), jit=jit)
    np.testing.assert_array_equal(got, 0)


@both
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_with_nothing_in_it_is_all_zero(jit, name):
    rewards = rewards_of(np.zeros((2, 3)))
    got = call(ADVANTAGES[name], rewards, ragged([0, 0], 3), np.zeros(2, np.int32), jit=jit)
    np.testing.assert_array_equal(got, 0)


def test_grpo_takes_the_smaller_and_not_the_product():
    # an overlong penalty takes the outcome to -1: min(-1, 0) = -1, min(1, 1) = 1
    rewards = rewards_of([[-1.1], [1.0]], outcome=[-1, 1], format_ok=[0, 1])
    got = ADVANTAGES["grpo"](rewards, ragged([1, 1], 1), np.zeros(2, np.int32), scale=False)
    np.testing.assert_allclose(got, [[-1], [1]], atol=1e-6)


# --- the trap of equal groups --------------------------------------------------------------


@both
def test_equal_groups_trap_both_ways(jit):
    # Both right in two turns. Returns 0.9 1 | 0.9 1: mean 0.95, std 0.05. Nothing tells the
    # trajectories apart, yet first turns get -1 and last turns +1 unless the group is dropped.
    rewards, mask = rewards_of([[0, 1], [0, 1]]), ragged([2, 2], 2)
    groups = np.zeros(2, np.int32)
    trap = call(ADVANTAGES["gtpo"], rewards, mask, groups, jit=jit, drop_equal_groups=False)
    np.testing.assert_allclose(trap, [[-1, 1], [-1, 1]], atol=1e-4)
    for scope in SCOPES:
        kept = call(ADVANTAGES["gtpo"], rewards, mask, groups, jit=jit, scope=scope)
        np.testing.assert_array_equal(kept, 0)
    # scope turn has no such fault: {0.9, 0.9} and {1, 1} have no spread
    turn = call(
        ADVANTAGES["gtpo"],
        rewards,
        mask,
        groups,
        jit=jit,
        drop_equal_groups=False,
        scope="turn",
    )
    np.testing.assert_array_equal(turn, 0)


@both
def test_dropping_one_group_leaves_the_other_as_it_was(jit):
    # group 0 equal, group 1 returns {1, 0}: +1, -1
    rewards = rewards_of([[0, 1], [1, 0], [0, 1], [0, 0]])
    mask = ragged([2, 1, 2, 1], 2)
    groups = np.array([0, 1, 0, 1], np.int32)
    got = call(ADVANTAGES["gtpo"], rewards, mask, groups, jit=jit)
    np.testing.assert_allclose(got, [[0, 0], [1, 0], [0, 0], [-1, 0]], atol=3e-6)
