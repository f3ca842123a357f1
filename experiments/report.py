"""What a study says: its table, differences by seed and by problem, curves, and a verdict.

    python -m experiments.report --study=main_math --preset=tiny --root=runs/experiments

takes what the finished runs in ROOT wrote down (manifest, metrics, how many answers were right)
to experiments/results/PRESET/ARM/seedN, and makes experiments/results/STUDY-PRESET/README.md,
report.html and curves.png from what lies there. Without --root it makes them from that alone.

The primary outcomes were fixed before any run: held-out accuracy, its mean over the evaluations
after step 0, and the last one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import page, results, statistics
from experiments.results import Run, accuracies
from experiments.studies import ARMS, PRESETS, STUDIES, Study
from gtpo_jax.config import known
from gtpo_jax.errors import InputError, command_parser, run_command
from gtpo_jax.statistics import Interval

OUTCOMES = {
    "mean": "held-out accuracy, mean over training",
    "final": "held-out accuracy, final",
}
SMALL = 0.03  # the difference that a study should be able to see


def verdict(names: tuple[str, str], of: statistics.Paired, needed: int | None) -> str:
    """In words, and honest about no difference seen. In percentage points."""
    first, second = names
    value, low, high = (100 * x for x in of.difference)
    seen = f"{value:+.1f} points [{low:+.1f}, {high:+.1f}]"
    if math.isnan(low):
        said = f"one seed tells nothing: {value:+.1f} points"
    elif low > 0:
        said = f"{first} is above {second}: {seen}"
    elif high < 0:
        said = f"{first} is below {second}: {seen}"
    else:
        said = (
            f"no difference seen between {first} and {second}: {seen}; one beyond "
            f"{max(-low, high):.1f} points is unlikely"
        )
    if needed is None:
        return said + "."
    return (
        said + f". {needed} seeds would be needed to see a {100 * SMALL:.0f}-point difference."
    )


def build(name: str, preset: str) -> tuple[list[page.Block], dict[str, Any]]:
    """The report's blocks, and the runs of each arm."""
    study, asked = STUDIES[name], f"--study={name} --preset={preset}"
    runs = {arm: results.load(preset, arm, study.benchmarks[preset]) for arm in study.arms}
    if missing := [arm for arm, of_arm in runs.items() if not of_arm]:
        raise InputError(
            f"no finished runs of {', '.join(missing)} in {results.RESULTS / preset}: "
            f"python -m experiments.run {asked}, then this with --root"
        )
    seeds = results.paired(runs)
    if not seeds:
        there = {arm: list(of_arm) for arm, of_arm in runs.items()}
        raise InputError(f"no seed has all arms of {name}: there are {there}")
    of = {arm: [runs[arm][seed] for seed in seeds] for arm in study.arms}
    first = study.contrasts[0]
    differences = {
        pair: {
            which: statistics.by_seed(
                [run.accuracy(which) for run in of[pair[0]]],
                [run.accuracy(which) for run in of[pair[1]]],
            )
            for which in OUTCOMES
        }
        for pair in study.contrasts
    }
    spread = [
        a.accuracy("mean") - b.accuracy("mean")
        for a, b in zip(of[first[0]], of[first[1]], strict=True)
    ]
    manifest = of[study.arms[0]][0].manifest
    blocks = [
        page.Title(f"{name}, {preset}"),
        page.Text(f"{study.question} On {PRESETS[preset].about}; {len(seeds)} seeds."),
        page.Text(
            "**Verdict** (mean held-out accuracy over training, the primary outcome): "
            + verdict(first, differences[first]["mean"], statistics.seeds_needed(spread, SMALL))
        ),
        page.Text("Final accuracy: " + verdict(first, differences[first]["final"], None)),
        *(
            page.Text("Besides: " + verdict(pair, differences[pair]["mean"], None))
            for pair in study.contrasts[1:]
        ),
        page.Heading("Arms: mean over seeds and 95% interval"),
        page.Table(*_table(of)),
        page.Heading("Differences, paired by seed"),
        page.Text(
            "Percentage points, Student's 95% interval over seeds; how many seeds are above "
            "and below, and the two-sided sign test. Only the first line was the question: "
            "the more lines, the likelier that one of them is chance."
        ),
        page.Table(*_differences(differences)),
        page.Heading("Differences, paired by problem"),
        page.Text(
            f"Of the answers drawn after the last step ({PRESETS[preset].samples} a problem): "
            "bootstrap over problems. It knows other problems, not other seeds."
        ),
        page.Table(*_by_problem(study, of)),
        page.Heading("Curves"),
        page.Image(
            "curves.png",
            "Held-out accuracy, paired differences and turns, 95% bands over seeds",
        ),
        page.Heading("What each arm used"),
        page.Table(*_used(of)),
        *(_overhead(of) if name == "overhead" else []),
        page.Heading("How it was made"),
        page.Code(
            f"python -m experiments.run {asked} --seeds={len(seeds)}\n"
            f"python -m experiments.report {asked}"
        ),
        page.Text(
            f"The steps of these runs took {_hours(of)} together, beside start-up, evaluation "
            f"and cold starts. On {manifest['device']}, Python "
            f"{manifest['versions']['python']}, JAX {manifest['versions']['jax']}, commit "
            f"{manifest['commit'][:10]}; every run's config, versions, data and command are in "
            f"results/{preset}/ARM/seedN."
        ),
    ]
    return blocks, of


