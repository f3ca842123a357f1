"""Whether decoding waits for tools: scripted turns and tool latencies, a real engine.

    python -m benchmarks.rollout --model=smollm2-135m --width=16 --slots=24

Prints one JSON line. Random weights decode for real; what is said is a script: 1 to 8 turns a
trajectory, of log-normal lengths, each but the last ending in a call whose result comes after
0.05 to 2 s. The same script runs three ways, alternating: with these tools, with instant ones,
and by the naive loop (a batch at a time, all wait for the slowest tool, then the whole
conversation is prefilled again). Useful are the slot steps whose token is part of a trajectory.
"""

import heapq
import itertools
import json
import os
import platform
import statistics
import threading
import time
from concurrent.futures import Future

import jax
import numpy as np

from benchmarks.shapes import load
from gtpo_jax.errors import command_parser, run_command
from gtpo_jax.model.caches import per_layer
from gtpo_jax.model.engine import Engine
from gtpo_jax.rl.rollout import RolloutConfig, rollout
from gtpo_jax.tasks.types import Judges, Problem, Task, Verdict
from gtpo_jax.tools.sandbox import Result
from gtpo_jax.tools.toolcall import FORMATS

WORD, CALL, ANSWER, END = 10, 11, 12, 13  # token ids; a prompt's tokens are 20 + its number
TEXTS = {WORD: "a ", CALL: "\n```python\nf()\n```", ANSWER: "\\boxed{1}", END: ""}
PROMPT, FEEDBACK = 64, 24  # tokens


class Tokens:
    """The ids above; any text is feedback."""

    vocab_size, end_ids = 20, (END,)

    def encode(self, text):
        """FEEDBACK words."""
        return [WORD] * FEEDBACK

    def decode(self, ids):
        """What they stand for."""
        return "".join(TEXTS[i] for i in ids)

    def render(self, messages):
        """A prompt that tells problems apart."""
        return [20 + int(messages[0]["content"])] * PROMPT

    def harmless(self, text):
        """As it is."""
        return text


class Scripted(Engine):
    """Decodes for real, says what the script says: `scripts[problem]` lists its members'
    turns, each a list of ids."""

    def script(self, scripts: list[list[list[list[int]]]]) -> None:
        """What is said from now on."""
        self.members = [iter(members) for members in scripts]
        self.turns = [[] for _ in range(self.slots)]

    def _start(self, slot, prompt, key):
        super()._start(slot, prompt, key)
        self.turns[slot] = [list(turn) for turn in next(self.members[prompt[0] - 20])]

    def append(self, slots, feedback):
        """The next turn of the script comes."""
        super().append(slots, feedback)
        for slot in slots:
            self.turns[slot].pop(0)

    def decode(self, slots, steps, limits):
        """No further than the turn goes."""
        limits = [
            min(limit, len(self.turns[s][0])) for s, limit in zip(slots, limits, strict=True)
        ]
        out = []
        for slot, (tokens, logprobs) in zip(
            slots, super().decode(slots, steps, limits), strict=True
        ):
            turn, count = self.turns[slot][0], len(tokens)
            self.turns[slot][0] = turn[count:]
            if count:
                self.tokens[slot][-count:] = turn[:count]
            out.append((turn[:count], logprobs))
        return out


class Tools:
    """Results that come after the latencies of a script, or at once."""

    def __init__(self, latencies) -> None:
        self.latencies, self.due, self.more = latencies, [], threading.Condition()
        self.number = itertools.count()
        threading.Thread(target=self._serve, daemon=True).start()

    def submit(self, code, history=(), setup=""):
        """A future of the result."""
        future = Future()
        with self.more:
            at = time.perf_counter() + next(self.latencies)
            heapq.heappush(self.due, (at, next(self.number), future))
            self.more.notify()
        return future

    def _serve(self):
        while True:
            with self.more:
                now = time.perf_counter()
                while not self.due or self.due[0][0] > now:
                    self.more.wait(self.due[0][0] - now if self.due else None)
                    now = time.perf_counter()
                future = heapq.heappop(self.due)[2]
            future.set_result(Result("ok", "1\n", 0.0))


def right(problem, answer, judges) -> Future:
    """Every answer is."""
    future: Future = Future()
    future.set_result(Verdict("right"))
    return future


TASK = Task(
    load=None, prompt="", answer=lambda text: "1" if "boxed" in text else None, verify=right
)


