"""The host loop that samples trajectories: decode, parse, run the tool, append, go on.

Ragged Python on this side, the engine's fixed shapes on the other. What a turn leads to:

    a valid call                         runs; its output is appended; next turn
    an invalid call                      an error text that says why is appended; next turn
    no call, an answer                   ends `finished`; the answer is read from this turn
    no call, no answer                   ends `void`
    budget, context or turn limit        ends `truncated`
    a tool result with status infra      ends `tool_failure`: our fault, never a reward

Answers are checked while decoding goes on, and looked at when all trajectories have ended. A
check that does not finish, or fails by our fault, makes its trajectory a `tool_failure` too.

Trajectories are started in the order of problems and members, and every draw has its own key.
A slot whose trajectory waits for its tool stands aside while the others decode; one that is
done is filled from the queue at once. In deterministic mode tools run concurrently too, but all
are waited for before the next chunk is decoded: then everything here is a function of (seed,
step) and the weights, to the bit, since no shape depends on how long a tool took.
"""

import dataclasses
import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future
from concurrent.futures import wait as wait_for

import numpy as np

from gtpo_jax.errors import InputError
from gtpo_jax.model.engine import Engine
from gtpo_jax.model.sampling import trajectory_keys
from gtpo_jax.model.tokenizer import Tokenizer
from gtpo_jax.rl.types import Status, Trajectory, Turn
from gtpo_jax.tasks.types import Judges, Problem, Task, Verdict
from gtpo_jax.tools.sandbox import Result
from gtpo_jax.tools.toolcall import Call, Format, Invalid


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """Per trajectory: turns, tokens after the prompt (feedback included), feedback characters.

    `system` is put before the problem's messages where it is not empty. `chunk` is how many
    tokens are decoded between two looks at the text: it changes how much is sampled in vain
    past the end of a call, never what is kept. `stateful` replays a trajectory's earlier code
    before each new block. `deterministic`: see above. Each of `stops` ends a turn where it
    appears, as the end of a call does.
    """

    max_turns: int
    max_tokens: int
    max_feedback_chars: int = 512
    system: str = ""
    chunk: int = 32
    stateful: bool = False
    deterministic: bool = True
    stops: tuple[str, ...] = ()


@dataclasses.dataclass
class RolloutStats:
    """What a rollout cost. Seconds of tools are those the engine spent waiting; slot steps
    are decoding steps times the slots in the batch, whether or not they did something."""

    seconds: float = 0.0
    tool_seconds: float = 0.0
    sampled: int = 0
    prefilled: int = 0
    slot_steps: int = 0

    def plus(self, other: "RolloutStats") -> "RolloutStats":
        """Both together."""
        mine, others = dataclasses.astuple(self), dataclasses.astuple(other)
        return RolloutStats(*(a + b for a, b in zip(mine, others, strict=True)))

    def beside(self, other: "RolloutStats") -> "RolloutStats":
        """Both at the same time."""
        seconds = max(self.seconds, other.seconds)
        return dataclasses.replace(self.plus(other), seconds=seconds)


@dataclasses.dataclass
class _Live:
    trajectory: Trajectory
    text_checked: int = 0  # tokens of the open turn already known to hold no complete call
    done: bool = False
    outcome: Future[Result | Invalid] | None = None  # of its last turn's call
    verdict: Future[Verdict] | None = None

    def end(self, status: Status) -> None:
        self.trajectory.status = status
        self.done = True


