"""The report of a run: what is in the file. What a browser shows of it: test_view_page.py."""

import json
import re
import sys

import pytest
from view_run import EVIL, Characters, trajectory, turn, write_run

from gtpo_jax import view
from gtpo_jax.errors import run_command
from gtpo_jax.rl import record
from gtpo_jax.tasks.types import Problem
from gtpo_jax.tools.sandbox import Result
from gtpo_jax.tools.toolcall import Call


def data_of(page):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(found[1], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_page_holds_curves_and_groups(tmp_path):
    data = data_of(view.report(write_run(tmp_path / "run")))
    assert data["run"] == "run" and data["notes"] == []
    assert data["curves"]["train"]["accuracy/train"] == [0.0, 0.2, 0.4, 0.6, 0.8]
    assert data["curves"]["train"]["train/loss"] == [None] * 5
    assert "time" not in data["curves"]["train"]
    assert [s["step"] for s in data["steps"]] == [0, 2, 4]
    assert [len(g["members"]) for g in data["steps"][0]["groups"]] == [5, 5]
    texts, (right, wrong, *_) = data["texts"], data["steps"][0]["groups"][0]["members"]
    first = wrong["turns"][0]
    before, code, after, kind, detail, seconds, feedback, output, tokens = first[:9]
    assert texts[before] + texts[code] + texts[after] == "```python\nx y\n```"
    assert (texts[code], kind, detail, seconds, output) == ("x y", "error", None, 0.002, None)
    assert EVIL in texts[feedback] and tokens == 17
    assert first[9:] == [-2.0, -2.0, -2.0]
    assert right["correct"] and not wrong["correct"]
    identity, answer, *prompt = data["problems"][0]
    assert identity == f"problem 0 {EVIL}" and texts[answer] == f"7 {EVIL}"
    assert "".join(texts[i] for i in prompt) == f"<user>question 0 {EVIL}</user>"


def test_each_text_is_there_once_and_no_token_or_logprob(tmp_path):
    page = view.report(write_run(tmp_path / "run"))
    assert page.count("while True: pass") == 1
    assert "-0.25" not in page and "logprobs" not in page


def test_code_that_stands_there_in_another_spelling_is_kept_beside_the_text(tmp_path):
    calls = turn('<tool_call>"print(\\"a\\")"</tool_call>', Call('print("a")'), "a", None)
    long = turn(
        "```python\nx\n```", Call("x"), "head ... tail", Result("ok", "head middle tail", 1)
    )
    problem = Problem("p", "t", ({"role": "user", "content": "q"},), "a")
    run = write_run(tmp_path / "run", steps=())
    lines = [trajectory(problem, 0, [calls, long])]
    record.write(run / "trajectories.jsonl", 0, lines, Characters())
    data = data_of(view.report(run))
    first, second = data["steps"][0]["groups"][0]["members"][0]["turns"]
    assert [data["texts"][i] for i in first[:2]] == [calls_text(calls), 'print("a")']
    assert first[2] is None and first[3] == "not run"
    assert data["texts"][second[7]] == "head middle tail"
    assert second[9:] == [None, None, None]


def calls_text(of):
    return "".join(map(chr, of.tokens))


def test_similarities_are_those_of_shaping():
    # {x} against {x, y, x y}: 1 / sqrt(3). Members without code resemble nothing.
    lines = [
        {
            "problem": {"id": "p"},
            "member": i,
            "turns": [{"code": code} for code in codes],
        }
        for i, codes in enumerate([["x"], ["x y"], [None], ["x", None, "y"]])
    ]
    assert view.similarities(lines) == [
        [100, 58, 0, 58],
        [58, 100, 0, 100],
        [0, 0, 0, 0],
        [58, 100, 0, 100],
    ]


def test_what_a_model_wrote_cannot_leave_the_data(tmp_path):
    page = view.report(write_run(tmp_path / "run"))
    assert "<script>window" not in page and "<img" not in page and "\u2028" not in page
    assert page.count("</script>") == 2 and page.count("<script") == 2


@pytest.mark.parametrize(
    "text", [EVIL, "{{data}} {{script}}", "<!--<script>", "\ud800", "]]>", "\0"]
)
def test_json_comes_back_as_it_was(text):
    written = view.as_json({text: [text]})
    assert json.loads(written) == {text: [text]}
    assert not set("<>&\u2028\u2029") & set(written)
    written.encode()


def test_words_of_the_template_in_a_text_stay_text():
    data = {"texts": ["{{data}}{{style}}{{script}}{{policy}}"]}
    assert data_of(view.fill(data)) == data


def test_the_policy_lets_the_pages_own_script_run_and_nothing_else():
    page = view.fill({})
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    script = page.rsplit("<script>", 1)[1].split("</script>")[0]
    assert f"script-src '{view._sha256(script)}'" in policy
    # Nothing in it reads text as markup, and nothing asks the network.
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacent",
        "document.write",
        "eval(",
        "fetch(",
    ):
        assert word not in script
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "").replace(
        "http-equiv", ""
    )