def naive(engine: Scripted, scripts, tools: Tools, chunk: int) -> None:
    """A batch at a time; all wait for all; every turn begins with a prefill of everything."""
    told = [(p, turns) for p, members in enumerate(scripts) for turns in members]
    for first in range(0, len(told), engine.width):
        batch = told[first : first + engine.width]
        histories = [[20 + p] * PROMPT for p, _ in batch]
        for number in itertools.count():
            going = [i for i, (_, turns) in enumerate(batch) if number < len(turns)]
            if not going:
                break
            slots = range(len(going))
            keys = np.zeros((len(going), 2), np.uint32)
            engine.reset()
            engine.script(
                [
                    [batch[i][1][number:] for i in going if batch[i][0] == p]
                    for p in range(len(scripts))
                ]
            )
            engine.prefill(slots, [histories[i] for i in going], keys)
            left = {s: len(batch[i][1][number]) for s, i in zip(slots, going, strict=True)}
            while left:
                out = engine.decode(list(left), chunk, list(left.values()))
                for slot, (tokens, _) in zip(list(left), out, strict=True):
                    left[slot] -= len(tokens)
                left = {s: n for s, n in left.items() if n}
            waiting = []
            for i in going:
                histories[i] = histories[i] + batch[i][1][number] + [WORD] * FEEDBACK
                if number + 1 < len(batch[i][1]):
                    waiting.append(tools.submit(""))
            for future in waiting:
                future.result()
    engine.reset()


def write(problems: int, samples: int, median: int, seed: int):
    """The script: turns of every member of every problem."""
    rng = np.random.default_rng(seed)

    def turns():
        count = int(rng.integers(1, 9))
        lengths = np.clip(rng.lognormal(np.log(median), 0.6, count), 2, 8 * median).astype(int)
        return [[WORD] * (n - 1) + [CALL] for n in lengths[:-1]] + [
            [WORD] * int(lengths[-1]) + [ANSWER, END]
        ]

    return [[turns() for _ in range(samples)] for _ in range(problems)]


def main() -> None:
    """Measure, after all is compiled."""
    parser = command_parser("benchmarks.rollout", __doc__)
    parser.add_argument("--model", default="smollm2-135m", help="see benchmarks.decode")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--problems", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--width", type=int, default=16, help="slots decoded at a time")
    parser.add_argument("--slots", type=int, default=24, help="of all, waiting ones too")
    parser.add_argument("--median", type=int, default=40, help="tokens of a turn")
    parser.add_argument("--chunk", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    scripts = write(options.problems, options.samples, options.median, options.seed)
    longest = max(
        sum(map(len, turns)) + FEEDBACK * len(turns) for group in scripts for turns in group
    )
    config, params = load(options.model, dtype=options.dtype, param_dtype=options.dtype)
    engine = Scripted(config, options.slots, PROMPT + longest + 1, (), width=options.width)
    engine.refresh(per_layer(config, params))
    print(engine.warm_up(options.chunk), flush=True)
    problems = [
        Problem(str(i), "script", ({"role": "user", "content": str(i)},), "1")
        for i in range(options.problems)
    ]
    limits = RolloutConfig(8, longest + 1, chunk=options.chunk, deterministic=False)

    def play(slow: bool):
        rng = np.random.default_rng(options.seed)
        tools = Tools(rng.uniform(0.05, 2.0) if slow else 0.0 for _ in itertools.count())
        engine.script(scripts)
        done, stats = rollout(
            engine,
            Tokens(),
            FORMATS["markdown"],
            Judges(None, tools),
            TASK,
            problems,
            options.samples,
            limits,
            0,
            0,
        )
        told = [sum(map(len, turns)) for group in scripts for turns in group]
        assert [t.sampled_length() for t in done] == told
        assert all(t.status == "finished" for t in done)
        return stats

    def play_naive():
        rng = np.random.default_rng(options.seed)
        began = time.perf_counter()
        tools = Tools(rng.uniform(0.05, 2.0) for _ in itertools.count())
        naive(engine, scripts, tools, options.chunk)
        return time.perf_counter() - began

    slow, instant, loops = [], [], []
    for _ in range(options.rounds):
        slow.append(play(True))
        instant.append(play(False))
        loops.append(play_naive())
    seconds, at_once = (statistics.median(s.seconds for s in all_) for all_ in (slow, instant))
    tokens = slow[0].sampled
    report = {
        "benchmark": "rollout",
        **vars(options),
        "tokens": tokens,
        "useful_share": round(tokens / statistics.median(s.slot_steps for s in slow), 3),
        "useful_share_instant": round(
            tokens / statistics.median(s.slot_steps for s in instant), 3
        ),
        "seconds": round(seconds, 2),
        "seconds_instant_tools": round(at_once, 2),
        "times_instant": round(seconds / at_once, 3),
        "seconds_waiting": round(statistics.median(s.tool_seconds for s in slow), 2),
        "seconds_naive": round(statistics.median(loops), 2),
        "faster_than_naive": round(statistics.median(loops) / seconds, 2),
        "tokens_per_s": round(tokens / seconds, 1),
    }
    device = jax.devices()[0].device_kind
    report |= {"device": device, "cpus": len(os.sched_getaffinity(0)), "jax": jax.__version__}
    print(json.dumps(report | {"python": platform.python_version()}))


if __name__ == "__main__":
    run_command(main)
