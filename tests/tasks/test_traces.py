"""Traces in a file, whoever made them, and GSM8K's solutions as traces."""

import json
from pathlib import Path

import pytest

from gtpo_jax.errors import InputError
from gtpo_jax.tasks import coldstart, get_task
from gtpo_jax.tasks.coldstart import programs
from gtpo_jax.tasks.traces import Recorded, Step, read, to_trace, write
from gtpo_jax.tasks.types import Problem
from gtpo_jax.tools.toolcall import FORMATS, Call

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "gsm8k"
PROBLEM = Problem("p1", "gsm8k", ({"role": "user", "content": "How many?"},), "3")
STEPS = (
    Step("First.\n", "print(1+1)", "2\n"),
    Step("", "print(x)", "line 1: NameError: name 'x' is not defined", "error"),
    Step("It is \\boxed{3}."),
)
LINE = {
    "id": "p1",
    "task": "gsm8k",
    "messages": [{"role": "user", "content": "How many?"}],
    "answer": "3",
    "turns": [{"text": "so", "code": "print(3)", "output": "3\n"}, {"text": "\\boxed{3}"}],
}


def test_what_is_written_is_read_back(tmp_path):
    traces = [Recorded(PROBLEM, STEPS), Recorded(PROBLEM, STEPS[2:])]
    assert write(tmp_path / "a.jsonl", iter(traces)) == 2
    assert read(tmp_path / "a.jsonl") == traces
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_file_that_fails_half_way_is_not_there(tmp_path):
    def traces():
        yield Recorded(PROBLEM, STEPS)
        raise InputError("the sandbox failed")

    with pytest.raises(InputError):
        write(tmp_path / "a.jsonl", traces())
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"task": "chess"}, "field 'task' is 'chess': one of arithmetic, gsm8k"),
        ({"messages": [{"role": "user"}]}, "field 'messages' must hold objects"),
        ({"messages": []}, "must not be empty"),
        ({"turns": []}, "must not be empty"),
        ({"turns": ["x"]}, "field 'turns.0' must be an object"),
        ({"turns": [{"text": 3}]}, "field 'turns.0.text' must be text"),
        ({"turns": [{"text": " "}]}, "field 'turns.0' is the last: it needs text, and no code"),
        ({"turns": [{"text": "a", "code": "b"}]}, "field 'turns.0' is the last"),
        ({"turns": [{"text": "a"}, {"text": "b"}]}, "field 'turns.0.code' must be code"),
        ({"turns": [{"code": " "}, {"text": "b"}]}, "field 'turns.0.code' must be code"),
        ({"answer": 3}, "field 'answer' is int, must be str"),
        ({"id": None}, "field 'id' is null, must be str"),
    ],
)
def test_a_malformed_trace_is_named_by_file_line_and_field(tmp_path, change, wrong):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(LINE) + "\n" + json.dumps(LINE | change))
    with pytest.raises(InputError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:2: ") and wrong in str(error.value)
    assert len(read(path, strict=False)) == 1


@pytest.mark.parametrize("name", ["markdown", "code_tags", "hermes"])
def test_a_trace_reads_back_in_every_format_with_calls(name):
    form = FORMATS[name]
    trace = to_trace(Recorded(PROBLEM, STEPS), form, 100)
    first, second, last = trace.turns
    assert form.parse(first.text) == Call("print(1+1)")
    assert form.end_of_call(first.text) == len(first.text)
    assert first.text == "First.\n" + form.write("print(1+1)")
    assert second.text == form.write("print(x)")
    assert "NameError" in second.feedback and first.feedback.strip() != ""
    assert (last.text, last.feedback) == ("It is \\boxed{3}.", "")
    neutral = to_trace(Recorded(PROBLEM, STEPS), form, 100, lambda text: text.replace("2", "#"))
    assert "#" in neutral.turns[0].feedback


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("markdown", Step("", "s = '''\n```\n'''", "")),
        ("code_tags", Step("", "print('</code>')", "")),
        ("hermes", Step("", "print('</tool_call>')", "")),
        ("markdown", Step("```python\n1\n```", "print(1)", "")),
        ("hermes", Step("<tool_call>", "print(1)", "")),
    ],
)
def test_what_a_format_cannot_carry_is_an_error(name, step):
    recorded = Recorded(PROBLEM, (step, STEPS[2]))
    with pytest.raises(ValueError, match="p1: turn 0 does not read back in format"):
        to_trace(recorded, FORMATS[name], 100)


