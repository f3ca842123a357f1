"""Trajectories -> rewards per turn: the reward side of the table of what a turn leads to.

    r_{i,j} = r_acc_{i,j} + r_format_{i,j}
    r_acc_{i,j}    = 1 on the last turn of a right trajectory (a wrong one: `rl.shaping`)
    r_format_{i,j} = -0.1 if turn j has an invalid tool call
    r_format_{i,1} = -0.1 also if the first turn makes no call; once, never -0.2

A call that parses and then fails is a valid call that failed. `tool_failure` means that our
side failed: such a trajectory leaves here, before shaping and before any statistic.
"""

import warnings
from collections.abc import Sequence

import numpy as np

from gtpo_jax.errors import InputError
from gtpo_jax.rl.shaping import Similarity, partial_credit, token_similarity
from gtpo_jax.rl.types import Rewards, Trajectory, Turn
from gtpo_jax.tools.toolcall import Call, Invalid


def score(
    trajectories: Sequence[Trajectory],
    max_turns: int,
    format_penalty: float = 0.1,
    alpha: float = 0.5,
    similarity: Similarity = token_similarity,
    invalid_on_syntax_error: bool = False,
    drop_void: bool = False,
    drop_truncated: bool = False,
    overlong_buffer: int = 0,
    max_tokens: int = 0,
) -> tuple[Rewards, np.ndarray, np.ndarray]:
    """-> Rewards (NumPy, K = max_turns), mask [N,K] bool, groups [N] int32.

    A trajectory that is left out has a mask row of False. Groups are numbered by problem, in
    order of first appearance. `overlong_buffer` > 0 switches on DAPO's soft length penalty
    against `max_tokens` after the prompt.
    """
    away = left_out(drop_void, drop_truncated)
    numbers: dict[str, int] = {}
    groups = np.array(
        [numbers.setdefault(t.problem.id, len(numbers)) for t in trajectories], np.int32
    )
    keep = [i for i, t in enumerate(trajectories) if t.turns and t.status not in away]

    kept = [trajectories[i] for i in keep]
    shape = (len(trajectories), max_turns)
    turn, mask = np.zeros(shape, np.float32), np.zeros(shape, bool)
    outcome, format_ok = np.zeros(shape[0], np.float32), np.zeros(shape[0], np.float32)
    credit = partial_credit(
        # Without an answer there is no wrong answer to shape: r_acc of void and truncated is 0.
        [all_code(t) if t.status == "finished" else "" for t in kept],
        [t.correct for t in kept],
        groups[keep],
        alpha,
        similarity,
    )
    for i, trajectory, r_acc in zip(keep, kept, credit, strict=True):
        turns = len(trajectory.turns)
        if turns > max_turns:
            raise InputError(f"a trajectory of {turns} turns, but max_turns={max_turns}")
        penalised = [
            has_format_error(t, j == 0, invalid_on_syntax_error)
            for j, t in enumerate(trajectory.turns)
        ]
        mask[i, :turns] = True
        turn[i, :turns] = np.where(penalised, -format_penalty, 0.0)
        overlong = overlong_penalty(trajectory.response_length(), max_tokens, overlong_buffer)
        turn[i, turns - 1] += r_acc + overlong
        outcome[i] = float(trajectory.correct) + overlong
        format_ok[i] = not any(penalised)
    return Rewards(turn, outcome, format_ok), mask, groups


def left_out(drop_void: bool = False, drop_truncated: bool = False) -> list[str]:
    """The statuses that are in no statistic and no loss."""
    dropped = {"void": drop_void, "truncated": drop_truncated}
    return ["tool_failure", *(status for status, drop in dropped.items() if drop)]


def has_format_error(turn: Turn, first: bool, invalid_on_syntax_error: bool = False) -> bool:
    """An invalid call, or no call at all in the first turn."""
    if isinstance(turn.call, Invalid) or (first and turn.call is None):
        return True
    return (
        invalid_on_syntax_error
        and isinstance(turn.call, Call)
        and not _compiles(turn.call.code)
    )


def all_code(trajectory: Trajectory) -> str:
    """All code the trajectory ran, in order."""
    return "\n".join(t.call.code for t in trajectory.turns if isinstance(t.call, Call))


def overlong_penalty(length: int, max_tokens: int, buffer: int) -> float:
    """DAPO (arXiv 2503.14476): 0 up to max_tokens - buffer, falling linearly to -1."""
    if buffer <= 0:
        return 0.0
    if max_tokens < buffer:
        raise InputError(f"overlong_buffer={buffer} needs max_tokens >= it, not {max_tokens}")
    return float(np.clip((max_tokens - buffer - length) / buffer, -1.0, 0.0))


def _compiles(code: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # '\d' is bad style, not a bad call
            compile(code, "<code>", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
