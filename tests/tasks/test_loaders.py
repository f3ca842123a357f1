"""Rows are checked at the door; what is wrong is said in one line, by file and line."""

import json
import sys
import types

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gtpo_jax.errors import InputError
from gtpo_jax.tasks import TASKS, get_task, loaders
from gtpo_jax.tasks.loaders import Hub, pick

FIELDS = {"question": str, "answer": int}
GOOD = '{"question": "q", "answer": 3, "more": null}'


def read_jsonl(path, fields, strict=True):
    return loaders.read_file(path, fields, lambda row, index: row, strict=strict)


def read_rows(source, split, fields, **options):
    return loaders.read_rows(source, split, fields, lambda row, index: row, **options)


def write(path, *lines):
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines))
    return path


def test_good_rows_come_in_order_and_blank_lines_are_skipped(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD, "", "  ", GOOD.replace("3", "4"), "")
    assert [row["answer"] for row in read_jsonl(path, FIELDS)] == [3, 4]
    assert read_jsonl(str(path), {})[0]["more"] is None


def test_windows_files_with_a_byte_order_mark_are_read(tmp_path):
    path = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + GOOD.encode() + b"\r")
    assert len(list(read_jsonl(path, FIELDS))) == 1


@pytest.mark.parametrize(
    ("line", "part"),
    [
        (
            '{"question": "q"}',
            "field 'answer' is missing; needed: question (str), answer (int)",
        ),
        ('{"question": "q", "answer": "3"}', "field 'answer' is str, must be int"),
        ('{"question": null, "answer": 3}', "field 'question' is null, must be str"),
        ('{"question": "q", "answer": true}', "field 'answer' is bool, must be int"),
        ('{"question": "q", "answer": 3.5}', "field 'answer' is float, must be int"),
        ("[1, 2]", "row is list"),
        ('{"question": ', "not a JSON object"),
        (b'{"question": "\xff"}', "not a JSON object"),
        ('{"question": "q", "answer": ' + "9" * 5000 + "}", "not a JSON object"),
        ("[" * 100_000, "not a JSON object"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, line, part):
    path = write(tmp_path / "rows.jsonl", GOOD, "", line, GOOD)
    with pytest.raises(InputError) as error:
        list(read_jsonl(path, FIELDS))
    message = str(error.value)
    assert message.startswith(f"{path}:3: ")
    assert part in message
    assert "\n" not in message


def test_malformed_rows_are_left_out_and_counted_when_not_strict(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", GOOD, "{", '{"question": 1}', GOOD)
    assert len(list(read_jsonl(path, FIELDS, strict=False))) == 2
    assert "2 malformed rows" in caplog.text


def test_a_float_field_takes_an_int_but_no_bool(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"x": 1}', '{"x": 1.5}')
    assert [row["x"] for row in read_jsonl(path, {"x": float})] == [1, 1.5]
    write(path, '{"x": false}')
    with pytest.raises(InputError, match="field 'x' is bool, must be float"):
        read_jsonl(path, {"x": float})
    with pytest.raises(InputError, match="field 'x' is bool, must be str or float"):
        read_jsonl(path, {"x": (str, float)})


def test_a_missing_file_is_named_with_what_would_be_right(tmp_path):
    path = tmp_path / "none.jsonl"
    with pytest.raises(InputError, match=r"none\.jsonl: no such file.*question \(str\)"):
        list(read_jsonl(path, FIELDS))
    with pytest.raises(InputError, match=r"none\.jsonl': no such file or folder"):
        read_rows(path, "train", FIELDS)
    for wrong in ("neither", "a/b/c", "/no/such/folder", "../gsm8k"):
        with pytest.raises(InputError, match="owner/name"):
            read_rows(wrong, "train", FIELDS)


def test_a_folder_gives_its_split_and_says_which_it_has(tmp_path):
    write(tmp_path / "test.jsonl", GOOD)
    assert len(list(read_rows(tmp_path, "test", FIELDS))) == 1
    assert len(list(read_rows(tmp_path / "test.jsonl", "any", FIELDS))) == 1
    with pytest.raises(
        InputError, match=r"split='train': no train\.jsonl .* there: test\.jsonl"
    ):
        read_rows(str(tmp_path), "train", FIELDS)


def test_without_datasets_the_hub_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install gtpo_jax\[hub\]"):
        read_rows("owner/name", "train", FIELDS)


def test_hub_rows_are_checked_and_hub_errors_are_one_line(monkeypatch):
    def load_dataset(name, config, split):
        if split != "train":
            raise ValueError(f'Unknown split "{split}".\nShould be one of train.')
        assert (name, config) == ("owner/name", "main")
        return [json.loads(GOOD), {"question": "q"}]

    fake = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    hub = Hub("owner/name", "main", {"dev": "validation", "test": "train"})
    assert read_rows(hub, "train", FIELDS, count=1)[0]["answer"] == 3
    assert len(read_rows(hub, "test", FIELDS, strict=False)) == 1
    with pytest.raises(InputError, match=r"^owner/name\[train\]:2: field 'answer' is missing"):
        read_rows(hub, "train", FIELDS)
    with pytest.raises(InputError, match=r"split='validation': the hub says Unk") as error:
        read_rows(hub, "dev", FIELDS)
    assert "\n" not in str(error.value)


def test_a_json_list_is_read_with_the_line_of_each_row(tmp_path):
    path = tmp_path / "train.json"
    path.write_text('[\n {"question": "q",\n  "answer": 1},\n\n {"question": "r"}\n]\n')
    with pytest.raises(InputError, match=r"train\.json:5: field 'answer' is missing"):
        read_rows(tmp_path, "train", FIELDS)
    assert [r["answer"] for r in read_rows(tmp_path, "train", FIELDS, strict=False)] == [1]
    path.write_text('[{"question": "q", "answer": 1}\n, {]')
    with pytest.raises(InputError, match=r"train\.json:2: not JSON"):
        read_jsonl(path, FIELDS, strict=False)
    for text in ('{"question": "q"}', "", "3"):
        path.write_text(text)
        with pytest.raises(InputError, match="must be a list of rows"):
            read_jsonl(path, FIELDS)
    path.write_text("[]")
    assert read_jsonl(path, FIELDS) == []
    path.write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"train\.json:1: not JSON"):
        read_jsonl(path, FIELDS)


def test_deeper_fields_have_dotted_names():
    row = {"a": {"b": [{"c": 1}]}, "a.b": 2}
    assert (pick(row, "a.b.0.c"), pick(row, "a.b")) == (1, 2)
    for name in ("x", "a.x", "a.b.1", "a.b.x", "a.b.0.c.d"):
        with pytest.raises(KeyError):
            pick(row, name)


def test_what_make_cannot_use_is_named_like_a_malformed_row(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD, GOOD)

    def refuse(row, index):
        raise ValueError(f"field 'answer' of row {index} is odd")

    with pytest.raises(InputError, match=r"a\.jsonl:1: field 'answer' of row 0 is odd"):
        loaders.read_file(path, FIELDS, refuse)


def test_an_unknown_task_lists_the_known_ones():
    assert get_task("arithmetic") is TASKS["arithmetic"]
    with pytest.raises(InputError, match="task='chess': one of arithmetic, gsm8k, svamp"):
        get_task("chess")


# The names that rows of the benchmarks use, so that rows are nearly right.
NAMES = st.sampled_from(
    """question answer Body Question Answer problem final_answer qid choices answerKey label
    text task_id prompt entry_point canonical_solution test code test_list test_setup_code role
    content""".split()  # noqa: SIM905
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)
LOADED = [name for name in TASKS if name != "arithmetic"]


def files_of(line):
    """A task's file, JSON lines or a list, of one row or a broken one."""
    return line.encode("utf-8", "surrogatepass") if isinstance(line, str) else line


@pytest.mark.parametrize("name", LOADED)
@given(
    row=st.dictionaries(NAMES, VALUES, max_size=8).map(json.dumps)
    | VALUES.map(json.dumps)
    | st.text()
    | st.binary(),
    listed=st.booleans(),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_file_is_read_or_refused_in_one_line(tmp_path_factory, name, row, listed):
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.{'json' if listed else 'jsonl'}"
    data = files_of(row)
    path.write_bytes(b"[" + data + b"]" if listed else data)
    task = get_task(name)
    try:
        problems = task.load("test", path=path)
    except InputError as error:
        assert "\n" not in str(error) and name in str(error)
    else:
        assert all(p.answer and p.messages[-1]["role"] == "user" for p in problems)
