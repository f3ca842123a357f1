"""A rollout whose engine says what a script says, character by character, with the interface
and the bookkeeping of the real one: so every row of the rollout's table can be brought about.
"""

from concurrent.futures import Future

from gtpo_jax.rl.rollout import RolloutConfig, rollout
from gtpo_jax.tasks.types import Judges, Problem, Task, Verdict
from gtpo_jax.tasks.verifiers import boxed, same_number
from gtpo_jax.tools.toolcall import FORMATS

END = 0
FORM, HERMES = FORMATS["markdown"], FORMATS["hermes"]


def verify(problem, answer, judges):
    """Right or wrong at once; answers that are no judgement say so themselves."""
    verdict = Future()
    same = "right" if same_number(problem.answer, answer) else "wrong"
    verdict.set_result(Verdict(answer if answer in ("timeout", "infra") else same))
    return verdict


TASK = Task(lambda *_: [], "", boxed, verify)


class Characters:
    """A tokenizer whose ids are code points; id 0 ends a turn."""

    end_ids = (END,)

    def encode(self, text):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(chr(i) for i in ids if i != END)

    def render(self, messages):
        return self.encode("".join(m["content"] for m in messages))

    def harmless(self, text):
        return text.replace("%", "_")

    def tool_message(self, text, ended):
        return self.encode(f"{'' if ended else '!'}[tool {text}]")


class Pairs(Characters):
    """Two characters a token where possible, so that closing marks span tokens."""

    def encode(self, text):
        pairs = [text[i : i + 2] for i in range(0, len(text), 2)]
        return [ord(p[0]) * 1000 + (ord(p[1]) if len(p) > 1 else 0) for p in pairs]

    def decode(self, ids):
        split = (divmod(i, 1000) for i in ids if i != END)
        return "".join(chr(a) + (chr(b) if b else "") for a, b in split)


class ScriptedEngine:
    """Says `scripts[prompt text][member]`: a list of turns, each ended by END if it says so."""

    def __init__(self, scripts, tokenizer, slots=3, max_length=400):
        self.scripts, self.tokenizer = scripts, tokenizer
        self.slots, self.max_length, self.prefilled = slots, max_length, 0
        self.slot_steps = 0
        self.tokens = [[] for _ in range(slots)]
        self.script = [None] * slots
        self.said = [0] * slots
        self.members = {}
        self.calls = []

    def _start(self, slot, prompt):
        text = self.tokenizer.decode(prompt)
        member = self.members.get(text, 0)
        self.members[text] = member + 1
        self.script[slot] = list(self.scripts[text][member])
        self.tokens[slot], self.said[slot] = list(prompt), 0

    def prefill(self, slots, prompts, keys):
        self.calls.append(("prefill", tuple(slots)))
        self.prefilled += sum(map(len, prompts))
        for slot, prompt in zip(slots, prompts, strict=True):
            self._start(slot, prompt)

    def fork(self, sources, targets, lengths, keys):
        prompts = [self.tokens[s][:n] for s, n in zip(sources, lengths, strict=True)]
        self.calls.append(("fork", tuple(targets)))
        for slot, prompt in zip(targets, prompts, strict=True):
            self._start(slot, prompt)

    def append(self, slots, feedback):
        for slot, tokens in zip(slots, feedback, strict=True):
            self.tokens[slot] += tokens
            self.script[slot].pop(0)
            self.said[slot] = 0

    def decode(self, slots, steps, limits):
        out = []
        for slot, limit in zip(slots, limits, strict=True):
            assert limit > 0
            turn = self.script[slot][0]
            ids = self.tokenizer.encode(turn.removesuffix("<end>"))
            ids += [END] if turn.endswith("<end>") else self.tokenizer.encode("~" * 500)
            new = ids[self.said[slot] :][: min(steps, limit)]
            self.said[slot] += len(new)
            self.tokens[slot] += new
            out.append((new, [-0.5] * len(new)))
        return out

    def rewind(self, slot, length):
        del self.tokens[slot][length:]

    def release(self, slot):
        pass

    def reset(self):
        self.tokens = [[] for _ in range(self.slots)]


def play(
    sandbox,
    *members,
    answer="42",
    tokenizer=None,
    slots=3,
    max_length=400,
    meta=None,
    task=TASK,
    form=FORM,
    **limits,
):
    problem = Problem("p", "t", ({"role": "user", "content": "Q?"},), answer, meta or {})
    settings = RolloutConfig(**{"max_turns": 3, "max_tokens": 200, "chunk": 7, **limits})
    tokenizer = tokenizer or Characters()
    engine = ScriptedEngine({"Q?": members}, tokenizer, slots, max_length)
    done, stats = rollout(
        engine,
        tokenizer,
        form,
        Judges(None, sandbox),
        task,
        [problem],
        len(members),
        settings,
        0,
        0,
    )
    for t in done:
        for turn in t.turns:
            assert len(turn.tokens) == len(turn.logprobs)
    assert stats.sampled >= sum(t.sampled_length() for t in done)
    return done[0] if len(done) == 1 else done


def block(code):
    return f"```python\n{code}\n```"
