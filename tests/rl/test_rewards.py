"""What a turn leads to, reward side: one small trajectory per line of the table."""

import numpy as np
import pytest

from gtpo_jax.errors import InputError
from gtpo_jax.rl.rewards import score
from gtpo_jax.rl.types import Trajectory, Turn
from gtpo_jax.tasks.types import Problem
from gtpo_jax.tools.toolcall import Call, Invalid

OK = Call("print(6 * 7)")
RAISES = Call("1 / 0")  # compiles; that it fails when run is no format error
UNCOMPILABLE = Call("x = = 1")
INVALID = Invalid("unclosed block")
NO_CALL = None


def trajectory(calls, correct=False, status="finished", problem="p", member=0, length=2):
    """One turn per entry of `calls`, the first of `length` sampled tokens, the others of 1."""
    turns = [
        Turn([5] * n, [-1.0] * n, call)
        for call, n in zip(calls, [length] + [1] * len(calls), strict=False)
    ]
    return Trajectory(
        Problem(problem, "test", (), "42"),
        member,
        [1, 2, 3],
        turns,
        status,
        "42" if correct else None,
        correct,
    )


def turn_rewards(*trajectories, max_turns=3, **options):
    rewards, _, _ = score(trajectories, max_turns, **options)
    return rewards.turn


# --- the table -----------------------------------------------------------------------------

TABLE = [
    # name, calls, correct, status, turn rewards, format_ok
    ("answer after a call", [OK, NO_CALL], True, "finished", [0, 1, 0], 1),
    ("wrong after a call", [OK, NO_CALL], False, "finished", [0, 0, 0], 1),
    ("three turns", [OK, OK, NO_CALL], True, "finished", [0, 0, 1], 1),
    ("first turn without a call, right", [NO_CALL], True, "finished", [0.9, 0, 0], 0),
    ("first turn without a call, wrong", [NO_CALL], False, "finished", [-0.1, 0, 0], 0),
    ("invalid first turn: once", [INVALID, NO_CALL], True, "finished", [-0.1, 1, 0], 0),
    ("invalid later", [OK, INVALID, NO_CALL], True, "finished", [0, -0.1, 1], 0),
    ("invalid twice", [INVALID, INVALID, NO_CALL], True, "finished", [-0.1, -0.1, 1], 0),
    ("a call that raises is valid", [RAISES, NO_CALL], True, "finished", [0, 1, 0], 1),
    (
        "does not compile: valid by default",
        [UNCOMPILABLE, NO_CALL],
        True,
        "finished",
        [0, 1, 0],
        1,
    ),
    ("void", [OK, NO_CALL], False, "void", [0, 0, 0], 1),
    ("void at once", [NO_CALL], False, "void", [-0.1, 0, 0], 0),
    ("truncated in a call", [OK, OK, OK], False, "truncated", [0, 0, 0], 1),
    ("truncated at an invalid call", [OK, INVALID], False, "truncated", [0, -0.1, 0], 0),
    ("truncated in the first turn", [NO_CALL], False, "truncated", [-0.1, 0, 0], 0),
]


@pytest.mark.parametrize(
    "calls, correct, status, want, format_ok",
    [row[1:] for row in TABLE],
    ids=[row[0] for row in TABLE],
)
def test_what_a_turn_leads_to(calls, correct, status, want, format_ok):
    rewards, mask, groups = score([trajectory(calls, correct, status)], 3)
    np.testing.assert_allclose(rewards.turn, [want], atol=1e-6)
    np.testing.assert_array_equal(rewards.outcome, [float(correct)])
    np.testing.assert_array_equal(rewards.format_ok, [format_ok])
    np.testing.assert_array_equal(mask, [np.arange(3) < len(calls)])
    np.testing.assert_array_equal(groups, [0])


def test_a_tool_failure_leaves():
    rewards, mask, _ = score([trajectory([OK, OK], status="tool_failure")], 3)
    np.testing.assert_array_equal(mask, [[False] * 3])
    np.testing.assert_array_equal(rewards.turn, [[0] * 3])


def test_shapes_and_types():
    rewards, mask, groups = score([trajectory([OK, NO_CALL], True)] * 2, 4)
    assert rewards.turn.shape == (2, 4) and rewards.turn.dtype == np.float32
    assert rewards.outcome.shape == (2,) and rewards.outcome.dtype == np.float32
    assert rewards.format_ok.shape == (2,) and rewards.format_ok.dtype == np.float32
    assert mask.shape == (2, 4) and mask.dtype == bool
    assert groups.shape == (2,) and groups.dtype == np.int32


