"""Trajectories on disk, one JSON line each: enough to read them, and to compute losses anew."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gtpo_jax.model.tokenizer import Tokenizer
from gtpo_jax.rl.types import Array, Trajectory, Turn
from gtpo_jax.tasks.types import Problem
from gtpo_jax.tools.sandbox import Result
from gtpo_jax.tools.toolcall import Call, Invalid


def write(
    path: Path,
    step: int,
    trajectories: Sequence[Trajectory],
    tokenizer: Tokenizer,
    **per_turn: Array,
) -> None:
    """Append to `path`. `per_turn` arrays [N,K] (rewards, returns, advantages) go by turn."""
    with path.open("a", encoding="utf-8") as file:
        for i, trajectory in enumerate(trajectories):
            line = {"step": step, **_to_json(trajectory, tokenizer)}
            for name, values in per_turn.items():
                for j, turn in enumerate(line["turns"]):
                    turn[name] = float(values[i, j])
            file.write(json.dumps(line) + "\n")


def write_skipped(path: Path, step: int, problems: Sequence[Sequence[str]]) -> None:
    """Append the problems of each update that was skipped at this step."""
    with path.open("a", encoding="utf-8") as file:
        for ids in problems:
            file.write(json.dumps({"step": step, "problems": list(ids)}) + "\n")


def _to_json(trajectory: Trajectory, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "problem": dataclasses.asdict(trajectory.problem),
        "member": trajectory.member,
        "status": trajectory.status,
        "answer": trajectory.answer,
        "correct": trajectory.correct,
        "meta": trajectory.meta,
        "prompt": tokenizer.decode(trajectory.prompt_tokens),
        "prompt_tokens": trajectory.prompt_tokens,
        "turns": [
            {
                "text": tokenizer.decode(turn.tokens),
                "feedback": tokenizer.decode(turn.feedback_tokens),
                "code": turn.call.code if isinstance(turn.call, Call) else None,
                "invalid": turn.call.reason if isinstance(turn.call, Invalid) else None,
                "result": dataclasses.asdict(turn.result) if turn.result else None,
                "tokens": turn.tokens,
                "logprobs": turn.logprobs,
                "feedback_tokens": turn.feedback_tokens,
            }
            for turn in trajectory.turns
        ],
    }


def read(path: Path) -> list[tuple[Trajectory, dict[str, Any]]]:
    """The trajectories of a file, each with its raw line (step, rewards, advantages, text)."""
    out = []
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        turns = [
            Turn(
                t["tokens"],
                t["logprobs"],
                Call(t["code"])
                if t["code"] is not None
                else Invalid(t["invalid"])
                if t["invalid"] is not None
                else None,
                t["feedback_tokens"],
                Result(**t["result"]) if t["result"] else None,
            )
            for t in line["turns"]
        ]
        trajectory = Trajectory(
            Problem(**line["problem"] | {"messages": tuple(line["problem"]["messages"])}),
            line["member"],
            line["prompt_tokens"],
            turns,
            line["status"],
            line["answer"],
            line["correct"],
            line["meta"],
        )
        out.append((trajectory, line))
    return out