def test_a_run_of_200_steps_stays_below_5_mb_and_says_what_is_left_out(tmp_path):
    run = write_run(tmp_path / "run", steps=(0,), problems=16, lines=200)
    one = (run / "trajectories.jsonl").read_text()
    with (run / "trajectories.jsonl").open("w") as file:
        for step in range(200):
            file.write(
                one.replace('"step": 0', f'"step": {step}')
                .replace("boxed", f"boxed{step}")
                .replace("question", f"question {step} " + "words " * 50)
            )
    page = view.report(run)
    data = data_of(page)
    steps = [s["step"] for s in data["steps"]]
    assert 4_000_000 < len(page.encode()) < 5_000_000
    assert steps[0] == 0 and steps[-1] == 199 and 10 < len(steps) < 200
    assert data["notes"] == [
        f"to keep this page small it shows {len(steps)} of 200 recorded steps"
    ]


def test_where_two_steps_are_too_large_problems_go_and_then_long_texts(tmp_path):
    run = write_run(tmp_path / "run", problems=6)
    alone = len(view.fill({}))
    data = data_of(view.report(run, max_bytes=alone + 14_000))
    assert [s["step"] for s in data["steps"]] == [0, 4]
    kept = [len(s["groups"]) for s in data["steps"]]
    assert kept[0] == kept[1] and 2 <= kept[0] < 6
    assert data["notes"][1] == f"and {sum(kept)} of the 12 problems of these steps"
    data = data_of(view.report(run, max_bytes=alone + 6_000))
    assert data["notes"][-1].startswith("and at most ")


def test_long_curves_are_thinned_and_say_so(tmp_path):
    data = data_of(view.report(write_run(tmp_path / "run", steps=(), lines=1500)))
    steps = data["curves"]["train"]["step"]
    assert len(steps) == view.POINTS and (steps[0], steps[-1]) == (0, 1499)
    assert "curves of 'train' show 1000 of 1500 lines" in data["notes"]


@pytest.mark.parametrize("items", range(1, 12))
@pytest.mark.parametrize("count", range(1, 12))
def test_spaced_keeps_the_ends_and_repeats_nothing(items, count):
    kept = view.spaced(range(items), count)
    assert len(kept) == min(items, count) == len(set(kept)) and kept == sorted(kept)
    assert kept[0] == 0 and (count == 1 or kept[-1] == items - 1)


def test_statuses_that_the_config_drops_are_named(tmp_path):
    run = write_run(tmp_path / "run")
    reward = {"drop_truncated": True, "drop_void": False, "alpha": 0.5}
    model = {"source": "", "layers": 2, "width": 128}
    config = {"reward": reward, "model": model, "advantage": {"name": "gtpo"}}
    (run / "config.json").write_text(json.dumps(config))
    data = data_of(view.report(run))
    assert data["left_out"] == ["tool_failure", "truncated"] and data["alpha"] == 0.5
    assert ["model", "2 layers of 128"] in data["facts"]


@pytest.mark.parametrize("empty", [True, False])
def test_without_recorded_steps_there_are_curves(tmp_path, empty):
    run = write_run(tmp_path / "run", steps=())
    if empty:
        (run / "trajectories.jsonl").write_text("")
    data = data_of(view.report(run))
    assert data["steps"] == [] and data["curves"]["eval"]
    assert data["notes"] == ["no trajectories are recorded: there are curves alone"]