def test_groups_are_numbered_by_first_appearance():
    trajectories = [
        trajectory([OK], problem=name, status=status)
        for name, status in [
            ("z", "finished"),
            ("a", "tool_failure"),
            ("z", "void"),
            ("m", "finished"),
            ("a", "finished"),
        ]
    ]
    np.testing.assert_array_equal(score(trajectories, 1)[2], [0, 1, 0, 2, 1])


# --- switches ------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty, want", [(0.1, [-0.1, 1, 0]), (0.3, [-0.3, 1, 0])])
def test_format_penalty(penalty, want):
    got = turn_rewards(trajectory([INVALID, NO_CALL], True), format_penalty=penalty)
    np.testing.assert_allclose(got, [want], atol=1e-6)


def test_format_penalty_zero():
    got = turn_rewards(trajectory([NO_CALL], True), format_penalty=0.0)
    np.testing.assert_array_equal(got, [[1, 0, 0]])


@pytest.mark.parametrize(
    "code",
    ["x = = 1", "print(", "x = '\0'", "s = '\ud800'", "-" * 20000 + "1"],
    ids=["syntax", "unclosed", "null byte", "surrogate", "too deep"],
)
def test_invalid_on_syntax_error(code):
    calls = [OK, Call(code), NO_CALL]
    on, off = (
        score([trajectory(calls, True)], 3, invalid_on_syntax_error=switch)[0]
        for switch in (True, False)
    )
    np.testing.assert_allclose(on.turn, [[0, -0.1, 1]], atol=1e-6)
    np.testing.assert_allclose(off.turn, [[0, 0, 1]], atol=1e-6)
    assert on.format_ok == [0] and off.format_ok == [1]


def test_invalid_on_syntax_error_takes_the_penalty_once_and_spares_run_time_errors():
    got = turn_rewards(
        trajectory([UNCOMPILABLE, NO_CALL], True),
        trajectory([RAISES, NO_CALL], True),
        invalid_on_syntax_error=True,
    )
    np.testing.assert_allclose(got, [[-0.1, 1, 0], [0, 1, 0]], atol=1e-6)


@pytest.mark.parametrize("status", ["void", "truncated"])
def test_void_and_truncated_leave_where_switched(status):
    group = [trajectory([OK, NO_CALL], True), trajectory([OK, NO_CALL], status=status)]
    assert score(group, 2)[1].all()
    other = "drop_truncated" if status == "void" else "drop_void"
    assert score(group, 2, **{other: True})[1].all()
    rewards, mask, _ = score(group, 2, **{f"drop_{status}": True})
    np.testing.assert_array_equal(mask, [[True, True], [False, False]])
    np.testing.assert_array_equal(rewards.turn, [[0, 1], [0, 0]])


# --- shaping -------------------------------------------------------------------------------


def constant(value):
    return lambda left, right: np.full((len(left), len(right)), value)


def test_partial_credit_goes_to_the_last_turn():
    # 0.5 * 0.6 = 0.3, on top of whatever the turn's format costs
    group = [
        trajectory([OK, NO_CALL], True),
        trajectory([OK, OK, NO_CALL]),
        trajectory([INVALID, OK, NO_CALL]),
        trajectory([OK, INVALID]),
    ]
    got = turn_rewards(*group, similarity=constant(0.6))
    want = [[0, 1, 0], [0, 0, 0.3], [-0.1, 0, 0.3], [0, 0.2, 0]]
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_shaping_never_touches_the_outcome():
    group = [trajectory([OK, NO_CALL], True), trajectory([OK, NO_CALL])]
    rewards, _, _ = score(group, 2)
    np.testing.assert_array_equal(rewards.outcome, [1, 0])
    np.testing.assert_allclose(rewards.turn, [[0, 1], [0, 0.5]], atol=1e-6)  # same code


def test_alpha_zero_is_no_shaping():
    group = [trajectory([OK, NO_CALL], True), trajectory([OK, NO_CALL])]
    np.testing.assert_array_equal(turn_rewards(*group, alpha=0.0), [[0, 1, 0], [0, 0, 0]])


def test_a_trajectory_without_code_gets_no_credit():
    # an invalid call is no code; the right one without code counts in |P| all the same
    group = [
        trajectory([OK, NO_CALL], True),
        trajectory([NO_CALL], True),
        trajectory([INVALID, NO_CALL]),
        trajectory([OK, NO_CALL]),
    ]
    got = turn_rewards(*group, similarity=constant(1.0))
    np.testing.assert_allclose(
        got, [[0, 1, 0], [0.9, 0, 0], [-0.1, 0, 0], [0, 0.25, 0]], atol=1e-6
    )


