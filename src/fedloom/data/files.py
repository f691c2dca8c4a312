"""Local files of rows: JSON lines, JSON, CSV, TSV and Parquet, read into memory, so that nothing is written beside them.

Every fault of a file is one DataError that says where it is; the readers' own errors seldom do.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedloom.errors import DataError, nearest

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def is_path(source: str) -> bool:
    """Whether a data source is meant as a path: it looks like one, or there is something of that name here."""
    path = Path(source).expanduser()
    return path.suffix.lower() in SUFFIXES or source.startswith((".", "/", "~")) or path.exists()


def read(path: Path) -> Dataset:
    """The rows of a file. Raises DataError if it is missing, empty, malformed or of another type."""
    import datasets

    suffix = path.suffix.lower()
    if path.is_dir():
        raise DataError(f"{path} is a directory, expected a file: {', '.join(SUFFIXES)}")
    if suffix not in SUFFIXES:
        raise DataError(f"{path} is of a type that cannot be read, expected a file that ends in {', '.join(SUFFIXES)}")
    if not path.is_file():
        beside = [x.name for x in path.parent.glob("*")] if path.parent.is_dir() else []
        raise DataError(f"there is no file {path}{nearest(path.name, beside)}: check its path")
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty, expected at least one row")
        if suffix == ".parquet":
            ds = datasets.Dataset(_parquet(path))
        else:
            text = path.read_text(encoding="utf-8-sig")
            if suffix in (".csv", ".tsv"):
                ds = _table(path, text, "," if suffix == ".csv" else "\t")
            else:
                ds = _records(path, _json_lines(path, text) if suffix == ".jsonl" else _json(path, text))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(ds) == 0:
        raise DataError(f"{path} has no rows, expected at least one")
    return ds


def _json_lines(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    # Only \n ends a line of JSON: other line separators may stand inside its strings.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where} is not JSON ({error.msg} at column {error.colno}): {_short(line)}; expected one object a line"
            ) from error
        yield where, _object(where, row)


def _json(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON lines under the other name
            yield from _json_lines(path, text)
            return
        line = text.split("\n")[error.lineno - 1]
        raise DataError(
            f"{path}, line {error.lineno} is not JSON ({error.msg} at column {error.colno}): {_short(line)}"
        ) from error
    if isinstance(rows, dict):
        lists = [value for value in rows.values() if isinstance(value, list)]
        rows = lists[0] if len(lists) == 1 else [rows]
    if not isinstance(rows, list):
        raise DataError(f"{path} holds {_short(text)}, expected a list of objects")
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        yield where, _object(where, row)


def _object(where: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(
            f'{where} holds {_short(json.dumps(row))}, expected an object such as {{"text": ..., "label": ...}}'
        )
    return row


def _records(path: Path, rows: Iterator[tuple[str, dict[str, Any]]]) -> Dataset:
    """A data set of the union of the rows' fields; a field that a row lacks is null there."""
    import datasets
    import pyarrow as pa  # type: ignore[import-untyped]  # ships no types

    found = list(rows)
    names = list(dict.fromkeys(name for _, row in found for name in row))
    columns = {name: [row.get(name) for _, row in found] for name in names}
    try:
        return datasets.Dataset.from_dict(columns)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        for name, values in columns.items():
            _uniform(name, values, [where for where, _ in found])
        raise DataError(f"{path} cannot be read as a table: {error}") from error


def _uniform(name: str, values: list[Any], where: list[str]) -> None:
    def kind(value: Any) -> str:
        if isinstance(value, bool):
            return "true or false"
        words = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
        return words.get(type(value), type(value).__name__)

    first: str | None = None
    for value, place in zip(values, where, strict=True):
        if value is None:
            continue
        first = first or kind(value)
        if kind(value) != first:
            raise DataError(
                f"{place}: {name!r} is {kind(value)} ({_short(str(value))}), but {first} in the rows before: use one type"
            )


def _table(path: Path, text: str, delimiter: str) -> Dataset:
    import datasets
    import pandas as pd  # type: ignore[import-untyped]  # ships no types

    # Python's reader checks the shape, pandas finds the types: pandas alone fills short rows without a word.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(reader, None) or []
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            raise DataError(f"{path} has more than one column {twice[0]!r}: columns need names of their own")
        for row in reader:
            if row and len(row) != len(header):
                raise DataError(
                    f"{path}, line {reader.line_num} has {len(row)} fields, expected {len(header)} ({', '.join(header)}): "
                    f"{_short(delimiter.join(row))}; put fields that hold {delimiter!r} in double quotes"
                )
        frame = pd.read_csv(io.StringIO(text, newline=""), sep=delimiter, keep_default_na=False, na_values=[""])
    except (csv.Error, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}, line {reader.line_num} is not a table: {error}") from error
    return datasets.Dataset.from_pandas(frame, preserve_index=False)


def _parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq  # type: ignore[import-untyped]  # ships no types
    from datasets.table import InMemoryTable

    try:
        return InMemoryTable(pq.read_table(path))
    except pa.ArrowException as error:
        raise DataError(f"{path} is not a Parquet file: {str(error).splitlines()[0]}") from error


def _short(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
