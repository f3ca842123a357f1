"""The table of what a turn leads to, with a scripted engine and the real sandbox."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from scripted import (
    END,
    FORM,
    HERMES,
    TASK,
    Characters,
    Pairs,
    ScriptedEngine,
    block,
    play,
)

from gtpo_jax.errors import InputError
from gtpo_jax.rl.rollout import RolloutConfig, prompt_tokens, rollout
from gtpo_jax.sft import segment_maker
from gtpo_jax.tasks.traces import Recorded, Step, to_trace
from gtpo_jax.tasks.types import Judges, Problem, Task, Verdict
from gtpo_jax.tasks.verifiers import boxed
from gtpo_jax.tools.sandbox import Result, Sandbox
from gtpo_jax.tools.toolcall import FORMATS, Call, Invalid


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(workers=2, isolation="process", preload=()) as pool:
        yield pool


def test_valid_call_then_answer(sandbox):
    t = play(sandbox, [f"Let me see.\n{block('print(6*7)')}", "\\boxed{42}<end>"])
    assert (t.status, t.correct, t.answer) == ("finished", True, "42")
    assert t.turns[0].call == Call("print(6*7)")
    assert t.turns[0].result.status == "ok"
    decode = Characters().decode
    # The turn is cut right after the closing mark, whatever was sampled past it.
    assert decode(t.turns[0].tokens).endswith("\n```")
    assert decode(t.turns[0].feedback_tokens) == "\n```output\n42\n```\n"
    assert t.turns[1].call is None and t.turns[1].feedback_tokens == []


def test_invalid_call_gets_its_reason_and_another_turn(sandbox):
    t = play(sandbox, ["```python\nprint(1)<end>", "\\boxed{41}<end>"])
    assert isinstance(t.turns[0].call, Invalid)
    assert t.turns[0].result is None
    assert t.turns[0].call.reason.replace("```", "'''") in Characters().decode(
        t.turns[0].feedback_tokens
    )
    assert (t.status, t.correct) == ("finished", False)


def test_a_box_before_a_call_does_not_count(sandbox):
    t = play(sandbox, [f"\\boxed{{42}}\n{block('print(1)')}", "\\boxed{1}<end>"])
    assert (len(t.turns), t.answer, t.correct) == (2, "1", False)


def test_the_answer_is_read_from_the_last_turn_only(sandbox):
    t = play(sandbox, [block("print('\\\\boxed{42}')"), "I do not know.<end>"])
    assert (t.status, t.answer, t.correct) == ("void", None, False)


def test_neither_call_nor_answer_is_void(sandbox):
    t = play(sandbox, ["Hello.<end>"])
    assert (t.status, t.correct, len(t.turns)) == ("void", False, 1)


def test_empty_turn_is_void(sandbox):
    t = play(sandbox, ["<end>"])
    assert (t.status, t.turns[0].tokens) == ("void", [END])


def test_turn_limit_truncates_and_the_last_call_does_not_run(sandbox):
    t = play(sandbox, [block("print(1)")] * 3, max_turns=2)
    assert (t.status, len(t.turns), t.correct) == ("truncated", 2, False)
    assert t.turns[1].call == Call("print(1)") and t.turns[1].result is None


@pytest.mark.parametrize("budget", range(1, 60))
def test_token_budget_truncates_wherever_it_falls(sandbox, budget):
    t = play(sandbox, [block("print(12)"), "\\boxed{42}<end>"], max_tokens=budget)
    assert t.response_length() <= budget
    assert t.status == ("truncated" if budget < 52 else "finished")
    assert t.turns[-1].feedback_tokens == []


def test_failing_code_is_a_valid_call_that_failed(sandbox):
    t = play(sandbox, [block("1/0"), "\\boxed{42}<end>"])
    assert t.turns[0].call == Call("1/0")
    assert t.turns[0].result.status == "error"
    assert "line 1: ZeroDivisionError" in Characters().decode(t.turns[0].feedback_tokens)
    assert t.correct


def settled(result):
    future = Future()
    future.set_result(result)
    return future


def test_infra_is_tool_failure_and_not_an_answer():
    class Broken:
        def submit(self, *_):
            return settled(Result("infra", "no worker", 0.0))

    t = play(Broken(), [block("print(1)"), "\\boxed{42}<end>"])
    assert (t.status, t.correct, len(t.turns)) == ("tool_failure", False, 1)


def test_setup_is_there_and_out_of_sight(sandbox):
    meta = {"setup": "def peek():\n    print(7)\n"}
    t = play(sandbox, [block("print(peek())"), "\\boxed{7}<end>"], answer="7", meta=meta)
    assert Characters().decode(t.turns[0].feedback_tokens) == "\n```output\n7\nNone\n```\n"


@pytest.mark.parametrize("stateful", [False, True])
def test_state_across_turns_is_a_choice(sandbox, stateful):
    script = [block("x = 5"), block("print(x)"), "\\boxed{5}<end>"]
    t = play(sandbox, script, stateful=stateful)
    assert t.turns[1].result.status == ("ok" if stateful else "error")


@pytest.mark.parametrize("chunk", [1, 2, 5, 64])
@pytest.mark.parametrize("tokenizer", [Characters(), Pairs()])
def test_what_is_kept_does_not_depend_on_the_chunk(sandbox, chunk, tokenizer):
    t = play(
        sandbox,
        [f"a\n{block('print(3)')}", "so \\boxed{3}<end>"],
        answer="3",
        chunk=chunk,
        tokenizer=tokenizer,
    )
    assert [tokenizer.decode(u.tokens)[:20] for u in t.turns] == [
        "a\n```python\nprint(3)\n"[:20],
        "so \\boxed{3}",
    ]
    # Text past the mark inside its last token stays; whole tokens past it go.
    assert len(tokenizer.decode(t.turns[0].tokens)) in (24, 25)
    assert t.correct


def test_groups_larger_than_the_slots_prefill_each_prompt_once(sandbox):
    count = 5
    tokenizer = Characters()
    scripts = {
        f"Q{p}?": [[block(f"print({m})"), f"\\boxed{{{m}}}<end>"] for m in range(count)]
        for p in range(3)
    }
    problems = [
        Problem(f"p{p}", "t", ({"role": "user", "content": f"Q{p}?"},), "2") for p in range(3)
    ]
    engine = ScriptedEngine(scripts, tokenizer, slots=2)
    limits = RolloutConfig(max_turns=3, max_tokens=200)
    judges = Judges(None, sandbox)
    done, _ = rollout(engine, tokenizer, FORM, judges, TASK, problems, count, limits, 0, 0)
    assert [(t.problem.id, t.member) for t in done] == [
        (f"p{p}", m) for p in range(3) for m in range(count)
    ]
    assert [t.correct for t in done] == [m == 2 for _ in range(3) for m in range(count)]
    assert engine.prefilled == 3 * len("Q0?")


def test_a_prompt_that_does_not_fit_is_named(sandbox):
    problem = Problem("long", "t", ({"role": "user", "content": "x" * 300},), "1")
    engine = ScriptedEngine({}, Characters())
    limits = RolloutConfig(max_turns=2, max_tokens=200)
    with pytest.raises(InputError, match="the prompt of long has 300 tokens"):
        judges = Judges(None, sandbox)
        rollout(engine, Characters(), FORM, judges, TASK, [problem], 1, limits, 0, 0)


@pytest.mark.parametrize("status", ["timeout", "infra"])
def test_a_check_that_judges_nothing_is_no_wrong_answer(sandbox, status):
    t, right = play(sandbox, [f"\\boxed{{{status}}}<end>"], ["\\boxed{42}<end>"])
    assert (t.status, t.correct, t.answer) == ("tool_failure", False, status)
    assert t.meta["verdict"] == status
    assert (right.status, right.correct) == ("finished", True)


def test_answers_are_checked_while_decoding_goes_on(sandbox):
    """The first answer's check ends only when the second trajectory's call has been made."""
    asked = []

    def slow(problem, answer, judges):
        asked.append(Future())
        if len(asked) == 2:
            for future in asked:
                future.set_result(Verdict("right"))
        return asked[-1]

    first = ["\\boxed{1}<end>"]
    second = [block("print(2)"), "\\boxed{2}<end>"]
    done = play(sandbox, first, second, task=Task(lambda *_: [], "", boxed, slow))
    assert [t.correct for t in done] == [True, True]


def test_the_tasks_prompt_follows_the_question(sandbox):
    problem = Problem("p", "t", ({"role": "user", "content": "Q?"},), "42")
    tokens = prompt_tokens(problem, "Box it.", Characters(), "Be kind. ", 100)
    assert Characters().decode(tokens) == "Be kind. Q?\n\nBox it."
    tokens = prompt_tokens(problem, "", Characters(), "", 100)
    assert Characters().decode(tokens) == "Q?"


def test_a_tool_message_closes_the_turn_unless_it_has_ended(sandbox):
    """In hermes what comes back is a message of its own; the marks of its output are broken
    up by the tokenizer, here by Characters, whose one mark is '%'."""
    call = HERMES.write("print('50%')")
    bad = "<tool_call>{}<end>"
    t = play(sandbox, [f"So.\n{call}", bad, "\\boxed{42}<end>"], form=HERMES)
    decode = Characters().decode
    assert t.turns[0].call == Call("print('50%')")
    assert decode(t.turns[0].tokens) == f"So.\n{call}"
    assert decode(t.turns[0].feedback_tokens) == "![tool 50_]"
    assert t.turns[1].call == Invalid("unclosed <tool_call>")
    assert decode(t.turns[1].feedback_tokens) == "[tool invalid call: unclosed < tool_call>]"
    assert t.correct


def test_without_tools_a_call_is_text(sandbox):
    text = block("print(6*7)") + "\n\\boxed{42}"
    t = play(sandbox, [f"{text}<end>"], form=FORMATS["none"])
    assert (t.status, t.correct, len(t.turns)) == ("finished", True, 1)
    assert t.turns[0].call is None and t.turns[0].result is None


@pytest.mark.parametrize("name", ["markdown", "code_tags", "hermes"])
def test_a_cold_start_sees_the_tokens_that_rl_will_see(sandbox, name):
    form, tokenizer = FORMATS[name], Characters()
    steps = (
        Step("Six times seven.", "print(6*7)", "42\n"),
        Step("", "print('50%')", "50%\n"),
        Step("\\boxed{42}"),
    )
    problem = Problem("p", "arithmetic", ({"role": "user", "content": "Q?"},), "42")
    trace = to_trace(Recorded(problem, steps), form, 512, tokenizer.harmless)
    segment = segment_maker(tokenizer, form, "", 0.0, 99)(trace)
    script = [turn.text for turn in trace.turns[:-1]] + [trace.turns[-1].text + "<end>"]
    t = play(sandbox, script, form=form, max_tokens=390)
    seen = list(t.prompt_tokens)
    ids = [-1] * len(seen)
    for j, turn in enumerate(t.turns):
        seen += turn.tokens + turn.feedback_tokens
        ids += [j] * len(turn.tokens) + [-1] * len(turn.feedback_tokens)
    assert segment.tokens.tolist() == seen
    assert [
        i if w else -1 for i, w in zip(segment.turn_ids, segment.weights, strict=True)
    ] == ids


@pytest.mark.parametrize("tokenizer", [Characters(), Pairs()])
def test_a_stop_text_ends_the_turn_at_its_token(sandbox, tokenizer):
    t = play(
        sandbox,
        ["It is \\boxed{42}. Question: next"],
        stops=("Question:",),
        tokenizer=tokenizer,
    )
    text = tokenizer.decode(t.turns[0].tokens)
    assert (t.status, t.correct, len(t.turns)) == ("finished", True, 1)
    assert "Question:" in text and "Question:" not in tokenizer.decode(t.turns[0].tokens[:-1])


class Rendezvous:
    """A tool whose runs end only once two of them are under way; ten seconds, else an error."""

    def __init__(self):
        self.barrier = threading.Barrier(2, timeout=10)
        self.pool = ThreadPoolExecutor(2)

    def submit(self, code, history, setup):
        def run():
            self.barrier.wait()
            return Result("ok", f"ran {code}\n", 0.0)

        return self.pool.submit(run)


def test_others_go_on_while_a_tool_runs():
    """Out of deterministic mode: member 0 waits for its tool while 1 finishes and 2 starts."""
    call, say = block("first()"), "\\boxed{42}<end>"
    members = [[call, say], ["a" * 30 + say], [block("second()"), "b" * 20 + say]]
    done = play(Rendezvous(), *members, slots=2, deterministic=False)
    assert [t.status for t in done] == ["finished"] * 3 and all(t.correct for t in done)
    assert [t.turns[0].result.output for t in (done[0], done[2])] == [
        "ran first()\n",
        "ran second()\n",
    ]


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_both_modes_give_the_same_trajectories(sandbox, slots):
    members = [
        [
            block(f"import time; time.sleep({delay})\nprint({i})"),
            "x" * 9 * i + "\\boxed{42}<end>",
        ]
        for i, delay in enumerate((0.2, 0.0, 0.1, 0.0, 0.05))
    ]
    first, second = (
        play(sandbox, *members, slots=slots, deterministic=mode) for mode in (True, False)
    )
    for a, b in zip(first, second, strict=True):
        assert [t.tokens + t.feedback_tokens for t in a.turns] == [
            t.tokens + t.feedback_tokens for t in b.turns
        ]
        assert (a.status, a.correct, a.member) == (b.status, b.correct, b.member)
