"""Score -> advantages -> pack -> loss, end to end on a handful of tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gtpo_jax.rl.advantages import ADVANTAGES, equal_groups
from gtpo_jax.rl.losses import LOSSES, LossInputs
from gtpo_jax.rl.packing import pack
from gtpo_jax.rl.rewards import score
from gtpo_jax.rl.types import Trajectory, Turn
from gtpo_jax.tasks.types import Problem
from gtpo_jax.tools.toolcall import Call

ROW = 12


def trajectory(problem, member, lengths, correct, status="finished"):
    """Prompt of 2; turns of `lengths` sampled tokens, 2 of feedback after all but the last.

    Every sampled token's id is different, so the batch can be read back by id."""
    base = 1000 * (ord(problem) - ord("a")) + 100 * member
    turns = []
    for j, length in enumerate(lengths):
        last = j == len(lengths) - 1
        ids = [base + 10 * j + i + 1 for i in range(length)]
        turns.append(
            Turn(
                ids, [-1.0] * length, None if last else Call("print(1)"), [] if last else [7, 7]
            )
        )
    return Trajectory(
        Problem(problem, "test", (), "1"),
        member,
        [5, 6],
        turns,
        status,
        "1" if correct else "0",
        correct,
    )


def run(trajectories, name, score_options, advantage_options, loss="ppo_clip"):
    """-> batch, per-token logprobs, and the gradient of the loss with respect to them."""
    max_turns = max(len(one.turns) for one in trajectories)
    rewards, mask, groups = score(trajectories, max_turns, **score_options)
    advantages = np.asarray(ADVANTAGES[name](rewards, mask, groups, **advantage_options))
    batch = pack(trajectories, advantages, ROW)
    old = np.full(batch.tokens.shape, -1.0, np.float32)
    # a ratio that differs by token id, all within the clip range of 0.8 .. 1.28
    logprobs = old + np.float32(0.01) * (batch.tokens % 7 - 3)

    # loss_index may have any width: leave it out, so that nothing compiles again for it
    grad = loss_gradient(loss, logprobs, old, batch._replace(loss_index=old))
    return batch, logprobs, np.asarray(grad)


@functools.partial(jax.jit, static_argnums=0)
def loss_gradient(loss, logprobs, old, batch):
    def total(lp):
        inputs = LossInputs(
            lp,
            old,
            batch.behaviour_logprobs,
            None,
            batch.advantages,
            batch.weights,
            batch.turn_ids,
            batch.segment_ids,
        )
        return jnp.sum(batch.weights * LOSSES[loss](inputs)[0])

    return jax.grad(total)(logprobs)


ONE_TURN = [
    *(
        trajectory("a", m, [n], c)
        for m, n, c in [(0, 3, True), (1, 2, False), (2, 4, False), (3, 1, False)]
    ),
    *(trajectory("b", m, [2], True) for m in range(2)),  # all right
    *(trajectory("c", m, [3], False) for m in range(2)),  # none right
    trajectory("d", 0, [2], True),  # alone
]
PLAIN = {"alpha": 0.0, "format_penalty": 0.0}


@pytest.mark.parametrize("loss", ["ppo_clip", "gspo", "gspo_token"])
@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("scope", ["group", "turn", "group_trajectory"])
def test_one_turn_gtpo_is_grpo(loss, drop, scope):
    """With one turn, no discount, no shaping and no format penalty nothing is left of GTPO."""
    options = {"gamma": 1.0, "scope": scope, "drop_equal_groups": drop}
    ours, _, ours_grad = run(ONE_TURN, "gtpo", PLAIN, options, loss)
    base, _, base_grad = run(ONE_TURN, "grpo_outcome", PLAIN, {}, loss)
    for field in ours._fields:
        np.testing.assert_allclose(
            getattr(ours, field), getattr(base, field), atol=1e-6, err_msg=field
        )
    np.testing.assert_allclose(ours_grad, base_grad, atol=1e-7)
    assert np.abs(base_grad).max() > 1e-3