def _table(of: Mapping[str, Sequence[Run]]):
    benchmarks = list(accuracies(next(iter(of.values()))[0]))
    head = ["arm", "before", "mean over training", "final", *benchmarks, "reward and advantage"]
    rows = []
    for arm, runs in of.items():
        after = [accuracies(run) for run in runs]
        columns = [
            [run.evals[0]["eval/accuracy"] for run in runs],
            *([run.accuracy(which) for run in runs] for which in OUTCOMES),
            *([one[name] for one in after] for name in benchmarks),
        ]
        shown = [_percent(statistics.t_interval(column)) for column in columns]
        rows.append([arm, *shown, ARMS[arm].formula])
    return head, rows


def _differences(differences):
    head = ["", *(title for title in OUTCOMES.values()), "seeds above, below", "p"]
    return head, [
        [
            f"{a} - {b}",
            *(_percent(by[which].difference, "+.1f", "") for which in OUTCOMES),
            f"{by['mean'].higher}, {by['mean'].lower}",
            f"{by['mean'].p:.3f}",
        ]
        for (a, b), by in differences.items()
    ]


def _by_problem(study: Study, of: Mapping[str, Sequence[Run]]):
    benchmarks = list(accuracies(next(iter(of.values()))[0]))
    rows = []
    for a, b in study.contrasts:
        for name in benchmarks:
            found: dict[str, list[float]] = {}
            for one, other in zip(of[a], of[b], strict=True):
                for (benchmark, problem), value in one.problems.items():
                    if benchmark == name and (name, problem) in other.problems:
                        found.setdefault(problem, []).append(
                            value - other.problems[name, problem]
                        )
            by = statistics.by_problem([float(np.mean(values)) for values in found.values()])
            counts = f"{by.higher}, {by.lower} of {len(found)}"
            points = _percent(by.difference, "+.1f", "")
            rows.append([f"{a} - {b}", name, points, counts, f"{by.p:.3f}"])
    return ["", "benchmark", "points", "problems above, below", "p"], rows


def _used(of: Mapping[str, Sequence[Run]]):
    head = ["arm", "seconds a run", "tokens trained on", "turns, first 5 steps", "last 5 steps",
            "failing calls, first 5", "invalid calls, first 5"]  # fmt: skip
    first, last = slice(5), slice(-5, None)
    rows = []
    for arm, runs in of.items():

        def over(value: Callable[[Run], float], runs: Sequence[Run] = runs) -> Interval:
            return statistics.t_interval([value(run) for run in runs])

        rows.append(
            [
                arm,
                _number(over(lambda run: run.total("time/step")), ".0f"),
                _number(over(lambda run: run.total("train/tokens")), ",.0f"),
                _number(over(lambda run: run.mean("rollout/turns_mean", first)), ".2f"),
                _number(over(lambda run: run.mean("rollout/turns_mean", last)), ".2f"),
                _percent(over(lambda run: run.mean("tool/error_rate", first))),
                _percent(over(lambda run: run.mean("tool/invalid_rate", first))),
            ]
        )
    return head, rows


