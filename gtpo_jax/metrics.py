"""What a run writes down: metrics.jsonl always, one line a step on the console.

Keys are `group/name`. Every line has `step` and `phase` ("train", "eval", "sft"). After a
restart, lines from steps that will be run again are dropped, so that a step is there once.

`python -m gtpo_jax.metrics RUN [RUN ...]` prints the table of finished runs and draws their
curves to curves.png beside the first of them.
"""

import argparse
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from gtpo_jax.errors import InputError, run_command

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


class MetricsLog:
    """Appends to RUN/metrics.jsonl and prints; not `active` on hosts that keep silent."""

    def __init__(self, workdir: Path, from_step: int, active: bool = True) -> None:
        self._active = active
        if not active:
            return
        workdir.mkdir(parents=True, exist_ok=True)
        self._path = workdir / "metrics.jsonl"
        drop_from_step(self._path, from_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._started = time.perf_counter()

    def write(self, step: int, phase: str, values: Mapping[str, Any], of: int = 0) -> None:
        """Log one line; `of` is the last step, for the console."""
        if not self._active:
            return
        line = {"step": step, "phase": phase, "time": time.time()}
        line |= {name: _plain(value) for name, value in values.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        shown = [
            f"{label} {_format(line[key], form)}"
            for key, (label, form) in CONSOLE.items()
            if key in line
        ]
        total = f"/{of}" if of else ""
        elapsed = time.perf_counter() - self._started
        print(f"[{elapsed:6.1f}s] {phase} {step}{total}  " + "  ".join(shown), flush=True)

    def close(self) -> None:
        """Flush and close the file."""
        if self._active:
            self._file.close()


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
    parser = argparse.ArgumentParser(prog="python -m gtpo_jax.metrics", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders with a metrics.jsonl")
    runs = parser.parse_args().runs
    rows = [summary(run) for run in runs]
    print_table(rows)
    path = runs[0].parent / "curves.png"
    draw(runs, path)
    print(f"curves: {path}")


if __name__ == "__main__":
    run_command(main)