# GSM8K's solutions. The problems are made up, their form is GSM8K's.

SOLUTION = (
    "Kim packs 12*3 = <<12*3=36>>36 red boxes.\n"
    "Together they pack 36 + 1,000 = <<36+1000=1036>>1,036 boxes, and 1036/4=<<1036/4=259>>259 "
    "a day.\n#### 259"
)


def test_a_solution_becomes_a_program_with_names():
    assert programs(SOLUTION) == [
        "red_boxes = 12*3\nboxes = red_boxes+1000\nday = boxes/4\nprint(day)"
    ]


@pytest.mark.parametrize(
    ("solution", "program"),
    [
        ("He has $<<3*0.50=1.5>>1.50 left.\n#### 1.5", "left = 3*0.50\nprint(left)"),
        ("<<05+3=8>>8\n#### 8", "result = 5+3\nprint(result)"),
        (
            "<<2*3=6>>6 if <<6+1=7>>7 if\n#### 7",
            "result = 2*3\nresult_2 = result+1\nprint(result_2)",
        ),
        (
            "<<2*3=6>>6 in class, <<6+1=7>>7 class.",
            "class_ = 2*3\nclass__2 = class_+1\nprint(class__2)",
        ),
        ("Kim eats 4*2 = <<4*2=8>>8.\n#### 8", "kim_eats = 4*2\nprint(kim_eats)"),
        ("There are 4 + 6 = 10 cats.\n#### 10", "cats = 4 + 6\nprint(cats)"),
        ("There are 4 x 6 = $24.\n#### 24", "result = 4 * 6\nprint(result)"),
    ],
)
def test_names_and_sums(solution, program):
    assert programs(solution)[-1] == program


@pytest.mark.parametrize(
    "solution", ["No sum at all.\n#### 3", "w<<-20+x=10>>", "<<__import__('os')=3>>3", ""]
)
def test_what_is_no_sum_makes_no_program(solution):
    assert programs(solution) == []


def test_unmarked_sums_count_where_the_marks_are_not_enough():
    solution = "Kim has <<2+2=4>>4 cats. Both have 4+6=10 cats.\n#### 10"
    assert programs(solution) == [
        "cats = 2+2\nprint(cats)",
        "cats = 2+2\nboth = cats+6\nprint(both)",
    ]


def test_the_command_keeps_what_runs_and_is_right(tmp_path, capsys):
    rows = [
        {"question": "Q1?", "answer": SOLUTION},
        {"question": "Q2?", "answer": "<<1+1=2>>2\n#### 3"},  # not its answer
        {"question": "Q3?", "answer": "<<1/0=2>>2\n#### 2"},  # does not run
        {"question": "Q4?", "answer": "no sum\n#### 2"},
        {"question": "Q5?", "answer": "<<500*4=2000>>2,000\n#### 2,000"},
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "traces.jsonl"
    coldstart.main([f"--out={out}", f"--path={tmp_path}", "--workers=1"])
    assert f"{out}: 2 traces of 5 problems" in capsys.readouterr().out
    first, second = read(out)
    assert first.problem == get_task("gsm8k").load("train", path=tmp_path)[0]
    assert first.steps[0].output == "259.0\n"
    assert second.steps[1].text == "The answer is \\boxed{2000}."
    with pytest.raises(InputError, match="--task='chess': one of gsm8k"):
        coldstart.main(["--task=chess", f"--out={out}"])


@pytest.mark.skipif(not DATA.is_dir(), reason=f"GSM8K is not at {DATA}")
def test_nearly_all_of_gsm8k_becomes_traces(tmp_path):
    out = tmp_path / "traces.jsonl"
    coldstart.main([f"--out={out}", f"--path={DATA}"])
    traces = read(out)
    assert len(traces) >= 7001
    truths = {p.id: p.answer for p in get_task("gsm8k").load("train", path=DATA)}
    for trace in traces:
        to_trace(trace, FORMATS["markdown"], 256)
        code = trace.steps[0].code
        assert code.count("\n") >= 1 and " = " in code  # named, not a one-liner
        assert get_task("gsm8k").answer(trace.steps[-1].text) == truths[
            trace.problem.id
        ].replace(",", "")
