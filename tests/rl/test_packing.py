"""The door from ragged to packed: every token once, nothing of the tool's in the loss."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gtpo_jax.errors import InputError
from gtpo_jax.rl.packing import pack
from gtpo_jax.rl.types import Trajectory, Turn
from gtpo_jax.tasks.types import Problem

ROW = 24
AGGREGATIONS = ("token_mean", "sequence_mean", "turn_mean", "constant")


def build(shapes):
    """shapes: per trajectory (prompt length, [(sampled, feedback), ...]). Token ids are all
    different, so that a token found in the batch says where it came from. 3 per problem."""
    token, trajectories = 100, []
    for n, (prompt, turns) in enumerate(shapes):
        problem = Problem(f"p{n // 3}", "test", (), "0")
        one = Trajectory(problem, n % 3, list(range(token, token + prompt)))
        token += prompt
        for sampled, feedback in turns:
            ids = list(range(token, token + sampled + feedback))
            one.turns.append(
                Turn(
                    ids[:sampled],
                    [-i / 1000 for i in ids[:sampled]],
                    feedback_tokens=ids[sampled:],
                )
            )
            token += sampled + feedback
        trajectories.append(one)
    k = max([len(turns) for _, turns in shapes] or [1])
    n = len(shapes)
    return trajectories, (np.arange(n * k).reshape(n, k) + 1).astype(np.float32) / 8


def expected(trajectories, advantages):
    """token id -> (turn or -1, advantage, behaviour logprob, trajectory, place in it)."""
    out = {}
    for n, one in enumerate(trajectories):
        flat = [(i, -1, 0.0, 0.0) for i in one.prompt_tokens]
        for j, turn in enumerate(one.turns):
            flat += [
                (i, j, advantages[n, j], lp)
                for i, lp in zip(turn.tokens, turn.logprobs, strict=True)
            ]
            flat += [(i, -1, 0.0, 0.0) for i in turn.feedback_tokens]
        for place, (i, *rest) in enumerate(flat):
            out[i] = (*rest, n, place)
    return out


def check(batch, trajectories, advantages, row_tokens):
    """Everything a batch promises, whatever the placement."""
    rows = batch.tokens.shape[0]
    for field in batch._fields:
        array = getattr(batch, field)
        assert isinstance(array, np.ndarray), field
        if field == "loss_index":
            assert array.shape[0] == rows and array.dtype == np.int32
            continue
        integer = field in ("tokens", "positions", "segment_ids", "turn_ids")
        assert array.shape == (rows, row_tokens), field
        assert array.dtype == (np.int32 if integer else np.float32), field

    want = expected(trajectories, advantages)
    used = batch.segment_ids > 0
    assert sorted(batch.tokens[used]) == sorted(want)  # every token once
    home = {}
    for r, t in np.argwhere(used):
        turn, advantage, logprob, n, place = want[int(batch.tokens[r, t])]
        assert batch.turn_ids[r, t] == turn
        assert batch.positions[r, t] == place
        assert home.setdefault(n, (r, t - place, batch.segment_ids[r, t])) == (
            r,
            t - place,
            batch.segment_ids[r, t],
        )  # one row, one segment, side by side
        if turn >= 0:
            assert batch.advantages[r, t] == np.float32(advantage)
            assert batch.behaviour_logprobs[r, t] == np.float32(logprob)
    for r in range(rows):  # segments count from 1 in a row, each its own
        ids = [s for row, _, s in home.values() if row == r]
        assert sorted(ids) == list(range(1, len(ids) + 1))

    sampled = batch.turn_ids >= 0
    assert np.all(batch.turn_ids[~sampled] == -1)
    assert not np.any(sampled & ~used)
    assert np.all(batch.weights[~sampled] == 0)
    assert np.all(batch.weights[sampled] > 0)
    assert np.all(batch.advantages[~sampled] == 0)
    for r in range(rows):
        places = np.flatnonzero(sampled[r])
        assert 0 not in places
        np.testing.assert_array_equal(batch.loss_index[r, : len(places)], places)
        assert np.all(batch.loss_index[r, len(places) :] == 0)


def weight_of(batch, token):
    return float(batch.weights[batch.tokens == token][0])


# --- by hand -------------------------------------------------------------------------------

# A: prompt 100 101; turn 102 103, tool 104; turn 105.  B: prompt 106; turn 107 108 109 110.
TWO = [(2, [(2, 1), (1, 0)]), (1, [(4, 0)])]


def test_one_row_golden():
    trajectories, _ = build(TWO)
    batch = pack(trajectories, np.float32([[0.5, -1], [2, 0]]), row_tokens=13)
    check(batch, trajectories, np.float32([[0.5, -1], [2, 0]]), 13)
    assert batch.tokens.shape == (1, 13)
    a = {int(t): i for i, t in enumerate(batch.tokens[0]) if batch.segment_ids[0, i]}
    assert len(a) == 11
    turns = [int(batch.turn_ids[0, a[t]]) for t in range(100, 111)]
    assert turns == [-1, -1, 0, 0, -1, 1, -1, 0, 0, 0, 0]
    positions = [int(batch.positions[0, a[t]]) for t in range(100, 111)]
    assert positions == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]
    got = [float(batch.advantages[0, a[t]]) for t in range(100, 111)]
    assert got == [0, 0, 0.5, 0.5, 0, -1, 0, 2, 2, 2, 2]


@pytest.mark.parametrize(
    "aggregation, constant, want",
    [
        # 7 sampled tokens in all
        ("token_mean", None, {102: 1 / 7, 105: 1 / 7, 107: 1 / 7}),
        # N = 2; A has 3, B has 4
        ("sequence_mean", None, {102: 1 / 6, 105: 1 / 6, 107: 1 / 8}),
        # 3 turns, of 2, 1 and 4
        ("turn_mean", None, {102: 1 / 6, 103: 1 / 6, 105: 1 / 3, 107: 1 / 12}),
        # N = 2, constant 10
        ("constant", 10, {102: 1 / 20, 105: 1 / 20, 107: 1 / 20}),
    ],
)
def test_weights_golden(aggregation, constant, want):
    trajectories, advantages = build(TWO)
    batch = pack(trajectories, advantages, 13, aggregation, constant)
    check(batch, trajectories, advantages, 13)
    for token, weight in want.items():
        assert weight_of(batch, token) == pytest.approx(weight, rel=1e-6)


def test_rows_multiple_adds_empty_rows():
    trajectories, advantages = build([(3, [(9, 0)])] * 3)
    for multiple, rows in ((1, 3), (2, 4), (3, 3), (4, 4), (8, 8)):
        batch = pack(trajectories, advantages, 12, rows_multiple=multiple)
        assert batch.tokens.shape[0] == rows
        check(batch, trajectories, advantages, 12)


def test_weights_do_not_depend_on_rows():
    trajectories, advantages = build([(1, [(n, 0)]) for n in (3, 5, 2, 7, 1, 4)])
    for aggregation in AGGREGATIONS:
        packs = [
            pack(trajectories, advantages, row, aggregation, 6, multiple)
            for row, multiple in ((8, 1), (30, 1), (9, 4))
        ]
        for token in expected(trajectories, advantages):
            assert len({weight_of(batch, token) for batch in packs}) == 1


@pytest.mark.parametrize("row_tokens", [12, 11])
def test_a_trajectory_longer_than_a_row_is_refused(row_tokens):
    trajectories, advantages = build([(3, [(4, 2), (3, 0)]), (1, [(1, 0)])])  # 12 and 2
    if row_tokens == 12:
        check(pack(trajectories, advantages, 12), trajectories, advantages, 12)
    else:
        with pytest.raises(InputError, match="12"):
            pack(trajectories, advantages, row_tokens)


def test_an_unknown_aggregation_is_refused():
    trajectories, advantages = build(TWO)
    with pytest.raises(InputError, match="median"):
        pack(trajectories, advantages, 13, "median")


def test_the_constant_is_asked_for():
    trajectories, advantages = build(TWO)
    with pytest.raises(InputError):
        pack(trajectories, advantages, 13, "constant")


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_turns_and_trajectories_without_a_sampled_token(aggregation):
    """A turn cut off before its first token has nothing to weigh."""
    trajectories, advantages = build([(2, [(2, 1), (0, 0)]), (1, [(3, 0)]), (2, [(0, 0)])])
    with np.errstate(all="raise"):
        batch = pack(trajectories, advantages, 13, aggregation, 10)
    assert np.all(np.isfinite(batch.weights))
    check(batch, trajectories, advantages, 13)


# --- any shape -----------------------------------------------------------------------------

turn_shapes = st.tuples(st.integers(1, 3), st.integers(0, 3))
shapes = st.lists(
    st.tuples(st.integers(1, 6), st.lists(turn_shapes, min_size=1, max_size=3)),
    min_size=1,
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(shapes, st.sampled_from(AGGREGATIONS), st.integers(1, 3))
def test_every_token_is_placed_once(shapes, aggregation, multiple):
    trajectories, advantages = build(shapes)  # at most 6 + 3 * 6 = 24 tokens each
    batch = pack(trajectories, advantages, ROW, aggregation, 5, multiple)
    check(batch, trajectories, advantages, ROW)
    assert batch.tokens.shape[0] % multiple == 0

    sampled = [one.sampled_length() for one in trajectories]
    total = sum(sampled) / (5 * len(sampled)) if aggregation == "constant" else 1
    assert batch.weights.sum() == pytest.approx(total, rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(shapes, st.randoms(use_true_random=False))
def test_the_order_of_arrival_does_not_matter(shapes, random):
    trajectories, advantages = build(shapes)
    order = list(range(len(trajectories)))
    random.shuffle(order)
    one = pack(trajectories, advantages, ROW)
    other = pack([trajectories[i] for i in order], advantages[order], ROW)
    for field in one._fields:
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field), field)


@settings(max_examples=40, deadline=None)
@given(shapes)
def test_rows_are_filled(shapes):
    """No two rows would fit into one: first fit leaves at most one row half empty."""
    batch = pack(*build(shapes), ROW)
    filled = sorted((batch.segment_ids > 0).sum(axis=1))
    assert len(filled) == 1 or filled[0] + filled[1] > ROW