def _overhead(of: Mapping[str, Sequence[Run]]) -> list[page.Block]:
    """GTPO's step time over GRPO's, seed by seed; a token's too, for lengths differ, and what
    the credit alone takes."""
    pairs = list(zip(of["gtpo"], of["grpo"], strict=True))

    def ratio(key: str | None) -> Interval:
        def cost(run: Run) -> float:
            return run.total("time/step") / (run.total(key) if key else len(run.trains))

        logs = statistics.t_interval([math.log(cost(a) / cost(b)) for a, b in pairs])
        return Interval(*(math.exp(x) - 1 for x in logs))

    def credit(run: Run) -> float:
        return run.total("time/credit") / len(run.trains)

    step, token = (_percent(ratio(key), "+.1f") for key in (None, "train/tokens"))
    more = statistics.t_interval([credit(a) - credit(b) for a, b in pairs])
    share = statistics.t_interval(
        [(credit(a) - credit(b)) * len(b.trains) / b.total("time/step") for a, b in pairs]
    )
    return [
        page.Heading("What GTPO adds to a step's time"),
        page.Text(
            f"A step of gtpo takes {step} against grpo's, a token that is trained on {token} "
            "(geometric mean over seeds, 95% interval); rollouts that differ are in it, and so "
            "is what else the machine did. Rewards, shaping and advantages alone take "
            f"{_number(Interval(*(1000 * x for x in more)), '+.1f', ' ms')} more with gtpo: "
            f"{_percent(share, '+.2f')} of grpo's step."
        ),
    ]


def _hours(of: Mapping[str, Sequence[Run]]) -> str:
    seconds = sum(run.total("time/step") for runs in of.values() for run in runs)
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _percent(x: Interval, form: str = ".1f", unit: str = "%") -> str:
    return _number(Interval(*(100 * v for v in x)), form, unit)


def _number(x: Interval, form: str, unit: str = "") -> str:
    if math.isnan(x.low):
        return f"{x.value:{form}}{unit}"
    return f"{x.value:{form}}{unit} [{x.low:{form}}, {x.high:{form}}]"


def draw(study: Study, of: Mapping[str, Sequence[Run]], path: Path) -> None:
    """Held-out accuracy, its paired differences, and turns: mean and 95% band over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), constrained_layout=True)

    def band(axis, x, values: np.ndarray, colour: str, label: str) -> None:
        bands = [statistics.t_interval(column) for column in values.T]
        axis.plot(x, [b.value for b in bands], color=colour, label=label)
        low, high = [b.low for b in bands], [b.high for b in bands]
        axis.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)

    def held_out(arm: str) -> np.ndarray:
        return np.array([[100 * x["eval/accuracy"] for x in run.evals] for run in of[arm]])

    steps = [line["step"] for line in next(iter(of.values()))[0].evals]
    for number, (arm, runs) in enumerate(of.items()):
        turns = np.array([[line["rollout/turns_mean"] for line in run.trains] for run in runs])
        band(axes[0], steps, held_out(arm), f"C{number}", arm)
        band(axes[2], range(turns.shape[1]), turns, f"C{number}", arm)
    for number, (a, b) in enumerate(study.contrasts):
        colour = f"C{number + len(of)}"
        band(axes[1], steps, held_out(a) - held_out(b), colour, f"{a} - {b}")
    axes[1].axhline(0, color="grey", lw=1)
    axes[0].set(title="held-out accuracy, %", xlabel="step")
    axes[1].set(title="paired differences, points", xlabel="step")
    axes[2].set(title="turns per trajectory, training", xlabel="step")
    axes[0].legend(loc="lower right")
    axes[1].legend(loc="upper left", fontsize="small")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    """Make the report of a study."""
    parser = command_parser("experiments.report", __doc__)
    parser.add_argument("--study", required=True, help=", ".join(STUDIES))
    parser.add_argument("--preset", required=True, help=", ".join(PRESETS))
    parser.add_argument("--root", type=Path, help="take the finished runs of this folder first")
    options = parser.parse_args()
    study = known(STUDIES, options.study, "study")
    known(PRESETS, options.preset, "preset")
    if options.root:
        results.collect(options.root, options.preset, study.arms)
    blocks, of = build(options.study, options.preset)
    folder = results.RESULTS / f"{options.study}-{options.preset}"
    folder.mkdir(parents=True, exist_ok=True)
    draw(study, of, folder / "curves.png")
    (folder / "README.md").write_text(page.markdown(blocks), encoding="utf-8")
    (folder / "report.html").write_text(page.html(blocks, folder), encoding="utf-8")
    print(f"{folder / 'README.md'}, report.html, curves.png")


if __name__ == "__main__":
    run_command(main)
