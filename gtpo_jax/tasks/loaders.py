"""Reading rows from a file, a folder or the Hugging Face hub, each row checked at the door.

A malformed row is an InputError that names file, line and field; with `strict` off it is left
out, and how many were is logged.
"""

import dataclasses
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from gtpo_jax.errors import InputError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_log = logging.getLogger(__name__)

Row = dict[str, Any]
Fields = Mapping[str, type | tuple[type, ...]]
T = TypeVar("T")
# where a row stands, and the row; or why there is none
Located = Iterator[tuple[str, Row | InputError]]


@dataclasses.dataclass(frozen=True)
class Hub:
    """A dataset on the hub; `splits`: our names of splits -> its own, where they differ."""

    name: str
    config: str | None = None
    splits: Mapping[str, str] = dataclasses.field(default_factory=dict)


def read_file(
    path: str | os.PathLike,
    fields: Fields,
    make: Callable[[Row, int], T],
    count: int | None = None,
    strict: bool = True,
) -> list[T]:
    """make(row, its number from 0) of the first `count` rows of a .jsonl file or JSON list.

    `fields`: names that a row must have, dotted where they lie deeper (see `pick`), and their
    types; others pass unchecked. `make` raises ValueError for a row it can make nothing of.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected rows with {_names(fields)}")
    rows = _json_rows(path) if path.suffix == ".json" else _jsonl_rows(path)
    return _collect(rows, fields, make, count, strict, str(path))


def read_rows(
    source: str | os.PathLike | Hub,
    split: str,
    fields: Fields,
    make: Callable[[Row, int], T],
    count: int | None = None,
    strict: bool = True,
) -> list[T]:
    """`read_file` of one split of `source`: a file, a folder that holds {split}.jsonl or
    {split}.json, a Hub, or a hub id 'owner/name', which `datasets` reads.

    Raises InputError where it is none of these, where `datasets` is not installed, and where
    the hub cannot give the split.
    """
    if count is not None and count < 0:
        raise InputError(f"count={count} must not be negative")
    if not isinstance(source, Hub):
        path = Path(source)
        if path.is_dir():
            path = _split_file(path, split)
        if path.is_file():
            return read_file(path, fields, make, count, strict)
        if path.suffix in (".json", ".jsonl") or not _HUB_ID.fullmatch(str(source)):
            raise InputError(
                f"{str(source)!r}: no such file or folder, and not a hub id 'owner/name'"
            )
        source = Hub(str(source))
    return _collect(_hub_rows(source, split), fields, make, count, strict, source.name)


def pick(row: Any, name: str) -> Any:
    """The field `name`: row["a"]["b"] for 'a.b', row["a"][0] for 'a.0'. Raises KeyError."""
    if isinstance(row, dict) and name in row:
        return row[name]
    value = row
    for part in name.split("."):
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, dict) and part in value:
            value = value[part]
        else:
            raise KeyError(name)
    return value


def check_row(row: Any, fields: Fields) -> Row:
    """`row` itself if it is an object with the `fields`; else ValueError 'field ...'."""
    if not isinstance(row, dict):
        raise ValueError(f"row is {_kind(row)}, must be an object with {_names(fields)}")
    for name, kind in fields.items():
        try:
            value = pick(row, name)
        except KeyError:
            raise ValueError(f"field {name!r} is missing; needed: {_names(fields)}") from None
        kinds = kind if isinstance(kind, tuple) else (kind,)
        allowed = (*kinds, int) if float in kinds else kinds
        # bool is a subclass of int, but true is no number in a data file.
        wrong = isinstance(value, bool) and bool not in kinds
        if wrong or not isinstance(value, allowed):
            raise ValueError(f"field {name!r} is {_kind(value)}, must be {_types(kinds)}")
    return row


def _collect(
    rows: Located,
    fields: Fields,
    make: Callable[[Row, int], T],
    count: int | None,
    strict: bool,
    name: str,
) -> list[T]:
    out: list[T] = []
    skipped = 0
    for index, (where, row) in enumerate(rows):
        if count is not None and len(out) >= count:
            break
        try:
            if isinstance(row, InputError):
                raise row
            out.append(make(check_row(row, fields), index))
        except (ValueError, InputError) as error:
            if strict:
                raise InputError(f"{where}: {error}") from None
            skipped += 1
    if skipped:
        _log.warning("%s: %d malformed rows left out", name, skipped)
    return out


def _split_file(folder: Path, split: str) -> Path:
    for suffix in (".jsonl", ".json"):
        if (folder / f"{split}{suffix}").is_file():
            return folder / f"{split}{suffix}"
    present = ", ".join(sorted(p.name for p in folder.glob("*.json*"))) or "none"
    raise InputError(
        f"split={split!r}: no {split}.jsonl or {split}.json in {folder}; there: {present}"
    )


def _jsonl_rows(path: Path) -> Located:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}:{number}", _parsed(line, json.loads)


def _json_rows(path: Path) -> Located:
    """The elements of a JSON list, each with the line it begins on."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: {_one_line(error)}") from None
    decoder, space = json.JSONDecoder(), re.compile(r"[\s,]*")

    def past_space(position: int) -> int:
        found = space.match(text, position)
        return found.end() if found else position

    position = past_space(0)
    if text[position : position + 1] != "[":
        raise InputError(f"{path}: must be a list of rows, or lines of JSON in a .jsonl file")
    position += 1
    line, counted = 1, 0
    while True:
        position = past_space(position)
        line += text.count("\n", counted, position)
        counted = position
        if text[position : position + 1] == "]":
            return
        try:
            row, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:  # no way to know where the next begins
            raise InputError(f"{path}:{line}: not JSON: {_one_line(error)}") from None
        yield f"{path}:{line}", row


def _hub_rows(hub: Hub, split: str) -> Located:
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"{hub.name!r} is no local file or folder, and reading it from the hub needs "
            "`datasets`: pip install gtpo_jax[hub]"
        ) from None
    wanted = hub.splits.get(split, split)
    try:
        rows = datasets.load_dataset(hub.name, hub.config, split=wanted)
    except Exception as error:  # the hub fails in many types: network, name, split, config
        raise InputError(
            f"{hub.name!r} split={wanted!r}: the hub says {_one_line(error)}"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{hub.name}[{wanted}]:{number}", row


def _parsed(line: bytes, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, absurd numbers, depth
        return InputError(f"not a JSON object: {_one_line(error)}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _names(fields: Fields) -> str:
    return (
        ", ".join(
            f"{name} ({_types(k if isinstance(k, tuple) else (k,))})"
            for name, k in fields.items()
        )
        or "any field"
    )


def _types(kinds: tuple[type, ...]) -> str:
    return " or ".join(kind.__name__ for kind in kinds)


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