def rollout(
    engine: Engine,
    tokenizer: Tokenizer,
    form: Format,
    judges: Judges,
    task: Task,
    problems: Sequence[Problem],
    samples: int,
    limits: RolloutConfig,
    seed: int,
    step: int,
    watch: Callable[[Trajectory], None] = lambda trajectory: None,
) -> tuple[list[Trajectory], RolloutStats]:
    """Sample `samples` trajectories of every problem, in (problem, member) order; `watch` is
    called with each that is under way whenever it may have grown.

    Raises InputError where a prompt leaves no room in the engine's context.
    """
    started, prefilled, stepped = time.perf_counter(), engine.prefilled, engine.slot_steps
    stats = RolloutStats()
    longest = engine.max_length - limits.max_tokens
    prompts = {
        p.id: prompt_tokens(p, task.prompt, tokenizer, limits.system, longest) for p in problems
    }
    done = [
        Trajectory(problem, member, prompts[problem.id])
        for problem in problems
        for member in range(samples)
    ]
    keys = np.asarray(
        trajectory_keys(
            np.uint32(seed),
            np.uint32(step),
            np.array([zlib.crc32(t.problem.id.encode()) for t in done], np.uint32),
            np.array([t.member for t in done], np.uint32),
        )
    )
    waiting = deque(range(len(done)))
    live: dict[int, _Live] = {}
    holds: dict[int, str] = {}  # slot -> the problem whose prompt its cache begins with
    checked: list[tuple[Trajectory, Future[Verdict]]] = []
    while waiting or live:
        _refill(engine, done, keys, waiting, live, holds)
        _take_outcomes(engine, live, tokenizer, form, limits, stats)
        # The oldest first.
        slots = [s for s, item in live.items() if item.outcome is None and not item.done]
        said = []
        if slots:
            room = [_room(live[s].trajectory, engine, limits) for s in slots]
            for slot, (tokens, logprobs) in zip(
                slots, engine.decode(slots, limits.chunk, room), strict=True
            ):
                if tokens:  # else there was no room in the batch
                    said.append(slot)
                stats.sampled += len(tokens)
                turn = live[slot].trajectory.turns[-1]
                turn.tokens += tokens
                turn.logprobs += logprobs
        for slot in said:
            if _end_turn(engine, slot, live[slot], tokenizer, form, task, judges, limits):
                live[slot].outcome = _start_call(live[slot], judges.programs, limits)
        for item in live.values():
            watch(item.trajectory)
        for slot in [s for s in sorted(live) if live[s].done]:
            engine.release(slot)
            item = live.pop(slot)
            if item.verdict is not None:
                checked.append((item.trajectory, item.verdict))
    engine.reset()
    for trajectory, verdict in checked:
        _judge(trajectory, verdict.result())
    stats.seconds = time.perf_counter() - started
    stats.prefilled = engine.prefilled - prefilled
    stats.slot_steps = engine.slot_steps - stepped
    return done, stats


Sampler = Callable[[Sequence[Problem], int, int], tuple[list[Trajectory], RolloutStats]]


def take(problems: Sequence[Problem], start: int, count: int, seed: int) -> list[Problem]:
    """Problems number start .. start + count of an endless walk, shuffled anew each epoch."""
    out = []
    for i in range(start, start + count):
        epoch, place = divmod(i, len(problems))
        order = np.random.default_rng((seed, epoch)).permutation(len(problems))
        out.append(problems[order[place]])
    return out


def collect(
    sample: Sampler,
    problems: Sequence[Problem],
    consumed: int,
    step: int,
    seed: int,
    wanted: int,
    samples: int,
    resample_rounds: int = 0,
) -> tuple[list[Trajectory], RolloutStats, int]:
    """One step's groups: sample(problems, samples, step) of the next `wanted` problems.

    With resampling (DAPO), groups whose outcomes are all alike make room for others, which
    fill in the order in which problems were drawn; if some are still missing when the rounds
    are over, groups without spread fill the step. Returns how many problems are consumed.
    """
    kept: list[list[Trajectory]] = []
    spare: list[list[Trajectory]] = []
    total = RolloutStats()
    for _ in range(1 + resample_rounds):
        drawn = take(problems, consumed, wanted, seed)
        consumed += wanted
        trajectories, stats = sample(drawn, samples, step)
        total = total.plus(stats)
        for first in range(0, len(trajectories), samples):
            group = trajectories[first : first + samples]
            outcomes = {t.correct for t in group if t.status != "tool_failure"}
            (kept if len(outcomes) > 1 or not resample_rounds else spare).append(group)
        if len(kept) >= wanted:
            break
    groups = (kept + spare)[:wanted]
    return [t for group in groups for t in group], total, consumed


