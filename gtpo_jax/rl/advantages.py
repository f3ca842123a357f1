"""From rewards per turn to an advantage per turn: GTPO and its relatives.

Every estimator is f(rewards: Rewards, mask [N,K], groups [N], **options) -> [N,K] float32,
0 off the mask; `groups` are integers in [0, N). A trajectory whose mask row is all False has
left: it counts in no mean and no spread. Pure functions, with or without `jax.jit`.

GTPO is arXiv 2511.14846. No code was released; where the paper is silent we chose:

 1. The set over which returns are normalised is `scope`, by default all turns of all
    trajectories of one problem ("Group Turn"); `batch`, `turn`, `group_trajectory` besides.
 2. std is the population std, eps 1e-6 is added to it.
 3. A set whose largest and smallest element are within 1e-6 has no spread: advantage 0.
    (In float32 its std would be rounding noise, which the division would blow up.)
 4. `drop_equal_groups`: a group whose trajectories all earned the same sum of turn rewards
    gets advantage 0. With gamma < 1 its only spread is that early turns are discounted more
    often, and dividing by that spread would punish first turns for nothing.
 5. A turn that both is the first and has an invalid call costs 0.1 once (`rl.rewards`).
 6. Shaping is part of the turn rewards (gtpo, grpo_sum, irc), never of `outcome`.
 7. MT-GRPO's reward of turns is the sum of a trajectory's turn rewards before its last turn;
    its advantage goes to all turns but the last, which comes after the last tool result.
 8. IRC's per-turn and outcome rewards are both in `rewards.turn`, so its discounted sum is
    our discounted return. It has the fault that 4. mends in GTPO, and we leave it there.
 9. Dr. GRPO, RLOO, MT-GRPO's and IRC's outcome part take `outcome`, which knows no format.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from gtpo_jax.errors import InputError
from gtpo_jax.rl.types import Array, Rewards

NO_SPREAD = 1e-6
SCOPES = ("group", "batch", "turn", "group_trajectory")


def discounted_returns(rewards: Array, mask: Array, gamma: float) -> jax.Array:
    """R_{i,j} = sum_{m=j..T_i} gamma^(m-j) r_{i,m}. [N,K] -> [N,K], 0 off the mask."""
    chex.assert_rank([rewards, mask], 2)
    mask = jnp.asarray(mask, bool)
    turns = jnp.arange(mask.shape[1])
    later = turns[None, :] - turns[:, None]  # m - j
    powers = jnp.where(later >= 0, jnp.power(jnp.float32(gamma), jnp.maximum(later, 0)), 0.0)
    earned = jnp.where(mask, rewards, 0.0).astype(jnp.float32)
    returns = jnp.einsum("im,jm->ij", earned, powers, precision=jax.lax.Precision.HIGHEST)
    return jnp.where(mask, returns, 0.0)


def normalize(
    returns: Array,
    mask: Array,
    groups: Array,
    scope: str,
    scale: bool = True,
    eps: float = 1e-6,
) -> jax.Array:
    """A_{i,j} = (R_{i,j} - mean(R)) / (std(R) + eps), mean and std over the set `scope` names.

    returns, mask [N,K], groups [N] -> [N,K]. `scale=False` leaves out the division.
    Raises InputError on an unknown scope.
    """
    chex.assert_rank([returns, mask, groups], [2, 2, 1])
    if scope not in SCOPES:
        raise InputError(f"scope {scope!r}: one of {', '.join(SCOPES)}")
    n, k = returns.shape
    mask = jnp.asarray(mask, bool)
    groups = jnp.asarray(groups, jnp.int32)
    if scope == "batch":
        sets = jnp.zeros((n, k), jnp.int32)
    elif scope == "turn":
        sets = groups[:, None] * k + jnp.arange(k, dtype=jnp.int32)
    else:
        sets = jnp.broadcast_to(groups[:, None], (n, k))
    weights = mask.astype(jnp.float32)
    if scope == "group_trajectory":
        weights = weights / jnp.maximum(weights.sum(axis=1, keepdims=True), 1.0)

    def per_set(reduce, x):
        return reduce(x.ravel(), sets.ravel(), num_segments=n * k)[sets]

    total = jnp.maximum(per_set(jax.ops.segment_sum, weights), 1e-12)
    mean = per_set(jax.ops.segment_sum, weights * returns) / total
    centred = jnp.where(mask, returns - mean, 0.0)
    largest = per_set(jax.ops.segment_max, jnp.where(mask, returns, -jnp.inf))
    smallest = per_set(jax.ops.segment_min, jnp.where(mask, returns, jnp.inf))
    centred = jnp.where(largest - smallest > NO_SPREAD, centred, 0.0)
    if not scale:
        return centred
    variance = per_set(jax.ops.segment_sum, weights * centred**2) / total
    return centred / (jnp.sqrt(variance) + eps)


def equal_groups(rewards: Rewards, mask: Array, groups: Array) -> jax.Array:
    """Whether all trajectories of one's group earned the same sum of turn rewards. [N] bool."""
    n = mask.shape[0]
    present = jnp.any(jnp.asarray(mask, bool), axis=1)
    earned = jnp.sum(jnp.where(mask, rewards.turn, 0.0), axis=1)
    groups = jnp.asarray(groups, jnp.int32)
    largest = jax.ops.segment_max(jnp.where(present, earned, -jnp.inf), groups, n)
    smallest = jax.ops.segment_min(jnp.where(present, earned, jnp.inf), groups, n)
    return ~(largest - smallest > NO_SPREAD)[groups] & present


