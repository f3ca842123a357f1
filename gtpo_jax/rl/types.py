"""The objects that travel through one RL step.

Host side, ragged: `Turn`, `Trajectory`. Device side, fixed shapes: `Rewards`, `Batch`.
`rl.packing.pack` is the only door between them.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from gtpo_jax.tasks.types import Problem
from gtpo_jax.tools.sandbox import Result
from gtpo_jax.tools.toolcall import Call, Invalid

Status = Literal["finished", "truncated", "void", "tool_failure"]
Array = jax.Array | np.ndarray


@dataclasses.dataclass
class Turn:
    """One action of the policy and what came back.

    `tokens` were sampled by the policy, each with its behaviour `logprobs`; `feedback_tokens`
    were not. `call` is what the turn's text parses to: a `Call`, an `Invalid` one, or None.
    """

    tokens: list[int]
    logprobs: list[float]
    call: Call | Invalid | None = None
    feedback_tokens: list[int] = dataclasses.field(default_factory=list)
    result: Result | None = None


@dataclasses.dataclass
class Trajectory:
    """Member `member` of the group sampled for `problem`."""

    problem: Problem
    member: int
    prompt_tokens: list[int]
    turns: list[Turn] = dataclasses.field(default_factory=list)
    status: Status = "truncated"
    answer: str | None = None
    correct: bool = False
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)

    def length(self) -> int:
        """Tokens of prompt, turns and feedback together."""
        return len(self.prompt_tokens) + self.response_length()

    def response_length(self) -> int:
        """Tokens after the prompt, feedback included: what the token budget counts."""
        return sum(len(t.tokens) + len(t.feedback_tokens) for t in self.turns)

    def sampled_length(self) -> int:
        """Tokens that the policy sampled: what the loss counts."""
        return sum(len(t.tokens) for t in self.turns)


class Rewards(NamedTuple):
    """What every advantage estimator gets. N trajectories, K turns, float32."""

    turn: Array  # [N, K] r_acc (shaped, on the last turn) + r_format; 0 off the mask
    outcome: Array  # [N] 1 if the final answer is right, else 0; never shaped
    format_ok: Array  # [N] 1 if no turn has a format error and there is a call, else 0


class Batch(NamedTuple):
    """Packed rows, R rows of T tokens. Segment 0 is padding; segments count from 1 in a row.

    `turn_ids` is -1 where the token is not the policy's. `loss_index` lists, per row, the
    positions of the sampled tokens, filled up with 0 (position 0 is never a sampled token).
    """

    tokens: Array  # [R, T] int32
    positions: Array  # [R, T] int32, from 0 within each segment
    segment_ids: Array  # [R, T] int32
    turn_ids: Array  # [R, T] int32
    loss_index: Array  # [R, M] int32, here M = T
    advantages: Array  # [R, T] float32
    weights: Array  # [R, T] float32
    behaviour_logprobs: Array  # [R, T] float32
    old_logprobs: Array  # [R, T] float32, filled by `score`
    ref_logprobs: Array  # [R, T] float32, filled by `score`
