"""What a run writes down: metrics.jsonl always, one line a step on the console.

Keys are `group/name`. Every line has `step` and `phase` ("train", "eval", "sft"). After a
restart, lines from steps that will be run again are dropped, so that a step is there once.

    python -m gtpo_jax.metrics runs/tiny/gtpo runs/tiny/grpo

prints the table of finished runs and draws their curves to curves.png beside the first of them.
What each key means: docs/metrics.md.
"""

import contextlib
import datetime
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
from rich import progress

from gtpo_jax.errors import InputError, command_parser, run_command

CONSOLE = {  # key -> (label, format), in the order they are printed
    "accuracy/train": ("acc", ".2f"),
    "reward/mean": ("reward", ".3f"),
    "rollout/turns_mean": ("turns", ".2f"),
    "tool/error_rate": ("tool err", ".0%"),
    "tool/invalid_rate": ("invalid", ".0%"),
    "rollout/tokens_per_s": ("tok/s", ".0f"),
    "time/rollout": ("sample", ".2fs"),
    "time/tools": ("tools", ".2fs"),
    "time/update": ("update", ".2fs"),
    "eval/accuracy": ("eval accuracy", ".3f"),
    "sft/loss": ("loss", ".3f"),
    "sft/number_accuracy": ("numbers right", ".3f"),
}

Writer = Callable[[int, Mapping[str, Any]], None]


class MetricsLog:
    """Appends to RUN/metrics.jsonl and prints; not `active` on hosts that keep silent.

    A context manager. What `config.log` names is written to besides, under the same keys. On a
    terminal a bar below the lines shows how far the run is.
    """

    def __init__(
        self,
        workdir: Path,
        from_step: int,
        active: bool = True,
        config: ConfigDict | None = None,
    ) -> None:
        self._active = active
        if not active:
            return
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        drop_from_step(path, from_step)
        self._stack = contextlib.ExitStack()
        self._file = self._stack.enter_context(path.open("a", encoding="utf-8"))
        self._writers: list[Writer] = []
        if config is not None and config.log.tensorboard:
            self._writers.append(self._stack.enter_context(tensorboard(workdir, from_step)))
        if config is not None and config.log.wandb:
            self._writers.append(self._stack.enter_context(wandb(workdir, config)))
        self._bar = self._stack.enter_context(
            progress.Progress(transient=True, disable=not sys.stdout.isatty())
        )
        self._task: progress.TaskID | None = None
        self._started = time.perf_counter()
        self._first: tuple[int, float] | None = None  # the first step here, when it was logged

    def write(self, step: int, phase: str, values: Mapping[str, Any], of: int = 0) -> None:
        """Log one line; `of` is the last step, for the console."""
        if not self._active:
            return
        line = {"step": step, "phase": phase, "time": time.time()}
        line |= {name: _plain(value) for name, value in values.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for writer in self._writers:
            writer(step, {name: line[name] for name in values})
        shown = [
            f"{label} {_format(line[key], form)}"
            for key, (label, form) in CONSOLE.items()
            if key in line
        ]
        now = time.perf_counter()
        if phase != "eval" and of:
            first, began = self._first = self._first or (step, now)
            if step > first:
                left = max(0.0, (of - 1 - step) * (now - began) / (step - first))
                shown.append(f"left {datetime.timedelta(seconds=round(left))}")
        total = f"/{of}" if of else ""
        text = f"[{now - self._started:6.1f}s] {phase} {step}{total}  " + "  ".join(shown)
        if sys.stdout.isatty():
            if of and self._task is None:
                self._task = self._bar.add_task("", total=of)
            if self._task is not None:
                self._bar.update(self._task, completed=step + (phase == "train"))
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._active:
            self._stack.close()


@contextlib.contextmanager
def tensorboard(workdir: Path, from_step: int) -> Iterator[Writer]:
    """Writes to RUN/tensorboard; after a restart, what came after `from_step` is hidden."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise InputError("log.tensorboard: pip install 'gtpo_jax[tensorboard]'") from None
    with SummaryWriter(str(workdir / "tensorboard"), purge_step=from_step) as writer:

        def write(step: int, values: Mapping[str, Any]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        yield write


@contextlib.contextmanager
def wandb(workdir: Path, config: ConfigDict) -> Iterator[Writer]:
    """Writes to the project `config.log.wandb`; one run folder is one run there."""
    try:
        import wandb
    except ImportError:
        raise InputError(
            f"log.wandb={config.log.wandb}: pip install 'gtpo_jax[wandb]'"
        ) from None
    name = str(workdir.absolute())
    run = wandb.init(
        project=config.log.wandb,
        name=workdir.name,
        id=hashlib.sha256(name.encode()).hexdigest()[:16],
        resume="allow",
        dir=name,
        config=json.loads(config.to_json_best_effort()),
    )
    try:
        yield lambda step, values: run.log(dict(values), step=step)
    finally:
        run.finish()


class CompileCounter:
    """Counts XLA compilations. After warm-up there should be none."""

    def __init__(self) -> None:
        self._count = 0
        jax.monitoring.register_event_duration_secs_listener(self._seen)

    def _seen(self, event: str, *_: Any, **__: Any) -> None:
        self._count += event == "/jax/core/compile/backend_compile_duration"

    def take(self) -> int:
        """Compilations since the last call."""
        count, self._count = self._count, 0
        return count


def drop_from_step(path: Path, step: int) -> None:
    """Keep only the lines of a jsonl file whose step comes before `step`, whole ones only."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] < step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            continue  # a line cut off by a kill
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)


