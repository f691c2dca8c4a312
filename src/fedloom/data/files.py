"""Local files of rows: JSON lines, JSON, CSV, TSV and Parquet, read into memory, so that nothing is written beside them.

Every fault of a file is one DataError that says where it is; the readers' own errors seldom do.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedloom.errors import DataError, nearest
from fedloom.text import shortened, shown

if TYPE_CHECKING:
    from datasets import Dataset

MOST_COLUMNS = 1000
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def is_path(source: str) -> bool:
    """Whether a data source is meant as a path: it looks like one, or there is something of that name here."""
    path = Path(source).expanduser()
    return path.suffix.lower() in SUFFIXES or source.startswith((".", "/", "~")) or path.exists()


def read(path: Path) -> Dataset:
    """The rows of a file. Raises DataError if it is missing, empty, malformed or of another type."""

    suffix = path.suffix.lower()
    if path.is_dir():
        raise DataError(f"{path} is a directory, expected a file: {', '.join(SUFFIXES)}")
    if suffix not in SUFFIXES:
        raise DataError(f"{path} is of a type that cannot be read, expected a file that ends in {', '.join(SUFFIXES)}")
    if not path.is_file():
        if path.exists() or path.is_symlink():
            what = "no file" if path.exists() else "a link to a file that is not there"
            raise DataError(f"{path} is {what}, expected one that ends in {', '.join(SUFFIXES)}")
        beside = [x.name for x in path.parent.glob("*")] if path.parent.is_dir() else []
        raise DataError(f"there is no file {path}{nearest(path.name, beside)}: check its path")
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty, expected at least one row")
        if suffix == ".parquet":
            ds = _parquet(path)
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
        yield where, _object(where, _parsed(where, line, "one object a line"))


def _json(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        rows = _parsed(str(path), text, "a list of objects")
    except DataError as error:
        if isinstance(error.__cause__, json.JSONDecodeError) and error.__cause__.msg == "Extra data":
            yield from _json_lines(path, text)  # JSON lines under the other name
            return
        raise
    if isinstance(rows, dict):
        lists = [value for value in rows.values() if isinstance(value, list)]
        rows = lists[0] if len(lists) == 1 else [rows]
    if not isinstance(rows, list):
        raise DataError(f"{path} holds {_short(text)}, expected a list of objects")
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        yield where, _object(where, row)


def _parsed(where: str, text: str, expected: str) -> Any:
    """A JSON value. Raises DataError if it is none, or a table cannot hold it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        lines = text.split("\n")
        place = where if len(lines) == 1 else f"{where}, line {error.lineno}"
        raise DataError(
            f"{place} is not JSON ({error.msg} at column {error.colno}): {_short(lines[error.lineno - 1])}; "
            f"expected {expected}"
        ) from error
    except RecursionError:
        raise DataError(f"{where} is nested without end, expected an object of texts and numbers") from None
    except ValueError as error:  # an integer of thousands of digits
        raise DataError(f"{where} has a number that cannot be read ({error}), expected at most 64 bits") from None


def _object(where: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f'{where} holds {shown(row)}, expected an object such as {{"text": ..., "label": ...}}')
    return row


def _records(path: Path, rows: Iterator[tuple[str, dict[str, Any]]]) -> Dataset:
    """A data set of the union of the rows' fields; a field that a row lacks is null there."""
    import datasets
    import pyarrow as pa  # type: ignore[import-untyped]  # ships no types

    found = list(rows)
    names = list(dict.fromkeys(name for _, row in found for name in row))
    _named_apart(path, names)
    columns = {name: [row.get(name) for _, row in found] for name in names}
    try:
        return datasets.Dataset.from_dict(columns)
    except (pa.ArrowException, TypeError, ValueError, OverflowError, RecursionError) as error:
        for name, values in columns.items():
            _uniform(name, values, [where for where, _ in found])
        raise DataError(f"{path} cannot be read as a table: {_first_line(error)}") from error


def _named_apart(path: Path, names: Sequence[str]) -> None:
    if not names:
        raise DataError(f"{path} has no rows, expected at least one")
    # Tables of datasets take minutes for ten thousand.
    if len(names) > MOST_COLUMNS:
        raise DataError(f"{path} has {len(names)} columns, expected at most {MOST_COLUMNS}: keep those of the task")
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise DataError(f"{path} has more than one column {shown(twice[0])}: columns need names of their own")


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
                f"{place}: {name!r} is {kind(value)} ({shown(value)}), but {first} in the rows before: use one type"
            )


def _table(path: Path, text: str, delimiter: str) -> Dataset:
    import datasets
    import pandas as pd  # type: ignore[import-untyped]  # ships no types
    import pyarrow as pa

    # Python's reader checks the shape, pandas finds the types: pandas alone fills short rows without a word.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    most = csv.field_size_limit(len(text) + 1)  # a document may be longer than Python's 128 KiB
    try:
        header = next((row for row in reader if row), [])
        _named_apart(path, header)
        for row in reader:
            if row and len(row) != len(header):
                names = shortened(", ".join(header), 200)
                raise DataError(
                    f"{path}, line {reader.line_num} has {len(row)} fields, expected {len(header)} ({names}): "
                    f"{_short(delimiter.join(row))}; put fields that hold {delimiter!r} in double quotes"
                )
        frame = pd.read_csv(io.StringIO(text, newline=""), sep=delimiter, keep_default_na=False, na_values=[""])
        return datasets.Dataset.from_pandas(frame, preserve_index=False)
    except DataError:
        raise
    except (csv.Error, ValueError, TypeError, OverflowError, pa.ArrowException) as error:
        raise DataError(f"{path}, line {reader.line_num} is not a table: {_first_line(error)}") from error
    finally:
        csv.field_size_limit(most)


def _parquet(path: Path) -> Dataset:
    import datasets
    import pyarrow.parquet as pq  # type: ignore[import-untyped]  # ships no types
    from datasets.table import InMemoryTable

    try:
        _named_apart(path, pq.read_schema(path).names)
        return datasets.Dataset(InMemoryTable(pq.read_table(path)))
    except DataError:
        raise
    except OSError as error:  # Arrow's own error for a file that is damaged is one too
        raise DataError(f"{path} is not a Parquet file: {_first_line(error)}") from error
    except Exception as error:  # types and metadata that the readers do not know fail in many ways
        raise DataError(f"{path} is not a Parquet file that can be read: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _short(text: str) -> str:
    return shortened(text, 60)
