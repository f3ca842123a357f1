"""The one door from ragged trajectories to fixed-shape rows.

Whole trajectories are packed into rows of `row_tokens`, first-fit decreasing in an order fixed
by (length, problem, member) and never by arrival. The weights written here decide how tokens
are averaged, from the whole mini-batch, so that splitting a batch afterwards, over rows,
micro-batches or devices, changes nothing.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from gtpo_jax.errors import InputError
from gtpo_jax.rl.types import Batch, Trajectory, Turn

AGGREGATIONS = ("token_mean", "sequence_mean", "turn_mean", "constant")


@dataclasses.dataclass
class Segment:
    """One trajectory as flat arrays of its own length, ready to be placed in a row."""

    order: tuple  # ties in length go by this
    tokens: np.ndarray
    turn_ids: np.ndarray
    advantages: np.ndarray
    weights: np.ndarray
    behaviour_logprobs: np.ndarray


def pack(
    trajectories: Sequence[Trajectory],
    advantages: np.ndarray,
    row_tokens: int,
    aggregation: str = "token_mean",
    constant: float = 0.0,
    rows_multiple: int = 1,
    packed: bool = True,
) -> Batch:
    """One mini-batch -> Batch of NumPy arrays [R, row_tokens], R a multiple of rows_multiple.

    advantages [N,K]. `aggregation`: `token_mean` 1 / all sampled tokens, `sequence_mean`
    1 / (N own tokens), `turn_mean` 1 / (turns own turn's tokens), `constant` 1 / (N constant).
    Not `packed`: a row for each trajectory.
    Raises InputError on an unknown aggregation or a trajectory longer than a row.
    """
    if aggregation not in AGGREGATIONS:
        raise InputError(f"aggregation {aggregation!r}: one of {', '.join(AGGREGATIONS)}")
    if aggregation == "constant" and not constant:
        raise InputError("aggregation 'constant' needs the constant length, in tokens")
    count = len(trajectories)
    all_tokens = max(sum(t.sampled_length() for t in trajectories), 1)
    all_turns = max(sum(bool(u.tokens) for t in trajectories for u in t.turns), 1)
    weights: dict[str, Callable[[Trajectory, Turn], float]] = {
        "token_mean": lambda trajectory, turn: 1.0 / all_tokens,
        "sequence_mean": lambda trajectory, turn: 1.0 / (count * trajectory.sampled_length()),
        "turn_mean": lambda trajectory, turn: 1.0 / (all_turns * len(turn.tokens)),
        "constant": lambda trajectory, turn: 1.0 / (count * constant),
    }
    segments = [
        _segment(trajectory, row, weights[aggregation])
        for trajectory, row in zip(trajectories, np.asarray(advantages), strict=True)
    ]
    return pack_segments(segments, row_tokens, rows_multiple, packed)


def _segment(trajectory: Trajectory, advantages: np.ndarray, weight) -> Segment:
    prompt = np.array(trajectory.prompt_tokens, np.int32)
    zeros = np.zeros(len(prompt), np.float32)
    parts = [(prompt, np.full(len(prompt), -1, np.int32), zeros, zeros, zeros)]
    for j, turn in enumerate(trajectory.turns):
        sampled, given = len(turn.tokens), len(turn.feedback_tokens)
        zeros = np.zeros(given, np.float32)

        def column(value, sampled=sampled, zeros=zeros):
            return np.concatenate([np.full(sampled, value, np.float32), zeros])

        parts.append(
            (
                np.array(turn.tokens + turn.feedback_tokens, np.int32),
                np.concatenate([np.full(sampled, j), np.full(given, -1)]).astype(np.int32),
                column(advantages[j]),
                column(weight(trajectory, turn) if sampled else 0.0),
                np.concatenate([np.array(turn.logprobs, np.float32), zeros]),
            )
        )
    order = (trajectory.problem.id, trajectory.member)
    return Segment(order, *(np.concatenate(column) for column in zip(*parts, strict=True)))


def pack_segments(
    segments: Sequence[Segment], row_tokens: int, rows_multiple: int = 1, packed: bool = True
) -> Batch:
    """Place segments in rows: first-fit decreasing."""
    rows: list[list[Segment]] = []
    room: list[int] = []
    for segment in sorted(segments, key=lambda s: (-len(s.tokens), s.order)):
        length = len(segment.tokens)
        if length > row_tokens:
            raise InputError(
                f"trajectory {segment.order} has {length} tokens, more than "
                f"learn.row_tokens={row_tokens}; raise it, or lower rollout.max_tokens"
            )
        fitting = (r for r, left in enumerate(room) if packed and left >= length)
        row = next(fitting, None)
        if row is None:
            rows.append([])
            room.append(row_tokens)
            row = len(rows) - 1
        rows[row].append(segment)
        room[row] -= length

    count = -(-max(len(rows), 1) // rows_multiple) * rows_multiple
    shape = (count, row_tokens)
    ints = {name: np.zeros(shape, np.int32) for name in ("tokens", "positions", "segment_ids")}
    turn_ids = np.full(shape, -1, np.int32)
    names = ("advantages", "weights", "behaviour_logprobs")
    floats = {name: np.zeros(shape, np.float32) for name in names}
    for r, held in enumerate(rows):
        start = 0
        for s, segment in enumerate(held):
            place = (r, slice(start, start + len(segment.tokens)))
            ints["tokens"][place] = segment.tokens
            ints["positions"][place] = np.arange(len(segment.tokens))
            ints["segment_ids"][place] = s + 1
            turn_ids[place] = segment.turn_ids
            for name in names:
                floats[name][place] = getattr(segment, name)
            start += len(segment.tokens)
    return Batch(
        **ints,
        turn_ids=turn_ids,
        loss_index=loss_index(turn_ids),
        **floats,
        old_logprobs=np.zeros(shape, np.float32),
        ref_logprobs=np.zeros(shape, np.float32),
    )


def loss_index(turn_ids: np.ndarray) -> np.ndarray:
    """Positions of sampled tokens, per row, filled up with 0. [R,T] -> [R,T]."""
    index = np.zeros(turn_ids.shape, np.int32)
    for r, row in enumerate(turn_ids):
        sampled = np.flatnonzero(row >= 0)
        index[r, : len(sampled)] = sampled
    return index
