"""Reading rows from a file, a folder or the Hugging Face hub, each row checked at the door."""

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gtpo_jax.errors import InputError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_log = logging.getLogger(__name__)

Row = dict[str, Any]


def read_jsonl(
    path: str | os.PathLike, fields: Mapping[str, type], strict: bool = True
) -> Iterator[Row]:
    """The rows of a JSON-lines file, blank lines skipped.

    `fields` are the names that a row must have and their types; others pass unchecked.
    A missing file is an InputError, at the first row asked for. So is a malformed row,
    by file and line; with `strict` off it is left out and their number is logged.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected JSON lines with {_names(fields)}")
    skipped = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield check_row(_parse(line, f"{path}:{number}"), fields, f"{path}:{number}")
            except InputError:
                if strict:
                    raise
                skipped += 1
    if skipped:
        _log.warning("%s: %d malformed rows left out", path, skipped)


def read_rows(
    source: str | os.PathLike,
    split: str,
    fields: Mapping[str, type],
    config: str | None = None,
    strict: bool = True,
) -> Iterator[Row]:
    """The rows of one split of `source`, checked as `read_jsonl` does.

    `source` is a file, a folder that holds `{split}.jsonl`, or else a hub id 'owner/name',
    read by `datasets` with its `config`. Raises InputError where it is none of these, where
    `datasets` is not installed, and where the hub cannot give the split.
    """
    path = Path(source)
    if path.is_dir():
        path = path / f"{split}.jsonl"
        if not path.is_file():
            present = ", ".join(sorted(p.name for p in path.parent.glob("*.jsonl"))) or "none"
            raise InputError(f"split={split!r}: no {path}; JSON-lines files there: {present}")
    if path.is_file():
        return read_jsonl(path, fields, strict)
    name = str(source)
    if path.suffix in (".json", ".jsonl") or not _HUB_ID.fullmatch(name):
        raise InputError(
            f"{name!r}: no such file or folder, and not a hub id of the form 'owner/name'"
        )
    return _read_hub(name, split, fields, config)


def check_row(row: Any, fields: Mapping[str, type], where: str) -> Row:
    """`row` itself if it is an object with the `fields`, or InputError 'WHERE: field ...'."""
    if not isinstance(row, dict):
        raise InputError(
            f"{where}: row is {_kind(row)}, must be an object with {_names(fields)}"
        )
    for name, kind in fields.items():
        if name not in row:
            raise InputError(f"{where}: field {name!r} is missing; needed: {_names(fields)}")
        value = row[name]
        allowed = (int, float) if kind is float else (kind,)
        # bool is a subclass of int, but true is no number in a data file.
        wrong = isinstance(value, bool) and kind is not bool
        if wrong or not isinstance(value, allowed):
            raise InputError(
                f"{where}: field {name!r} is {_kind(value)}, must be {kind.__name__}"
            )
    return row


def _parse(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, absurd numbers, depth
        reason = " ".join(str(error).split())
        raise InputError(f"{where}: not a JSON object: {reason}") from None


def _read_hub(
    name: str, split: str, fields: Mapping[str, type], config: str | None
) -> Iterator[Row]:
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"{name!r} is no local file or folder, and reading it from the hub needs "
            "`datasets`: pip install gtpo_jax[hub]"
        ) from None
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the hub fails in many types: network, name, split, config
        reason = " ".join(str(error).split())
        raise InputError(f"{name!r} split={split!r}: the hub says {reason}") from error
    return (
        check_row(row, fields, f"{name}[{split}]:{i}") for i, row in enumerate(rows, start=1)
    )


def _names(fields: Mapping[str, type]) -> str:
    return (
        ", ".join(f"{name} ({kind.__name__})" for name, kind in fields.items()) or "any field"
    )


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