def prompt_tokens(
    problem: Problem, prompt: str, tokenizer: Tokenizer, system: str, longest: int
) -> list[int]:
    """The problem's messages as the tokenizer renders them, `system` before them and the
    task's `prompt` after the last, each where it is not empty.

    Raises InputError where they come to more than `longest` tokens.
    """
    before = ({"role": "system", "content": system},) if system else ()
    *earlier, last = problem.messages
    if prompt:
        last = {**last, "content": f"{last['content']}\n\n{prompt}"}
    tokens = tokenizer.render((*before, *earlier, last))
    if len(tokens) > longest:
        raise InputError(
            f"the prompt of {problem.id} has {len(tokens)} tokens, more than "
            f"rollout.max_prompt_tokens={longest}"
        )
    return tokens


def feedback_tokens(tokenizer: Tokenizer, form: Format, text: str, ended: bool) -> list[int]:
    """What is appended after a turn for `text`, which a format's `feedback` made; `ended`:
    whether the turn's last token is an end token."""
    return tokenizer.tool_message(text, ended) if form.message else tokenizer.encode(text)


def earlier_code(trajectory: Trajectory) -> tuple[str, ...]:
    """The code to replay: what ran to its end. What overran its limits would overrun again."""
    return tuple(
        turn.call.code
        for turn in trajectory.turns
        if isinstance(turn.call, Call) and turn.result and turn.result.status in ("ok", "error")
    )


def _refill(engine, done, keys, waiting, live, holds) -> None:
    """Fill free slots from the queue: a prompt is prefilled once, its group forks its cache."""
    free = deque(s for s in range(engine.slots) if s not in live)
    starts = []  # (slot, index)
    while free and waiting:
        problem = done[waiting[0]].problem.id
        # A free slot that already holds this prompt keeps it; else the first free one.
        slot = next((s for s in free if holds.get(s) == problem), free[0])
        free.remove(slot)
        starts.append((slot, waiting.popleft()))
    if not starts:
        return
    holder: dict[str, int] = {}
    for slot in sorted(holds):
        holder.setdefault(holds[slot], slot)
    # Forks out of slots that this very refill overwrites come first, prefills after them,
    # forks of the fresh prompts last.
    old = [(s, i) for s, i in starts if done[i].problem.id in holder]
    fresh = [(s, i) for s, i in starts if done[i].problem.id not in holder]
    _fork(engine, done, keys, old, holder)
    first: dict[str, int] = {}
    for slot, i in fresh:
        first.setdefault(done[i].problem.id, slot)
    heads = [(s, i) for s, i in fresh if first[done[i].problem.id] == s]
    if heads:
        index = [i for _, i in heads]
        engine.prefill(
            [s for s, _ in heads], [done[i].prompt_tokens for i in index], keys[index]
        )
    _fork(engine, done, keys, [(s, i) for s, i in fresh if (s, i) not in heads], first)
    for slot, i in starts:
        holds[slot] = done[i].problem.id
        done[i].turns.append(Turn([], []))
        live[slot] = _Live(done[i])


def _fork(engine, done, keys, starts, holder) -> None:
    if starts:
        index = [i for _, i in starts]
        engine.fork(
            [holder[done[i].problem.id] for i in index],
            [s for s, _ in starts],
            [len(done[i].prompt_tokens) for i in index],
            keys[index],
        )


def _room(trajectory: Trajectory, engine: Engine, limits: RolloutConfig) -> int:
    """Tokens this trajectory may still sample."""
    return min(
        limits.max_tokens - trajectory.response_length(),
        engine.max_length - trajectory.length(),
    )


