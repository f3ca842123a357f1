"""The embedded task: reproducible, solvable only as meant, and flawed as its table says."""

import collections
import contextlib
import io
import re

import pytest
import sentencepiece

from gtpo_jax.errors import InputError
from gtpo_jax.tasks import arithmetic, get_task
from gtpo_jax.tasks.arithmetic import FAMILIES, FLAWS, RECOVERY, SYMBOLS
from gtpo_jax.tasks.verifiers import same_number

TASK = get_task("arithmetic")
MANY = 13_000


@pytest.fixture(scope="module")
def traces():
    return arithmetic.traces(seed=3, count=MANY)


def prompt(problem):
    (message,) = problem.messages
    assert message["role"] == "user"
    return message["content"]


def family(trace):
    return trace.problem.meta["family"]


def code(turn):
    """The code of a well-formed call, None for any other turn."""
    match = re.fullmatch(r"```python\n(.*)\n```", turn.text, re.DOTALL)
    return match and match[1]


def evaluate(setup, codes):
    """What each program prints, run one after the other in one namespace."""
    namespace = {}
    exec(setup, namespace)
    outputs = []
    for text in codes:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            try:
                exec(text, namespace)
            except SyntaxError as error:
                print(f"line {error.lineno}: SyntaxError: {error.msg}")
            except Exception as error:
                print(f"line 1: {type(error).__name__}: {error}")
        outputs.append(printed.getvalue().rstrip("\n"))
    return outputs


def is_right(trace):
    return same_number(trace.problem.answer, TASK.answer(trace.turns[-1].text))


# ------------------------------------------------------------------ problems


def test_a_problem_depends_on_split_seed_and_index_alone():
    problems = TASK.load("train", seed=1, count=50)
    assert problems == TASK.load("train", seed=1, count=80)[:50]
    assert problems != TASK.load("train", seed=2, count=50)
    assert [p.id for p in problems[:2]] == ["arithmetic/train/1/0", "arithmetic/train/1/1"]
    assert len(TASK.load("test")) == 1000
    assert TASK.load("test", count=0) == []


def test_these_problems_never_change():
    """A figure measured on them stays comparable: new wordings mean new figures everywhere."""
    first, second = TASK.load("train", seed=0, count=2)
    assert (prompt(first), first.answer) == (
        "A field is 227 long and 215 wide. How long is its fence?",
        "884",
    )
    assert (prompt(second), second.answer) == (
        "Three bags weigh 999, 661 and 965. What is the total?",
        "2625",
    )


def test_no_test_prompt_is_ever_in_the_training_set():
    train = {prompt(p) for seed in range(3) for p in TASK.load("train", seed=seed, count=5000)}
    test = {prompt(p) for seed in range(3) for p in TASK.load("test", seed=seed, count=2000)}
    assert len(train) > 10_000
    assert not train & test
    # Nor under another wording: the shown numbers of a family are of one split only.
    by_numbers = [
        {
            (p.meta["family"], *re.findall(r"\d+", prompt(p)))
            for p in TASK.load(split, count=5000)
        }
        for split in arithmetic.SPLITS
    ]
    assert not by_numbers[0] & by_numbers[1]


def test_families_come_equally_often():
    counts = collections.Counter(p.meta["family"] for p in TASK.load("train", count=MANY))
    assert set(counts) == set(FAMILIES)
    for count in counts.values():
        assert count == pytest.approx(MANY / len(FAMILIES), rel=0.15)


def test_the_first_words_tell_the_family():
    first = collections.defaultdict(set)
    for name, template in FAMILIES.items():
        for wording in template.wordings:
            first[" ".join(wording.split()[:2])].add(name)
    assert all(len(names) == 1 for names in first.values())


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"split": "dev"}, "split='dev'.*train, test"),
        ({"split": "train", "count": -1}, "count=-1"),
        ({"split": "train", "path": "data"}, "path='data'"),
    ],
)
def test_wrong_arguments_are_input_errors(arguments, part):
    with pytest.raises(InputError, match=part):
        TASK.load(**arguments)


# ------------------------------------------------------- the several-call families


def test_calls_per_family():
    calls = collections.Counter(1 + len(template.hidden) for template in FAMILIES.values())
    assert calls == {1: 8, 2: 4, 3: 1}


def test_hidden_values_are_not_in_the_prompt(traces):
    seen = 0
    for trace in traces:
        if "setup" in trace.problem.meta:
            hidden = re.search(r"print\((\d+)", trace.problem.meta["setup"])[1]
            assert hidden not in prompt(trace.problem)
            seen += 1
    assert seen > MANY / 4


def test_a_hidden_value_is_printed_and_never_returned():
    for problem in TASK.load("train", count=500):
        if setup := problem.meta.get("setup"):
            printed, alone = evaluate(setup, ["peek()", "print(peek() + 1)"])
            assert printed.isdecimal()
            # The one program that would save a turn fails: None cannot be computed with.
            assert "TypeError" in alone
            assert problem.answer not in alone.split()


def test_the_answer_hangs_on_every_hidden_value():
    for name, template in FAMILIES.items():
        if template.hidden:
            shown = {
                letter: low for letter, (low, _) in zip("abc", template.ranges, strict=False)
            }
            answers = {eval(template.right.format(h=h, **shown)) for h in template.hidden[-1]}
            assert len(answers) == 2, name
    chain = next(p for p in TASK.load("train", count=100) if p.meta["family"] == "chain")
    key = int(evaluate(chain.meta["setup"], ["peek()"])[0])
    right, wrong, lazy = evaluate(
        chain.meta["setup"], [f"look({key})", f"look({key + 1})", "look(peek())"]
    )
    assert right != wrong
    assert "TypeError" in lazy
    assert right not in lazy