@pytest.mark.parametrize("name, options", [("gtpo", {"gamma": 1.0}), ("grpo_outcome", {})])
def test_the_gradient_by_hand(name, options):
    # group a: outcomes 1 0 0 0, mean 1/4, std sqrt(3)/4: A = sqrt(3) and -1/sqrt(3).
    # The other groups: 0. Sampled tokens: 3+2+4+1 + 2*2 + 2*3 + 2 = 22.
    # d loss / d lp = -A * ratio / 22
    batch, logprobs, grad = run(ONE_TURN, name, PLAIN, options)
    for r, t in np.ndindex(*grad.shape):
        token, a = int(batch.tokens[r, t]), 0.0
        if batch.turn_ids[r, t] != -1 and token < 1000:
            a = np.sqrt(3) if token < 100 else -1 / np.sqrt(3)
        want = -a * np.exp(float(logprobs[r, t]) + 1) / 22
        assert grad[r, t] == pytest.approx(want, abs=1e-6)


def test_only_sampled_tokens_get_a_gradient():
    trajectories = [
        trajectory("a", 0, [2, 3], True),
        trajectory("a", 1, [1, 1, 2], False),
        trajectory("a", 2, [3], False, status="void"),
    ]
    for loss in LOSSES:
        batch, _, grad = run(trajectories, "gtpo", {}, {}, loss)
        assert np.all(grad[batch.turn_ids == -1] == 0)
        if loss == "ppo_clip":
            assert np.all(grad[batch.turn_ids != -1] != 0)


def gradient_by_turn(batch, grad):
    """Sum of the gradient over the tokens of turn 0 and turn 1."""
    return [float(grad[batch.turn_ids == j].sum()) for j in (0, 1)]


def test_the_trap_of_equal_groups_both_ways():
    # Both right in two turns of 2 tokens. Returns 0.9, 1: mean 0.95, std 0.05, so A = -1, +1
    # though nothing sets the two apart: the 4 tokens of first turns are pushed down by 4/8,
    # those of last turns up by 4/8 (up to their ratios, within 3%).
    trajectories = [trajectory("a", m, [2, 2], True) for m in (0, 1)]
    batch, _, grad = run(trajectories, "gtpo", {}, {"drop_equal_groups": False})
    np.testing.assert_allclose(gradient_by_turn(batch, grad), [0.5, -0.5], rtol=0.035)
    batch, _, grad = run(trajectories, "gtpo", {}, {"drop_equal_groups": True})
    assert np.all(grad == 0)
    batch, _, grad = run(trajectories, "gtpo", {}, {})  # the default
    assert np.all(grad == 0)


def test_one_unequal_member_is_enough_to_keep_the_group():
    trajectories = [
        trajectory("a", 0, [2, 2], True),
        trajectory("a", 1, [2, 2], False),
    ]
    # no shaping: returns 0.9 1 | 0 0: mean 0.475, variance (.81 + 1)/4 - .475^2 = 0.226875,
    # std 0.4763140: A = 0.8922686 1.1022140 | -0.9972413 twice
    batch, _, _ = run(trajectories, "gtpo", {"alpha": 0.0}, {})
    want = {0: [0.8922686, 1.1022140], 1: [-0.9972413, -0.9972413]}
    for member, per_turn in want.items():
        for j, a in enumerate(per_turn):
            here = (batch.turn_ids == j) & (batch.tokens // 100 == member)
            np.testing.assert_allclose(batch.advantages[here], [a, a], atol=1e-5)


def test_a_tool_failure_changes_nothing_for_the_others():
    # without the third one both earned 1 in two turns: an equal group
    pair = [trajectory("a", m, [2, 2], True) for m in (0, 1)]
    failed = trajectory("a", 2, [2], False, status="tool_failure")
    rewards, mask, groups = score([*pair, failed], 2)
    np.testing.assert_array_equal(np.asarray(equal_groups(rewards, mask, groups))[:2], True)
    for name in ADVANTAGES:
        options = {"drop_equal_groups": False} if name == "gtpo" else {}
        three = ADVANTAGES[name](rewards, mask, groups, **options)
        two = ADVANTAGES[name](*score(pair, 2), **options)
        np.testing.assert_allclose(three[:2], two, atol=1e-6)
        np.testing.assert_array_equal(three[2], 0)
