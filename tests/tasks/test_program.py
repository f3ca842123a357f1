"""Programs against their tests: right ones pass, and no trick does."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtpo_jax.errors import InputError
from gtpo_jax.tasks import get_task, grader
from gtpo_jax.tasks.program import grade, solution
from gtpo_jax.tasks.types import Judges
from gtpo_jax.tools.sandbox import Limits, Sandbox

DATA = Path(__file__).parents[2].parent / "shared" / "data"
HUMANEVAL, MBPP = get_task("humaneval"), get_task("mbpp")

ROW = {
    "task_id": "HumanEval/7",
    "prompt": 'def helper(n):\n    return n\n\ndef add(a, b):\n    """Add."""\n',
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == helper(3)\n"
    "    assert candidate([1], [2]) == [1, 2]\n",
}


@pytest.fixture(scope="module", params=["bwrap", "process"])
def sandbox(request):
    limits = Limits(wall_seconds=3.0, cpu_seconds=1.0, memory_mib=256)
    try:
        with Sandbox(isolation=request.param, limits=limits, preload=()) as made:
            yield made
    except InputError as error:
        pytest.skip(str(error))


def status(sandbox, program):
    tests = f"{ROW['test']}\ncheck(add)"
    return grade(sandbox, program, tests, ["add"], ROW["prompt"], ROW["prompt"]).result()


@pytest.mark.parametrize(
    "program",
    [
        "def add(a, b):\n    return a + b",
        "from operator import add",
        "add = lambda a, b: a + b",
        "class Add:\n    def __call__(self, a, b):\n        return a + b\nadd = Add()",
        "print('hello')\nimport sys\nsys.stderr.write('x')\ndef add(a, b):\n    return a + b",
        "def add(a, b):\n    return helper(a) + helper(b)",  # what the prompt gave is there
        "def add(a, b):\n    return a + b\nif __name__ == '__main__':\n    raise SystemExit(1)",
    ],
)
def test_a_right_program_passes(sandbox, program):
    assert status(sandbox, program).status == "right"


EQUAL = """
class Equal(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
    def __add__(self, other): return self
    def __iter__(self): return iter([self])
"""
HOSTILE = {
    "wrong": "def add(a, b): return a - b",
    "no such function": "x = 1",
    "syntax": "def add(a, b) return",
    "empty": "",
    "exit at import": "import os\nos._exit(0)",
    "exit in the call": "import os\ndef add(a, b): os._exit(0)",
    "SystemExit": "def add(a, b): raise SystemExit(0)",
    "sys.exit at import": "import sys\nsys.exit(0)",
    "equal": EQUAL + "def add(a, b): return Equal()",
    "equal object": "class E:\n  __eq__ = lambda s, o: True\ndef add(a, b): return E()",
    "equal through class": "class E:\n  __class__ = int\n  __eq__ = lambda s, o: True\n"
    "def add(a, b): return E()",
    "patched builtins": "import builtins\nbuiltins.AssertionError = SystemExit\n"
    "builtins.isinstance = lambda *a: True\ndef add(a, b): return 0",
    "own check": "def check(candidate): pass\ndef add(a, b): return 0",
    "frames": "import sys\ndef add(a, b):\n  f = sys._getframe()\n  while f:\n"
    "    for n in list(f.f_globals):\n      if 'check' in n: f.f_globals[n] = print\n"
    "    if 'case' in f.f_locals: print(f.f_locals['case']['nonce'])\n    f = f.f_back\n"
    "  return 0",
    "garbage": "import gc\ndef add(a, b):\n  for o in gc.get_objects():\n"
    "    if type(o) is dict and 'nonce' in o: print(o['nonce'])\n  return 0",
    "fake replies": "import os\nfor fd in range(3, 9):\n  try:\n"
    '    os.write(fd, b\'{"value": 3}\\n{"value": [1, 2]}\\n\')\n  except OSError: pass\n'
    "def add(a, b): return 0",
    "kill the tests": "import os, signal\ndef add(a, b): os.kill(os.getppid(), signal.SIGTERM)",
    "memory of the tests": "import os, re\ndef add(a, b):\n"
    "  m = open(f'/proc/{os.getppid()}/mem', 'rb')\n  return 0",
    "loop": "def add(a, b):\n  while True: pass",
    "sleep": "import time\ndef add(a, b): time.sleep(60)",
    "memory": "def add(a, b): return [0] * 10**9",
    "endless output": "def add(a, b):\n  while True: print('x' * 1000)",
    "deep": "def add(a, b):\n  x = []\n  for _ in range(10**5): x = [x]\n  return x",
    "endless list": "import itertools\ndef add(a, b): return itertools.count()",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_trick_passes(sandbox, name):
    verdict = status(sandbox, HOSTILE[name])
    assert verdict.status == "wrong", verdict
    assert verdict.reason
    assert status(sandbox, "def add(a, b): return a + b").status == "right"  # the next one


def test_nothing_of_the_tests_is_in_the_program_s_memory_or_reach(sandbox):
    """It sends back all it can find: its own memory, descriptors, environment and folder."""
    program = """
import gc, os, sys
def add(a, b):
    found = [repr(sys.argv), repr(os.environ), repr(os.listdir("."))]
    for fd in range(20):
        try: found.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError: pass
    found.append(open("/proc/self/cmdline").read())
    for line in open("/proc/self/maps"):
        span, mode, *_ = line.split()
        if "r" in mode and "[v" not in line:
            low, high = (int(x, 16) for x in span.split("-"))
            try:
                with open("/proc/self/mem", "rb") as file:
                    file.seek(low)
                    data = file.read(min(high - low, 1 << 26))
            except OSError: continue
            # In two halves: the whole word would be in memory for being looked for.
            if any(part[:4] == b"WORD" for part in data.split(b"SECRET")): found.append("LEAK")
    return " ".join(found)
"""
    tests = "# SECRETWORD\nassert 'SECRETWORD' not in (s := add(1, 2)), s\n"
    tests += "assert 'LEAK' not in s and len(s) > 100, s"
    verdict = grade(sandbox, program, tests, ["add"]).result()
    assert verdict.status == "right", verdict
    leaky = f"{program}# SECRET" + "WORD"  # the search does find what is there
    assert (
        grade(sandbox, leaky, "assert 'LEAK' in add(1, 2)", ["add"]).result().status == "right"
    )


def test_objects_of_the_program_stay_there():
    program = """
class Node:
    def __init__(self, value): self.value, self.left = value, None
def depth(node): return 0 if node is None else 1 + depth(node.left)
def names(): return {"a": 1}.keys()
"""
    tests = """
root = Node(1)
root.left = Node(2)
assert depth(root) == 2 and root.left.value == 2 and root.left != 2
assert list(names()) == ["a"]
"""
    with Sandbox(workers=1, isolation="process", preload=()) as sandbox:
        assert grade(sandbox, program, tests, ["Node", "depth", "names"]).result().status == (
            "right"
        )


def test_our_own_failure_is_infra():
    sandbox = Sandbox(workers=1, isolation="process", preload=())
    future = grade(sandbox, "import time\ntime.sleep(60)", "f()", ["f"])
    waiting = grade(sandbox, "f = int", "assert f() == 0", ["f"])
    sandbox.close()
    assert future.result().status == "infra"
    assert waiting.result().status == "infra"


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False)
    | st.sampled_from([int, dict, ValueError]),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner)
        | st.frozensets(st.integers())
        | st.sets(st.text())
    ),
    max_leaves=20,
)


@given(plain)
def test_plain_data_comes_through_unchanged(value):
    packed = grader.pack(value, lambda _: pytest.fail("no plain data"))
    back = grader.unpack(json.loads(json.dumps(packed)), None)
    assert back == value and type(back) is type(value)


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("So:\n```solution\ndef f():\n    pass\n```\nThat is it.", "def f():\n    pass\n"),
        ("```solution\na\n```\n```solution\nb\n```", "b\n"),
        ("```solution python\nx = '```'\n```", "x = '```'\n"),
        ("```solution\nopen", None),
        ("```python\nprint(1)\n```", None),
        ("in ```solution\nx\n```", None),
        ("", None),
    ],
)
def test_the_final_program_is_read_from_its_own_block(text, program):
    assert solution(text) == program


def test_rows_become_problems(tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps(ROW))
    (problem,) = HUMANEVAL.load("test", path=tmp_path)
    assert problem.id == "humaneval/test/HumanEval/7"
    assert problem.answer == ROW["prompt"] + "    return a + b\n"
    assert "def add(a, b)" in problem.messages[0]["content"]
    rows = [
        {
            "task_id": number,
            "text": "Add. ",
            "code": "import math\r\nimport re\r\ndef add(a):\r\n  return a\r\ndef no(): pass",
            "test_setup_code": "",
            "test_list": ["assert add(3) == math.floor(3.5)"],
        }
        for number in (11, 600, 601, 602)
    ]
    (tmp_path / "mbpp.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [p.id for p in MBPP.load("train", path=tmp_path)] == [
        "mbpp/train/601",
        "mbpp/train/602",
    ]
    assert len(MBPP.load("train", path=tmp_path, count=1)) == 1
    (problem,) = MBPP.load("test", path=tmp_path)
    assert problem.meta["grading"] == {
        "tests": "\nassert add(3) == math.floor(3.5)",
        "names": ["add"],
        "before": "import math",
    }
    assert problem.messages[0]["content"].startswith("Add.\n\nIt has to pass these tests:")
    with pytest.raises(InputError, match="split='dev': MBPP has prompt, test"):
        MBPP.load("dev", path=tmp_path)
    rows[0]["test_list"] = ["assert ("]
    (tmp_path / "mbpp.jsonl").write_text(json.dumps(rows[0]))
    with pytest.raises(InputError, match=r"mbpp\.jsonl:1: .*is not Python"):
        MBPP.load("test", path=tmp_path)


REAL = {
    ("humaneval", "test"): 164,
    ("mbpp", "prompt"): 10,
    ("mbpp", "test"): 500,
    ("mbpp", "validation"): 90,
    ("mbpp", "train"): 374,
}


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no benchmark files at {DATA}")
@pytest.mark.parametrize(("name", "split"), REAL)
def test_every_reference_solution_passes_and_a_broken_one_fails(name, split):
    task = get_task(name)
    problems = task.load(split, path=DATA / name)
    assert len(problems) == REAL[name, split]
    # The slowest reference takes over two CPU seconds: a busy machine is no wrong answer here.
    patient = Limits(wall_seconds=120, cpu_seconds=60)
    with Sandbox(isolation="process", preload=(), limits=patient) as sandbox:
        judges = Judges(None, sandbox)
        right = [task.verify(p, p.answer, judges) for p in problems]
        broken = [
            task.verify(p, f"{p.answer}\n{n} = lambda *a: 'broken'", judges)
            for p in problems[::5]
            for n in p.meta["grading"]["names"][:1]
        ]
        failed = [
            p.id for p, v in zip(problems, right, strict=True) if v.result().status != "right"
        ]
        assert failed == []
        assert {v.result().status for v in broken} == {"wrong"}