# -------------------------------------------------------------------- traces


def test_traces_are_of_the_problems_of_the_same_seed():
    some = arithmetic.traces(seed=4, count=30)
    assert some == arithmetic.traces(seed=4, count=60)[:30]
    assert [t.problem for t in some] == TASK.load("train", seed=4, count=30)


def test_right_traces_reach_the_answer_by_real_evaluation(traces):
    right = collections.Counter()
    for trace in traces[:3000]:
        if not trace.flaw:
            *calls, end = trace.turns
            outputs = evaluate(trace.problem.meta.get("setup", ""), map(code, calls))
            assert [f"\n```output\n{output}\n```\n" for output in outputs] == [
                turn.feedback for turn in calls
            ]
            assert end.text == f"\\boxed{{{outputs[-1]}}}"
            assert end.feedback == ""
            assert is_right(trace)
            assert len(calls) == 1 + len(FAMILIES[family(trace)].hidden)
            right[family(trace)] += 1
    assert set(right) == set(FAMILIES)


def test_every_flaw_is_wrong_unless_it_recovers_in_every_family():
    """Any kind can be put on any family, so that the table may be tuned freely."""
    drawn = [arithmetic._draw("train", 0, i) for i in range(300)]
    assert {d.problem.meta["family"] for d in drawn} == set(FAMILIES)
    for kind in ("operation", "name", "syntax", "unclosed", "skip", "at_once"):
        for one in drawn:
            for recovers in (False, True):
                turns = arithmetic._turns(one, kind, recovers)
                fails = kind in ("name", "syntax", "unclosed")
                right = same_number(one.problem.answer, TASK.answer(turns[-1].text))
                assert right == (recovers and fails), (kind, one.problem)


def test_shares_are_those_of_the_table(traces):
    flaws = collections.defaultdict(list)
    for trace in traces:
        kind, _ = FLAWS[family(trace)]
        assert trace.flaw in ("", kind)
        flaws[family(trace)].append(trace.flaw == kind)
    assert set(flaws) == set(FLAWS) == set(FAMILIES)
    for name, (_, share) in FLAWS.items():
        # Three and a half standard errors of about a thousand draws.
        assert sum(flaws[name]) / len(flaws[name]) == pytest.approx(share, abs=0.055), name


def test_the_table_leaves_something_to_learn_and_something_to_find(traces):
    shares = [share for _, share in FLAWS.values()]
    assert max(shares) <= 0.75  # the right way is always sampled
    assert sum(share > 0.5 for share in shares) == 7
    assert RECOVERY < 0.5  # greedy decoding gives up after an error
    assert 0.40 <= sum(map(is_right, traces)) / len(traces) <= 0.55


# --------------------------------------------------------- as the real tools see them


def sample(traces, per_kind=8):
    taken = collections.defaultdict(list)
    for trace in traces:
        taken[trace.flaw].append(trace)
    return [trace for some in taken.values() for trace in some[:per_kind]]


def test_feedback_is_what_the_real_sandbox_and_format_say(traces):
    sandbox = pytest.importorskip("gtpo_jax.tools.sandbox")
    toolcall = pytest.importorskip("gtpo_jax.tools.toolcall")
    markdown = toolcall.FORMATS["markdown"]
    box = sandbox.Sandbox(preload=())
    try:
        for trace in sample(traces):
            history = []
            for turn in trace.turns[:-1]:
                call = markdown.parse(turn.text)
                if isinstance(call, toolcall.Invalid):
                    assert markdown.feedback(call, 1000) == turn.feedback
                    continue
                assert call.code == code(turn)
                setup = trace.problem.meta.get("setup", "")
                result = box.run(call.code, history=tuple(history), setup=setup)
                assert markdown.feedback(result, 1000) == turn.feedback
                history.append(call.code)
            assert markdown.parse(trace.turns[-1].text) is None
    finally:
        box.close()


# ---------------------------------------------------------------------- sizes


def test_a_vocabulary_of_384_pieces_makes_short_prompts_and_traces():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(arithmetic.corpus(seed=1, count=2000)),
        model_writer=model,
        model_type="bpe",
        vocab_size=384,
        split_digits=True,
        user_defined_symbols=[*SYMBOLS, "\n"],
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    tokens = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    lengths = []
    for trace in arithmetic.traces(seed=2, count=1000):
        text = prompt(trace.problem)
        assert len(tokens.encode(text)) <= 34
        parts = [text, *(x for turn in trace.turns for x in (turn.text, turn.feedback))]
        assert [tokens.decode(tokens.encode(part)) for part in parts] == parts
        lengths.append(sum(len(tokens.encode(part)) for part in parts))
    assert sum(lengths) / len(lengths) <= 62
    assert max(lengths) <= 125
    for symbol in SYMBOLS:
        assert len(tokens.encode(symbol)) == 1
    # Any error message comes back as it was written, whatever is in it.
    odd = "line 1: KeyError: '~#@`|^&;<Zq>'"
    assert tokens.decode(tokens.encode(odd)) == odd
