"""Chat: what is shown of an answer as it grows, the command on a tiny run, and wrong input."""

import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rl.scripted import FORM, HERMES, TASK, Characters, Pairs, ScriptedEngine, block

from configs import tiny
from gtpo_jax import build, chat, sft
from gtpo_jax.errors import run_command
from gtpo_jax.model.sampling import Sampling
from gtpo_jax.rl.rollout import RolloutConfig, rollout
from gtpo_jax.tasks import arithmetic
from gtpo_jax.tasks.types import Judges, Problem
from gtpo_jax.tools.sandbox import Sandbox

ROOT = Path(__file__).parents[1]
CALL, ANSWER = "So:\n" + block("print(6 * 7)"), "It is \\boxed{42}<end>"


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(1, "process", ()) as made:
        yield made


def shown(sandbox, *turns, tokenizer=None, form=FORM, terminal=False, setup="", **limits):
    """What a chat writes of these turns, a list of what each look added, and the whole."""
    tokenizer = tokenizer or Characters()
    file = io.StringIO()
    colours = {"force_terminal": True, "color_system": "standard", "_environ": {}}
    screen = chat.Screen(tokenizer, form, Console(file=file, **(colours if terminal else {})))
    problem = Problem("p", "t", ({"role": "user", "content": "Q?"},), "", {"setup": setup})
    grown = []

    def watch(trajectory):
        screen.show(trajectory)
        grown.append(file.getvalue())

    settings = RolloutConfig(**{"max_turns": 3, "max_tokens": 300, "chunk": 4, **limits})
    engine = ScriptedEngine({"Q?": [turns]}, tokenizer, 1, 400)
    judges = Judges(None, sandbox)
    (done,), _ = rollout(
        engine, tokenizer, form, judges, TASK, [problem], 1, settings, 0, 0, watch
    )
    screen.end(done)
    return file.getvalue(), grown


def timeless(text):
    return re.sub(r"\d+\.\d\d s", "0.00 s", text)


EXPECTED = """[turn 1]
So:
```python
print(6 * 7)
```
[output: ok, 0.00 s]
42
[turn 2]
It is \\boxed{42}
[finished: 42]
"""


@pytest.mark.parametrize("tokenizer", [Characters, Pairs])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_turns_code_and_output_in_order_whatever_the_chunk(sandbox, tokenizer, chunk):
    text, _ = shown(sandbox, CALL, ANSWER, tokenizer=tokenizer(), chunk=chunk)
    assert timeless(text) == EXPECTED


def test_text_appears_as_it_is_made(sandbox):
    text, grown = shown(sandbox, CALL, ANSWER, chunk=4)
    assert len(set(grown)) > 8
    assert all(text.startswith(part) for part in grown)


def test_a_terminal_gets_colours(sandbox):
    text, _ = shown(sandbox, CALL, ANSWER, terminal=True)
    assert "\x1b[36m```python" in text.replace("\x1b[0m", "")
    assert "\x1b[33m42\x1b[0m" in text
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert timeless(plain) == EXPECTED


def test_errors_invalid_calls_and_limits_are_shown(sandbox):
    text, _ = shown(sandbox, block("print(x)"), "```python\nprint(1)<end>", "nothing<end>")
    assert "[output: error, " in text and "NameError: name 'x' is not defined" in text
    assert "[invalid call]\nunclosed ```python block\n" in text
    assert text.endswith("[turn 3]\nnothing\n[void]\n")
    text, _ = shown(sandbox, block("print('y' * 99)"), max_tokens=60)
    assert "y" * 99 in text and text.endswith("[truncated]\n")
    text, _ = shown(sandbox, "on and on", max_tokens=20)
    assert text == "[turn 1]\non and on" + "~" * 11 + "\n[truncated]\n"


def test_other_formats_and_the_problems_own_code(sandbox):
    call = HERMES.write("print(peek())")
    setup = "def peek():\n    return 5\n"
    text, _ = shown(sandbox, call, ANSWER, form=HERMES, setup=setup, terminal=True)
    assert "\x1b[36m<tool_call>" in text.replace("\x1b[0m\x1b[36m", "")
    assert "\x1b[33m5\x1b[0m" in text


def test_nothing_that_is_said_commands_the_terminal(sandbox):
    code = "print('\\x1b]0;title\\x07 \\x9b2J')"
    text, _ = shown(sandbox, block(code), "\x1b[2J\u202e\\boxed{1}<end>")
    assert not set("\x1b\x07\x9b\u202e") & set(text)
    assert "\\x1b]0;title\\x07 \\x9b2J" in text and "\\x1b[2J\\u202e" in text
    assert chat.printable("naïve\t\n日本 🙂") == "naïve\t\n日本 🙂"


def test_half_a_character_waits(sandbox):
    class Bytes(Characters):
        end_ids = (300,)

        def encode(self, text):
            return list(text.encode())

        def decode(self, ids):
            return bytes(i for i in ids if i != 300).decode(errors="replace")

    text, grown = shown(sandbox, "日本 \\boxed{3}", tokenizer=Bytes(), chunk=1, max_tokens=16)
    assert not any("\ufffd" in part for part in grown)
    assert text.startswith("[turn 1]\n日本 \\boxed{3}")


# --- the command ---