def _end_turn(engine, slot, item: _Live, tokenizer, form, task, judges, limits) -> bool:
    """Whether the open turn is over. If so, cut it at its end and say what it was."""
    trajectory = item.trajectory
    turn = trajectory.turns[-1]

    def complete(tokens: list[int]) -> bool:
        written = tokenizer.decode(tokens)
        return form.end_of_call(written) is not None or any(s in written for s in limits.stops)

    if complete(turn.tokens):
        # The closing mark may span tokens: keep the shortest prefix that completes the call.
        keep = item.text_checked + 1
        while not complete(turn.tokens[:keep]):
            keep += 1
        del turn.tokens[keep:], turn.logprobs[keep:]
        engine.rewind(slot, trajectory.length())
    elif not (turn.tokens and turn.tokens[-1] in tokenizer.end_ids):
        item.text_checked = len(turn.tokens)
        if _room(trajectory, engine, limits) > 0:
            return False
        item.end("truncated")
        return True
    item.text_checked = 0
    text = tokenizer.decode(turn.tokens)
    turn.call = form.parse(text)
    if turn.call is None:
        trajectory.answer = task.answer(text)
        item.end("void" if trajectory.answer is None else "finished")
        if trajectory.answer is not None:
            item.verdict = task.verify(trajectory.problem, trajectory.answer, judges)
    elif len(trajectory.turns) == limits.max_turns:
        item.end("truncated")
    return True


def _judge(trajectory: Trajectory, verdict: Verdict) -> None:
    trajectory.correct = verdict.status == "right"
    trajectory.meta |= {"verdict": verdict.status, "reason": verdict.reason}
    if verdict.status in ("timeout", "infra"):
        trajectory.status = "tool_failure"


def _start_call(item: _Live, sandbox, limits) -> Future[Result | Invalid] | None:
    """The outcome of the call that ended the turn; that of an invalid one is there at once."""
    trajectory = item.trajectory
    call = trajectory.turns[-1].call
    if item.done or call is None:
        return None
    if isinstance(call, Call):
        history = earlier_code(trajectory) if limits.stateful else ()
        return sandbox.submit(call.code, history, trajectory.problem.meta.get("setup", ""))
    outcome: Future[Result | Invalid] = Future()
    outcome.set_result(call)
    return outcome


def _take_outcomes(engine, live, tokenizer, form, limits, stats) -> None:
    """Append what came back of the calls. Waits for all of them in deterministic mode, else
    for one where nothing could be decoded meanwhile."""
    pending = {s: live[s].outcome for s in sorted(live) if live[s].outcome is not None}
    if limits.deterministic or len(pending) == len(live):
        waited = time.perf_counter()
        until = ALL_COMPLETED if limits.deterministic else FIRST_COMPLETED
        wait_for(pending.values(), return_when=until)
        stats.tool_seconds += time.perf_counter() - waited
    appended = []
    for slot in [s for s, outcome in pending.items() if outcome.done()]:
        item = live[slot]
        outcome, item.outcome = item.outcome.result(), None
        turn = item.trajectory.turns[-1]
        if isinstance(outcome, Result):
            turn.result = outcome
            if outcome.status == "infra":
                item.end("tool_failure")
                continue
        text = form.feedback(outcome, limits.max_feedback_chars, tokenizer.harmless)
        ended = bool(turn.tokens) and turn.tokens[-1] in tokenizer.end_ids
        feedback = feedback_tokens(tokenizer, form, text, ended)
        if len(feedback) >= _room(item.trajectory, engine, limits):
            item.end("truncated")
            continue
        turn.feedback_tokens = feedback
        item.trajectory.turns.append(Turn([], []))
        appended.append((slot, feedback))
    if appended:
        engine.append([s for s, _ in appended], [f for _, f in appended])