def read(run: Path) -> list[dict[str, Any]]:
    """All lines of RUN/metrics.jsonl."""
    path = run / "metrics.jsonl"
    if not path.exists():
        raise InputError(f"{path} does not exist: is {run} the folder of a run?")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def summary(run: Path) -> dict[str, Any]:
    """One row of the final table."""
    lines = read(run)
    evals = [line for line in lines if line["phase"] == "eval"]
    trains = [line for line in lines if line["phase"] == "train"]
    if not evals:
        raise InputError(f"{run}/metrics.jsonl has no line of phase 'eval': did the run end?")
    last = trains[-10:]

    def mean(key: str) -> float:
        values = [line[key] for line in last if key in line]
        return sum(values) / len(values) if values else float("nan")

    return {
        "run": str(run),
        "before": evals[0]["eval/accuracy"],
        "after": evals[-1]["eval/accuracy"],
        "steps": len(trains),
        "turns": mean("rollout/turns_mean"),
        "tool errors": mean("tool/error_rate"),
        "invalid calls": mean("tool/invalid_rate"),
        "seconds": sum(line["time/step"] for line in trains),
    }


def print_table(rows: Iterable[Mapping[str, Any]]) -> None:
    """The final table, on the console."""
    from rich.console import Console
    from rich.table import Table

    forms = {
        "before": ".1%",
        "after": ".1%",
        "turns": ".2f",
        "tool errors": ".1%",
        "invalid calls": ".1%",
        "seconds": ".0f",
    }
    rows = list(rows)
    table = Table(title="held-out accuracy at temperature 1, before and after")
    for name in rows[0]:
        table.add_column(name, justify="left" if name == "run" else "right")
    for row in rows:
        table.add_row(*(_format(value, forms.get(name, "")) for name, value in row.items()))
    Console(width=110).print(table)


def draw(runs: Iterable[Path], path: Path) -> None:
    """Curves of the runs: accuracy, turns, tool errors, advantage spread. Writes a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {
        "accuracy/train": "accuracy (thin: each step, dots: held out)",
        "rollout/turns_mean": "turns per trajectory",
        "tool/error_rate": "calls that failed or were invalid",
        "advantage/zero_share": "share of turns with advantage 0",
    }
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), constrained_layout=True)
    for number, run in enumerate(runs):
        lines, colour = read(run), f"C{number}"
        trains = [line for line in lines if line["phase"] == "train"]
        steps = [line["step"] for line in trains]
        for axis, (key, title) in zip(axes.flat, panels.items(), strict=True):
            values = [line[key] for line in trains]
            axis.plot(steps, values, color=colour, lw=0.6, alpha=0.45)
            axis.plot(steps, _smooth(values), color=colour, lw=2, label=run.name)
            axis.set(title=title, xlabel="step")
            axis.grid(alpha=0.3)
        axes[1, 0].plot(
            steps,
            _smooth([line["tool/invalid_rate"] for line in trains]),
            color=colour,
            lw=1.5,
            ls="--",
        )
        evals = [line for line in lines if line["phase"] == "eval"]
        axes[0, 0].plot(
            [line["step"] for line in evals],
            [line["eval/accuracy"] for line in evals],
            "o",
            color=colour,
        )
    axes[1, 0].set_title("solid: calls that failed, dashed: invalid calls")
    axes[0, 0].set_ylim(0, 1.02)
    axes[0, 0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _smooth(values: list[float], window: int = 7) -> list[float]:
    half = window // 2
    out = []
    for i in range(len(values)):
        part = values[max(0, i - half) : i + half + 1]
        out.append(sum(part) / len(part))
    return out


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | str | bool | None) else float(value)


def _format(value: Any, form: str) -> str:
    if form.endswith("s"):
        return format(value, form[:-1]) + "s"
    return format(value, form)


def main() -> None:
    """Table and curves of finished runs."""
    parser = command_parser("gtpo_jax.metrics", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders with a metrics.jsonl")
    runs = parser.parse_args().runs
    rows = [summary(run) for run in runs]
    print_table(rows)
    path = runs[0].parent / "curves.png"
    draw(runs, path)
    print(f"curves: {path}")


if __name__ == "__main__":
    run_command(main)