SEED = 6  # its first trace has two calls, one of a function of the problem's own
TRACE = arithmetic.traces(SEED, 1)[0]
QUESTION = TRACE.problem.messages[0]["content"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that knows one trace by heart, and its config beside it."""
    config = tiny.get_config()
    config.seed = SEED
    config.update_from_flattened_dict(
        {
            "model.width": 32,
            "model.head_dim": 8,
            "model.hidden": 64,
            "sandbox.isolation": "process",
            "sandbox.workers": 1,
            "task.eval_count": 1,
            "rollout.problems": 1,
            "rollout.samples": 1,
            "learn.minibatches": 1,
            "sft.traces": 1,
            "sft.held_out": 2,
            "sft.rows": 1,
            "sft.micro_rows": 1,
            "model.layers": 1,
            "sft.steps": 80,
            "sft.warmup": 1,
            "sft.stop_accuracy": 0.0,
        }
    )
    folder = tmp_path_factory.mktemp("run")
    sft.run(config, folder)
    (folder / "config.json").write_text(config.to_json_best_effort())
    return folder


def chat_process(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "gtpo_jax.chat", *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_one_shot_prints_turns_code_and_output(run):
    setup = f"--setup={TRACE.problem.meta['setup']}"
    one_shot = (f"--problem={QUESTION}", "--temperature=0", setup)
    process = chat_process(f"--workdir={run}", *one_shot)
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    peek, subtract, box = TRACE.turns
    value = re.search(r"print\((\d+)\)", setup)[1]
    assert timeless(out) == (
        f"[turn 1]\n{peek.text}\n[output: ok, 0.00 s]\n{value}\n"
        f"[turn 2]\n{subtract.text}\n[output: ok, 0.00 s]\n{TRACE.problem.answer}\n"
        f"[turn 3]\n{box.text}\n[finished: {TRACE.problem.answer}]\n"
    )


def test_several_problems_are_answered_until_exit(run):
    process = chat_process(
        f"--workdir={run}", "--temperature=0", "--config.rollout.max_turns=1"
    )
    out, errors = process.communicate(
        f"{QUESTION}\n\n{'Too long? ' * 40}\n{QUESTION}\nexit\n{QUESTION}\n"
    )
    assert process.returncode == 0, errors
    assert out.count("[turn 1]") == out.count("[truncated]") == 2
    assert "error: the prompt of chat/1 has" in errors


def test_ctrl_c_ends_an_answer_and_not_the_chat(run, sandbox, monkeypatch):
    """The engine that was interrupted answers the next problem as if nothing had been."""
    config = chat.one_at_a_time(chat.get_config(str(run)))
    file, policy = io.StringIO(), build.from_run(run)
    parts = (config, policy, Judges(None, sandbox), Sampling(0.0), "def peek(): print(7)")
    answer = chat.answerer(*parts, Console(file=file))
    answer(QUESTION, 0)
    whole = timeless(file.getvalue())
    show, looks = chat.Screen.show, iter(range(100))

    def pressed(*arguments):
        show(*arguments)
        if next(looks) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(chat.Screen, "show", pressed)
    answer(QUESTION, 1)
    monkeypatch.undo()
    answer(QUESTION, 0)
    text = timeless(file.getvalue()).removeprefix(whole)
    interrupted, after = text.split("[interrupted]\n")
    assert interrupted.startswith("[turn 1]\n") and after == whole


def test_the_end_of_the_input_and_the_word_exit_end_what_is_typed(monkeypatch):
    lines = iter(["one", KeyboardInterrupt, "  ", " two ", EOFError])

    def read(_):
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    assert list(chat.typed()) == ["one", "two"]
    lines = iter(["one", "exit", "two"])
    assert list(chat.typed()) == ["one"]


WRONG = {
    "neither": ([], "one of --workdir=RUN and --model=FOLDER is needed"),
    "both": (["--workdir=RUN", "--model=x"], "one of --workdir=RUN and --model=FOLDER"),
    "no run": (["--workdir=/no/such"], "/no/such has no config.json"),
    "no checkpoint": (["--workdir=/no/such", "--config=configs/tiny.py"], "no model.json"),
    "no model": (["--model=/no/such"], "/no/such"),
    "temperature": (["--workdir=RUN", "--temperature=-1"], "temperature=-1.0 must be at least"),
    "no number": (["--workdir=RUN", "--temperature=hot"], "hot"),
    "misspelt key": (["--workdir=RUN", "--config.rolout.chunk=1"], "'rollout.chunk'"),
    "misspelt flag": (["--workdir=RUN", "--problm=x"], "problm"),
    "too long": (["--workdir=RUN", f"--problem={'Too long? ' * 40}"], "max_prompt_tokens=40"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_clear_line(case, run, monkeypatch, capsys):
    flags, expected = WRONG[case]
    argv = [flag.replace("RUN", str(run)) for flag in flags]
    monkeypatch.setattr(sys, "argv", ["chat", *argv, "--config.sandbox.isolation=process"])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        run_command(chat.main)
    assert stopped.value.code == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(lines) == 1 and expected in lines[0]


def test_help_shows_an_example():
    process = chat_process("--help")
    out, errors = process.communicate()
    assert "python -m gtpo_jax.chat --workdir=" in out and errors == ""
