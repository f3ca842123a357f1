"""The report: its numbers by hand on runs that are made up, and what it refuses."""

import json
import math

import pytest

from experiments import page, report, results
from experiments.statistics import Paired
from experiments.studies import STUDIES
from gtpo_jax.errors import InputError
from gtpo_jax.statistics import Interval


def write(folder, evals, right, code="c", steps=4, credit=0.002):
    """A finished run, as a runner leaves it, with its answers to two problems."""
    folder.mkdir(parents=True)
    made = {"data": {"train": "d"}, "code": code, "versions": {"python": "3", "jax": "0"}}
    made |= {"device": "1 cpu, 2 CPUs", "commit": "0123456789abcdef"}
    made |= {"command": f"python -m gtpo_jax.train --workdir={folder}"}
    (folder / "manifest.json").write_text(json.dumps(made))
    lines = [
        {"step": 2 * i, "phase": "eval", "eval/accuracy": value}
        for i, value in enumerate(evals)
    ]
    lines += [
        {
            "step": i,
            "phase": "train",
            "rollout/turns_mean": 2.0 + i,
            "tool/error_rate": 0.25,
            "tool/invalid_rate": 0.125,
            "train/tokens": 100,
            "time/step": 1.5,
            "time/credit": credit,
        }
        for i in range(steps)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (folder / "claim.done").touch()
    answers = folder.with_name(f"{folder.name}-arithmetic")
    answers.mkdir()
    (answers / "outcome.json").write_text(json.dumps({"p": [right, 4], "q": [4, 4]}))
    (answers / "claim.done").touch()


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    return tmp_path / "runs"


def overhead(root):
    """Two seeds of both arms; gtpo is above grpo by 0.1 and 0.2 in the mean."""
    for seed, (low, high) in enumerate([(0.5, 0.6), (0.4, 0.6)]):
        write(root / "tiny" / "grpo" / f"seed{seed}", [0.3, low, low], right=1)
        gtpo = root / "tiny" / "gtpo" / f"seed{seed}"
        write(gtpo, [0.3, high, high], right=2 + seed, credit=0.005 + 0.006 * seed)


def made(root, study="overhead"):
    results.collect(root, "tiny", STUDIES[study].arms)
    return report.build(study, "tiny")


def rows(blocks, heading):
    place = next(i for i, b in enumerate(blocks) if getattr(b, "text", "") == heading)
    return next(b for b in blocks[place:] if isinstance(b, page.Table)).rows


def test_numbers_by_hand(runs):
    overhead(runs)
    blocks, of = made(runs)
    assert {arm: len(x) for arm, x in of.items()} == {"grpo": 2, "gtpo": 2}
    # Where it ran is nobody's business.
    assert of["grpo"][1].manifest["command"].endswith("--workdir=ROOT/tiny/grpo/seed1")
    grpo, gtpo = rows(blocks, "Arms: mean over seeds and 95% interval")
    # 0.5 and 0.4: mean 0.45, t(0.975, 1) = 12.706, s / sqrt(2) = 0.05, so +- 0.635.
    assert grpo[:3] == ["grpo", "30.0% [30.0, 30.0]", "45.0% [-18.5, 108.5]"]
    assert gtpo[2] == gtpo[3] == "60.0% [60.0, 60.0]"
    # Answers: (1/4 + 4/4) / 2 of grpo; (2/4 + 1) / 2 and (3/4 + 1) / 2 of gtpo.
    assert grpo[4] == "62.5% [62.5, 62.5]" and gtpo[4].startswith("81.2%")
    ((pair, mean, final, counts, p),) = rows(blocks, "Differences, paired by seed")
    assert (pair, counts, p) == ("gtpo - grpo", "2, 0", "0.500")
    assert mean == final == "+15.0 [-48.5, +78.5]"
    # Problem p: mean of 1/4 and 2/4; q: nothing.
    ((_, name, points, counts, _),) = rows(blocks, "Differences, paired by problem")
    assert name == "arithmetic" and points.startswith("+18.8 [") and counts == "1, 0 of 2"
    used = rows(blocks, "What each arm used")
    assert used[0][1:3] == ["6 [6, 6]", "400 [400, 400]"]
    text = page.markdown(blocks)
    assert "no difference seen between gtpo and grpo: +15.0 points [-48.5, +78.5]" in text
    assert "A step of gtpo takes +0.0% [+0.0, +0.0]" in text
    # 3 and 9 ms more: mean 6, +- 12.706 * 3; of 1.5 s.
    assert "+6.0 ms [-32.1, +44.1] more with gtpo: +0.40% [-2.14, +2.94] of" in text


def test_runs_that_are_no_pair_are_refused(runs):
    overhead(runs)
    write(runs / "tiny" / "grpo" / "seed2", [0.3, 0.5], right=1)
    write(runs / "tiny" / "gtpo" / "seed2", [0.3, 0.5], right=1, code="other")
    with pytest.raises(InputError, match="seed 2: gtpo and grpo are of different code"):
        made(runs)
    path = runs / "tiny" / "gtpo" / "seed2" / "manifest.json"
    path.write_text(path.read_text().replace("other", "c"))
    assert len(made(runs)[1]["gtpo"]) == 3
    write(runs / "tiny" / "grpo" / "seed3", [0.3, 0.5], right=1)
    write(runs / "tiny" / "gtpo" / "seed3", [0.4, 0.5], right=1)
    with pytest.raises(InputError, match="seed 3: gtpo and grpo differ before their first"):
        made(runs)


def test_what_is_not_finished_is_not_counted_and_what_lacks_is_named(runs):
    with pytest.raises(InputError, match="no finished runs of grpo, gtpo"):
        made(runs)
    overhead(runs)
    (runs / "tiny" / "gtpo" / "seed1" / "claim.done").rename(
        runs / "tiny" / "gtpo" / "seed1" / "claim.free"
    )
    assert len(made(runs)[1]["gtpo"]) == 1


@pytest.mark.parametrize(
    "interval, needed, want",
    [
        ((0.05, 0.01, 0.09), 7, "a is above b: +5.0 points [+1.0, +9.0]. 7 seeds would be"),
        ((-0.05, -0.09, -0.01), 7, "a is below b: -5.0 points [-9.0, -1.0]. 7 seeds"),
        (
            (0.01, -0.02, 0.04),
            12,
            "no difference seen between a and b: +1.0 points [-2.0, +4.0]",
        ),
        ((0.01, -0.05, 0.04), 12, "one beyond 5.0 points is unlikely. 12 seeds"),
        ((0.01, math.nan, math.nan), None, "one seed tells nothing: +1.0 points."),
    ],
)
def test_verdicts(interval, needed, want):
    of = Paired(Interval(*interval), 1, 0, 1.0)
    assert want in report.verdict(("a", "b"), of, needed)


def test_both_pages_and_the_curves(runs, tmp_path):
    overhead(runs)
    blocks, of = made(runs)
    report.draw(STUDIES["overhead"], of, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    html = page.html([*blocks, page.Text("<script>x</script> **b** `a < b`")], tmp_path)
    assert "<script>" not in html and "&lt;script&gt;" in html
    assert "<b>b</b> <code>a &lt; b</code>" in html
    assert 'src="data:image/png;base64,' in html and "http" not in html
    text = page.markdown(blocks)
    assert "| gtpo - grpo | +15.0 [-48.5, +78.5] |" in text and "![" in text


def test_a_table_with_bars_in_its_cells_stays_a_table():
    text = page.markdown([page.Title("t"), page.Table(["a", "b"], [["x|y", "z"]])])
    assert "| x\\|y | z |" in text