def test_the_code_of_all_turns_is_compared():
    seen = []

    def spy(left, right):
        seen.extend([*left, *right])
        return np.ones((len(left), len(right)))

    right = trajectory([Call("alpha = 1"), Call("beta = 2"), NO_CALL], True)
    wrong = trajectory([Call("gamma = 3"), INVALID, Call("delta = 4"), NO_CALL])
    score([right, wrong], 4, similarity=spy)
    assert {"".join(code.split()) for code in seen} == {"alpha=1beta=2", "gamma=3delta=4"}


@pytest.mark.parametrize("status", ["void", "truncated"])
def test_without_an_answer_there_is_no_credit(status):
    right = trajectory([OK, NO_CALL], True)
    got = turn_rewards(right, trajectory([OK, NO_CALL], status=status))
    np.testing.assert_array_equal(got, [[0, 1, 0], [0, 0, 0]])


def test_bad_input_is_named():
    with pytest.raises(InputError, match="3 turns, but max_turns=2"):
        score([trajectory([OK, OK, NO_CALL])], 2)
    with pytest.raises(InputError, match="overlong_buffer=10"):
        score([trajectory([OK, NO_CALL])], 2, overlong_buffer=10)


@pytest.mark.parametrize(
    "status, options",
    [
        ("tool_failure", {}),
        ("void", {"drop_void": True}),
        ("truncated", {"drop_truncated": True}),
    ],
)
def test_what_leaves_does_so_before_shaping(status, options):
    """Neither a model for the others' code nor credited itself."""
    sim = constant(1.0)
    gone = trajectory([OK, OK], correct=True, status=status)
    wrong = trajectory([OK, NO_CALL])
    got = turn_rewards(gone, wrong, similarity=sim, **options)
    np.testing.assert_array_equal(got, np.zeros((2, 3)))
    # ... nor one of |P|: 0.5 / 1, not 0.5 / 2
    half = lambda left, right: np.array(  # noqa: E731
        [[float("solve" in a and "solve" in b) for b in right] for a in left]
    )
    solve = [Call("solve()"), NO_CALL]
    got = turn_rewards(
        gone, trajectory(solve, True), trajectory(solve), similarity=half, **options
    )
    np.testing.assert_allclose(got, [[0, 0, 0], [0, 1, 0], [0, 0.5, 0]], atol=1e-6)


def test_right_ones_of_another_problem_do_not_help():
    group = [trajectory([OK, NO_CALL], True, problem="a"), trajectory([OK, NO_CALL])]
    np.testing.assert_array_equal(turn_rewards(*group), [[0, 1, 0], [0, 0, 0]])


# --- overlong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "length, penalty",
    # Lmax 100, buffer 20: free up to 80; 81 -> -1/20; 90 -> -10/20; 100 -> -20/20; floor -1
    [(79, 0), (80, 0), (81, -0.05), (90, -0.5), (100, -1), (101, -1), (130, -1)],
)
@pytest.mark.parametrize("correct", [True, False])
def test_overlong(length, penalty, correct):
    one = trajectory([OK, NO_CALL], correct, length=length - 4)
    one.turns[0].feedback_tokens = [9, 9, 9]  # feedback counts: length-4 + 3 + 1
    assert one.response_length() == length
    rewards, _, _ = score([one], 3, overlong_buffer=20, max_tokens=100)
    np.testing.assert_allclose(rewards.turn, [[0, correct + penalty, 0]], atol=1e-6)
    np.testing.assert_allclose(rewards.outcome, [correct + penalty], atol=1e-6)
    np.testing.assert_array_equal(rewards.format_ok, [1])


def test_overlong_is_off_by_default():
    one = trajectory([OK, NO_CALL], True, length=500)
    rewards, _, _ = score([one], 2)
    np.testing.assert_array_equal(rewards.turn, [[0, 1]])
    np.testing.assert_array_equal(rewards.outcome, [1])


def test_an_overlong_right_one_is_still_a_model_for_the_others():
    # right but 90 long: 1 - 0.5; the wrong one of the same code keeps its 0.5
    group = [trajectory([OK, NO_CALL], True, length=89), trajectory([OK, NO_CALL])]
    got = turn_rewards(*group, overlong_buffer=20, max_tokens=100)
    np.testing.assert_allclose(got, [[0, 0.5, 0], [0, 0.5, 0]], atol=1e-6)


# --- edges ---------------------------------------------------------------------------------


def test_a_trajectory_without_turns_has_an_empty_row():
    rewards, mask, _ = score([trajectory([]), trajectory([OK, NO_CALL], True)], 2)
    np.testing.assert_array_equal(mask, [[False, False], [True, True]])
    np.testing.assert_array_equal(rewards.turn, [[0, 0], [0, 1]])


def test_scoring_changes_no_trajectory():
    one = trajectory([OK, INVALID, NO_CALL], True)
    before = repr(one)
    score([one], 3, invalid_on_syntax_error=True, overlong_buffer=1, max_tokens=2)
    assert repr(one) == before
