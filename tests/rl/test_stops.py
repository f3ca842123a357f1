"""Wherever a trajectory stops, what is kept of it fits together and its status says why."""

from concurrent.futures import Future

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scripted import END, Characters, Pairs, block, play

from gtpo_jax.rl.packing import pack
from gtpo_jax.tools.sandbox import Result
from gtpo_jax.tools.toolcall import Call


class Tools:
    """At once, and as much output or as bad a status as the code names."""

    def submit(self, code, history, setup):
        status, _, size = code.partition(" ")
        future = Future()
        future.set_result(Result(status, "x" * int(size or 0), 0.0))
        return future


pieces = st.one_of(
    st.sampled_from(["", "words ", "`", "``", "\n", "```python\n", "\\boxed{42}", "<pad>"]),
    st.builds(
        lambda status, size: "\n" + block(f"{status} {size}"),
        st.sampled_from(["ok", "error", "infra"]),
        st.integers(0, 90),
    ),
)
turns = st.lists(pieces, max_size=4).map("".join).map(lambda text: text + "<end>")
members = st.lists(st.lists(turns, min_size=6, max_size=6), min_size=1, max_size=4)


@settings(deadline=None, max_examples=300)
@given(
    members,
    st.integers(1, 150),
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from([Characters, Pairs]),
)
@example([["<end>"] * 6], 1, 1, 1, 1, True, Characters)  # nothing but the end
@example([["```python\n<end>"] * 6], 60, 3, 7, 1, True, Characters)  # an end within code
@example([["\n" + block("ok 90") + "<end>"] * 6], 60, 3, 7, 1, True, Characters)
def test_wherever_it_stops(members, budget, max_turns, chunk, slots, mode, tokenizer):
    done = play(
        Tools(),
        *members,
        tokenizer=tokenizer(),
        slots=slots,
        max_length=2 + budget,
        max_tokens=budget,
        max_turns=max_turns,
        chunk=chunk,
        deterministic=mode,
    )
    decode = tokenizer().decode
    for script, t in zip(members, [done] if len(members) == 1 else done, strict=True):
        assert t.turns and t.response_length() <= budget
        for said, turn in zip(script, t.turns, strict=False):
            assert len(turn.tokens) == len(turn.logprobs) > 0
            text = decode(turn.tokens)
            assert said.removesuffix("<end>").startswith(text)
            assert END not in turn.tokens[:-1]
        assert all(turn.call is not None for turn in t.turns[:-1])
        last, ended = t.turns[-1], t.turns[-1].tokens[-1] == END
        assert not last.feedback_tokens
        match t.status:
            case "finished":
                assert t.answer == "42" and last.call is None
            case "void":
                assert t.answer is None and last.call is None and ended
            case "tool_failure":
                assert last.result.status == "infra"
            case "truncated":
                called = last.call is not None
                no_room = t.response_length() == budget
                at_the_limit = called and len(t.turns) == max_turns
                # Feedback that does not fit is not there, and its call has its result.
                too_long = called and len(t.turns) < max_turns
                assert no_room or at_the_limit or too_long
        assert all(x.result is None or isinstance(x.call, Call) for x in t.turns)
        batch = pack([t], np.ones((1, len(t.turns))), t.length(), "token_mean", budget, 1)
        whose = [0] * len(t.prompt_tokens)
        for turn in t.turns:
            whose += [1] * len(turn.tokens) + [0] * len(turn.feedback_tokens)
        sampled = np.flatnonzero(whose).tolist()
        assert np.flatnonzero(batch.weights[0]).tolist() == sampled
        assert np.flatnonzero(batch.behaviour_logprobs[0]).tolist() == sampled
        assert np.flatnonzero(batch.turn_ids[0] >= 0).tolist() == sampled