def _per_trajectory(reward, mask, groups, scale=True):
    """GRPO's A_i = (r_i - mean) / (std + eps) over the group, on every turn. reward [N]."""
    present = jnp.any(jnp.asarray(mask, bool), axis=1, keepdims=True)
    advantage = normalize(jnp.asarray(reward)[:, None], present, groups, "group", scale)
    return jnp.where(mask, advantage, 0.0)


def gtpo(
    rewards: Rewards,
    mask: Array,
    groups: Array,
    gamma: float = 0.9,
    scope: str = "group",
    scale: bool = True,
    drop_equal_groups: bool = True,
) -> jax.Array:
    """Normalised discounted returns: A_{i,j} = (R_{i,j} - mean(R)) / (std(R) + eps)."""
    returns = discounted_returns(rewards.turn, mask, gamma)
    advantage = normalize(returns, mask, groups, scope, scale)
    if drop_equal_groups:
        advantage = jnp.where(equal_groups(rewards, mask, groups)[:, None], 0.0, advantage)
    return advantage


def grpo(rewards: Rewards, mask: Array, groups: Array, scale: bool = True) -> jax.Array:
    """The paper's baseline: r_i = min(r_acc_i, r_format_i), one advantage a trajectory."""
    return _per_trajectory(jnp.minimum(rewards.outcome, rewards.format_ok), mask, groups, scale)


def grpo_outcome(rewards: Rewards, mask: Array, groups: Array, scale: bool = True) -> jax.Array:
    """r_i = r_acc_i alone."""
    return _per_trajectory(rewards.outcome, mask, groups, scale)


def grpo_sum(rewards: Rewards, mask: Array, groups: Array, scale: bool = True) -> jax.Array:
    """r_i = sum_j r_{i,j}, shaping included: GTPO's reward without its credit assignment."""
    earned = jnp.sum(jnp.where(mask, rewards.turn, 0.0), axis=1)
    return _per_trajectory(earned, mask, groups, scale)


def dr_grpo(rewards: Rewards, mask: Array, groups: Array) -> jax.Array:
    """Dr. GRPO (arXiv 2503.20783): A_i = r_i - mean."""
    return _per_trajectory(rewards.outcome, mask, groups, scale=False)


def rloo(rewards: Rewards, mask: Array, groups: Array) -> jax.Array:
    """RLOO (arXiv 2402.14740): A_i = r_i - mean of the others = (r_i - mean) n / (n - 1)."""
    present = jnp.any(jnp.asarray(mask, bool), axis=1).astype(jnp.float32)
    groups = jnp.asarray(groups, jnp.int32)
    size = jax.ops.segment_sum(present, groups, num_segments=present.shape[0])[groups]
    leave_one_out = size / jnp.maximum(size - 1.0, 1.0)
    return dr_grpo(rewards, mask, groups) * leave_one_out[:, None]


def mt_grpo(rewards: Rewards, mask: Array, groups: Array, lam: float = 1.0) -> jax.Array:
    """MT-GRPO (arXiv 2505.11821): A_outcome + lam A_turn before the last tool result."""
    mask = jnp.asarray(mask, bool)
    last = jnp.sum(mask, axis=1, keepdims=True) - 1
    before_last = mask & (jnp.arange(mask.shape[1]) < last)
    turn_reward = jnp.sum(jnp.where(before_last, rewards.turn, 0.0), axis=1)
    of_turns = _per_trajectory(turn_reward, mask, groups)
    return grpo_outcome(rewards, mask, groups) + jnp.where(before_last, lam * of_turns, 0.0)


def irc(
    rewards: Rewards,
    mask: Array,
    groups: Array,
    gamma: float = 0.9,
    lam: float = 0.3,
) -> jax.Array:
    """IRC (arXiv 2604.02869): GN(sum gamma^(l-k) r_l + gamma^(K-k) o) + lam A_outcome."""
    returns = discounted_returns(rewards.turn, mask, gamma)
    of_returns = normalize(returns, mask, groups, "group")
    return of_returns + lam * grpo_outcome(rewards, mask, groups)


ADVANTAGES: dict[str, Callable[..., jax.Array]] = {
    "gtpo": gtpo,
    "grpo": grpo,
    "grpo_outcome": grpo_outcome,
    "grpo_sum": grpo_sum,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "mt_grpo": mt_grpo,
    "irc": irc,
}
