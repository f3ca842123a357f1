"""The deterministic mode against the fast one, with the real engine: where do tokens part?

A random model over a vocabulary in which one token is a whole call and one is the end, so that
it calls tools without having learnt anything; the tools take their time at random.
"""

import random
import threading
from concurrent.futures import Future

import numpy as np
import pytest
from scripted import FORM, TASK

from gtpo_jax.model import transformer
from gtpo_jax.model.caches import per_layer
from gtpo_jax.model.config import ModelConfig
from gtpo_jax.model.engine import Engine
from gtpo_jax.rl.rollout import RolloutConfig, rollout
from gtpo_jax.tasks.types import Judges, Problem
from gtpo_jax.tools.sandbox import Result

CALL, BOX, END = range(57, 60)


class Vocabulary:
    """Sixty tokens: letters, a call, an answer, the end."""

    vocab_size, end_ids = 60, (END,)
    texts = (*(chr(65 + i) for i in range(57)), "\n```python\nx\n```", "\\boxed{42}", "")

    def encode(self, text):
        return [ord(c) % 57 for c in text][:12]

    def decode(self, ids):
        return "".join(self.texts[i] for i in ids)

    def render(self, messages):
        return self.encode(messages[0]["content"])

    def harmless(self, text):
        return text


class Tools:
    """Results after up to 20 ms."""

    def submit(self, code, history, setup):
        future = Future()
        result = Result("ok", "done\n", 0.0)
        threading.Timer(random.uniform(0, 0.02), future.set_result, [result]).start()
        return future


def play(dtype, deterministic, slots, width):
    config = ModelConfig(60, 32, 2, 4, 2, 8, 48, 128, dtype=dtype, param_dtype=dtype)
    params = transformer.init(config, 3)
    # Calls and ends are likelier than chance, or turns would not end before the budget does.
    params["embed"] = params["embed"].at[CALL:].multiply(3.0)
    engine = Engine(config, slots, 110, (CALL, END), width=width, rows=(4,), lengths=(16, 32))
    engine.refresh(per_layer(config, params))
    problems = [
        Problem(str(i), "t", ({"role": "user", "content": "Q" * (3 + i)},), "42")
        for i in range(4)
    ]
    limits = RolloutConfig(4, 90, chunk=8, deterministic=deterministic)
    return rollout(
        engine,
        Vocabulary(),
        FORM,
        Judges(None, Tools()),
        TASK,
        problems,
        6,
        limits,
        0,
        0,
    )


def sequence(t):
    """(token, its logprob, or None where it was not sampled) of a whole response."""
    out = []
    for turn in t.turns:
        out += zip(turn.tokens, turn.logprobs, strict=True)
        out += [(token, None) for token in turn.feedback_tokens]
    return out


@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-4), ("bfloat16", 0.05)])
def test_tokens_part_at_near_ties_only(dtype, close, capsys):
    first, stats = play(dtype, True, 12, 0)
    assert play(dtype, True, 12, 0)[0] == first  # to the bit
    # Nothing is prefilled twice: a prompt once a group, but for the token that decoding begins
    # with, and of each turn its feedback, with such a token before it and without one after.
    prompts = {t.problem.id: len(t.prompt_tokens) - 1 for t in first}
    feedback = sum(len(turn.feedback_tokens) for t in first for turn in t.turns)
    assert stats.prefilled == sum(prompts.values()) + feedback
    assert sum(len(t.turns) for t in first) > 1.3 * len(first)
    parted, tokens = 0, 0
    for a, b in zip(first, play(dtype, False, 9, 4)[0], strict=True):
        one, other = sequence(a), sequence(b)
        same = [x[0] for x in one] == [x[0] for x in other]
        parted += not same
        for (token, logprob), (its, theirs) in zip(one, other, strict=False):
            if token != its:
                break
            tokens += 1
            assert (logprob is None) == (theirs is None)
            if logprob is not None:
                np.testing.assert_allclose(logprob, theirs, atol=close)
        assert not same or (a.status, a.answer) == (b.status, b.answer)
    with capsys.disabled():
        print(f" [{dtype}: {parted} of {len(first)} trajectories part, {tokens} tokens alike]")
    assert parted <= (0 if dtype == "float32" else len(first) // 2)
