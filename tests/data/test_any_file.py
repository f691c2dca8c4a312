"""Any bytes as a file of rows give rows, or one clear error; so do labels, targets and a hold-out of those rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedloom.data import labels, load
from fedloom.errors import DataError

pytestmark = pytest.mark.fuzz

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["a", "b", "nan"])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
objects = st.dictionaries(st.sampled_from(["text", "label", "", "x"]), values, max_size=3)
lines = st.lists(objects | values, max_size=5).map(lambda rows: "\n".join(json.dumps(row) for row in rows).encode())
uniform = st.lists(st.fixed_dictionaries({"text": st.text(max_size=5), "label": scalars}), max_size=6).map(
    lambda rows: "\n".join(json.dumps(row) for row in rows).encode()
)
tables = st.text(alphabet=',\t"\n\r ab1é-.\x1b\0', max_size=60).map(str.encode)
anything = st.binary(max_size=80) | lines | uniform | tables


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("any")


@given(anything, st.sampled_from(["jsonl", "json", "csv", "tsv", "parquet"]))
@example(b'{"label": "\\ud800"}', "jsonl")
@example(b'{"label": 1}\n{"label": 1e999}', "jsonl")
@example(b"[" * 100_000, "json")
@example(b"\0", "csv")
@example(b"a,b\n1,2\n,\n", "csv")
def test_any_bytes_as_a_file(folder: Path, data: bytes, suffix: str) -> None:
    path = folder / f"rows.{suffix}"
    path.write_bytes(data)
    rows: Any = None
    try:
        rows = load.load(str(path))
    except DataError as error:
        assert 0 < len(str(error).splitlines()) <= 12 and "\x1b" not in str(error) and "\0" not in str(error)
        return
    assert len(rows) > 0
    for column in rows.column_names:
        for ask in (
            lambda column=column: labels.classes(rows, column, labels.labels_of(rows, column)),
            lambda column=column: labels.values(rows, column),
            lambda column=column: load.split(rows, 0.5, 0, column),
        ):
            try:
                load.require(rows, [column])
                ask()
            except DataError as error:
                assert len(str(error).splitlines()) <= 12
    assert len(load.fingerprint(rows)) == 64