def test_a_line_cut_off_by_a_kill_is_left_out_and_noted(tmp_path):
    run = write_run(tmp_path / "run")
    whole = data_of(view.report(run))
    for name in ("metrics.jsonl", "trajectories.jsonl"):
        path = run / name
        path.write_text(path.read_text() + path.read_text()[:60])
    data = data_of(view.report(run))
    assert data["steps"] == whole["steps"] and data["curves"] == whole["curves"]
    assert data["notes"] == [
        "the last line of metrics.jsonl is cut off, and left out",
        "the last line of trajectories.jsonl is cut off, and left out",
    ]


def command(monkeypatch, capsys, *arguments):
    """Exit code, and what is on stderr."""
    monkeypatch.setattr(sys, "argv", ["view", *map(str, arguments)])
    try:
        run_command(view.main)
    except SystemExit as end:
        return end.code, capsys.readouterr().err
    return 0, capsys.readouterr().err


def break_line(path):
    path.write_text(path.read_text().replace('{"step"', "{step", 2))


def forget(key):
    def change(path):
        path.write_text(path.read_text().replace(f'"{key}"', '"else"', 1))

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "metrics.jsonl",
            lambda path: path.unlink(),
            "does not exist: is .* the folder of a run",
        ),
        ("metrics.jsonl", break_line, "metrics.jsonl line 1 is not JSON"),
        (
            "metrics.jsonl",
            forget("phase"),
            "metrics.jsonl line 1 is not one of a run: no 'phase'",
        ),
        ("metrics.jsonl", lambda path: path.write_text("3\n"), "line 1 is not one of a run"),
        ("trajectories.jsonl", break_line, "trajectories.jsonl line 1 is not JSON"),
        ("trajectories.jsonl", forget("turns"), "line 1 is not one of a run: no 'turns'"),
        ("config.json", lambda path: path.write_text("{"), "config.json is not JSON"),
    ],
)
def test_a_broken_run_is_one_line(tmp_path, monkeypatch, capsys, name, change, message):
    run = write_run(tmp_path / "run")
    change(run / name)
    code, error = command(monkeypatch, capsys, run)
    assert code == 2 and re.search(message, error)
    assert error.count("\n") == 1 and error.startswith("error: ")
    assert not (run / "report.html").exists()


def test_other_wrong_input_is_one_line(tmp_path, monkeypatch, capsys):
    code, error = command(monkeypatch, capsys, tmp_path / "absent")
    assert code == 2 and "absent is no folder" in error
    run = write_run(tmp_path / "run", steps=(), lines=0)
    code, error = command(monkeypatch, capsys, run)
    assert code == 2 and "has no line: did the run begin?" in error
    code, error = command(monkeypatch, capsys, write_run(run), "--out=/no/such/folder/a.html")
    assert code == 2 and "must name a file in a folder that exists" in error
    code, error = command(monkeypatch, capsys, run, f"--out={tmp_path}")
    assert code == 2 and "must name a file in a folder that exists" in error


def test_the_command_writes_into_the_run_or_where_it_is_told(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run")
    assert command(monkeypatch, capsys, run) == (0, "")
    assert command(monkeypatch, capsys, run, f"--out={tmp_path / 'other.html'}") == (0, "")
    written = (run / "report.html").read_bytes()
    assert written.startswith(b"<!doctype html>")
    assert written == (tmp_path / "other.html").read_bytes()


def test_help_shows_an_example(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["view", "--help"])
    with pytest.raises(SystemExit):
        view.main()
    assert "python -m gtpo_jax.view runs/tiny/gtpo" in capsys.readouterr().out


def test_a_picture_without_playwright_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "playwright", None)
    monkeypatch.setitem(sys.modules, "playwright.sync_api", None)
    run = write_run(tmp_path / "run")
    code, error = command(monkeypatch, capsys, run, f"--screenshot={tmp_path / 'a.png'}")
    assert code == 2 and "pip install 'gtpo_jax[browser]'" in error
