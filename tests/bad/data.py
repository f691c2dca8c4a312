"""Bad and odd data: what a user may have by accident, and what a stranger may send on purpose."""

from __future__ import annotations

import gzip
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tests.bad.campaign import Case, Expected, written
from tests.bad.models import GOOD_WORDS, decoder, encoder

ROWS: list[dict[str, Any]] = [{"text": f"{GOOD_WORDS[i % 8]} is the city", "label": "abc"[i % 3]} for i in range(18)]
TABLE = "text,label\n" + "".join(f"{x['text']},{x['label']}\n" for x in ROWS)
CHATS = [{"messages": [{"role": "user", "content": "who is"}, {"role": "assistant", "content": "the king"}]}] * 8
DIALOGUES = [{"prompt": "who is", "response": "the king"}] * 8
TEMPLATE = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
ESCAPE = "\x1b]0;owned\x07\x1b[31m"

Content = bytes | str | list[Any]


def cases() -> Iterator[Case]:
    """All of them."""
    for name, (expected, file, content, says, *keys) in FILES.items():
        yield _labelled(name, expected, file, content, says, keys[0] if keys else {})
    for name, (expected, rows, says, *keys) in COLUMNS.items():
        yield _labelled(name, expected, "rows.jsonl", [*ROWS[:12], *rows], says, keys[0] if keys else {})
    for name, (expected, columns, says) in PARQUET.items():
        yield _labelled(name, expected, "rows.parquet", _parquet(columns), says, {})
    for name, (expected, held_out, says) in HELD_OUT.items():
        yield Case(f"held-out rows: {name}", expected, _held_out(held_out), says)
    for name, (expected, make, says) in PATHS.items():
        yield Case(f"path: {name}", expected, _at(make), says)
    for name, (expected, keys_, says) in KEYS.items():
        yield _labelled(f"run file: {name}", expected, "rows.csv", TABLE, says, keys_)
    for name, (expected, rows, keys_, template, says) in CAUSAL.items():
        yield Case(f"causal: {name}", expected, _causal(rows, keys_, template), says)


def _labelled(name: str, expected: Expected, file: str, content: Content, says: str, keys: Mapping[str, Any]) -> Case:
    def make(folder: Path) -> dict[str, Any]:
        return {"model.name": str(encoder()), "task.data": str(written(folder / file, content)), **keys}

    return Case(name, expected, make, says)


def _held_out(content: Content) -> Callable[[Path], dict[str, Any]]:
    def make(folder: Path) -> dict[str, Any]:
        data, held = written(folder / "rows.csv", TABLE), written(folder / "held.jsonl", content)
        return {"model.name": str(encoder()), "task.data": str(data), "task.eval_data": str(held)}

    return make


def _at(make: Callable[[Path], Path | str]) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: {"model.name": str(encoder()), "task.data": str(make(folder))}


def _causal(rows: Content, keys: Mapping[str, Any], template: str | None) -> Callable[[Path], dict[str, Any]]:
    def make(folder: Path) -> dict[str, Any]:
        data = written(folder / "rows.jsonl", rows)
        model = str(decoder() if template is None else decoder(folder / "model", chat_template=template))
        return {"model.name": model, "task.data": str(data), "task.kind": "causal-lm", **keys}

    return make


def _parquet(columns: Mapping[str, Any] | pa.Table) -> bytes:
    file = io.BytesIO()
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), file)
    return file.getvalue()


def _zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("xl/workbook.xml", TABLE)
    return file.getvalue()


TEXTS, LABELS = [x["text"] for x in ROWS], [x["label"] for x in ROWS]
GOOD_PARQUET = _parquet({"text": TEXTS, "label": LABELS})
WIDE = [f"c{i}" for i in range(20_000)]

FILES: dict[str, Any] = {
    "empty csv": ("refused", "rows.csv", b"", "is empty"),
    "empty tsv": ("refused", "rows.tsv", b"", "is empty"),
    "empty jsonl": ("refused", "rows.jsonl", b"", "is empty"),
    "empty json": ("refused", "rows.json", b"", "is empty"),
    "empty parquet": ("refused", "rows.parquet", b"", "is empty"),
    "csv of line ends": ("refused", "rows.csv", b"\n\n\n", "no rows"),
    "csv of a header alone": ("refused", "rows.csv", "text,label\n", "no rows"),
    "jsonl of line ends": ("refused", "rows.jsonl", b"\n \n\n", "no rows"),
    "json of no rows": ("refused", "rows.json", "[]", "no rows"),
    "json of an empty object": ("refused", "rows.json", "{}", ""),
    "json null": ("refused", "rows.json", "null", "expected a list"),
    "json number": ("refused", "rows.json", "1", "expected a list"),
    "json text": ("refused", "rows.json", '"text"', "expected a list"),
    "csv with a BOM": ("trains", "rows.csv", b"\xef\xbb\xbf" + TABLE.encode(), ""),
    "jsonl with a BOM": ("trains", "rows.jsonl", b"\xef\xbb\xbf" + "\n".join(map(json.dumps, ROWS)).encode(), ""),
    "csv in UTF-16": ("refused", "rows.csv", TABLE.encode("utf-16"), "UTF-8"),
    "csv in UTF-32": ("refused", "rows.csv", TABLE.encode("utf-32"), "UTF-8"),
    "csv in Latin-1": ("refused", "rows.csv", TABLE.replace("city", "é").encode("latin-1"), "UTF-8"),
    "jsonl in Latin-1": ("refused", "rows.jsonl", b'{"text": "\xe9", "label": "a"}', "UTF-8"),
    "csv with NUL": ("either", "rows.csv", TABLE.replace("city", "ci\0ty"), ""),
    "csv of random bytes": ("refused", "rows.csv", bytes(range(256)) * 40, ""),
    "jsonl of random bytes": ("refused", "rows.jsonl", bytes(range(256)) * 40, ""),
    "csv with a short row": ("refused", "rows.csv", TABLE + "alone\n", "line 20 has 1 field"),
    "csv with a long row": ("refused", "rows.csv", TABLE + "a,b,c\n", "line 20 has 3 fields"),
    "csv with an open quote": ("refused", "rows.csv", TABLE + '"open,a\n' + TABLE, ""),
    "csv with a stray quote": ("refused", "rows.csv", TABLE + '"a" b,a\n', "line 20"),
    "csv with a column twice": (
        "refused",
        "rows.csv",
        "text,label,text\nx,a,y\nx,b,y\n",
        "more than one column 'text'",
    ),
    "csv with a column without a name": (
        "trains",
        "rows.csv",
        TABLE.replace("\n", ",1\n").replace("label,1", "label,"),
        "",
    ),
    "csv without a header": ("refused", "rows.csv", TABLE.partition("\n")[2], "task.text"),
    "csv with semicolons": ("refused", "rows.csv", TABLE.replace(",", ";"), ""),
    "csv with tabs": ("refused", "rows.csv", TABLE.replace(",", "\t"), ""),
    "tsv": ("trains", "rows.tsv", TABLE.replace(",", "\t"), ""),
    "csv with CRLF": ("trains", "rows.csv", TABLE.replace("\n", "\r\n"), ""),
    "csv with CR": ("either", "rows.csv", TABLE.replace("\n", "\r"), ""),
    "csv with a text of 1 MB": ("trains", "rows.csv", TABLE + "who is " * 150_000 + ",a\n", ""),
    "jsonl with a text of 5 MB": ("trains", "rows.jsonl", [*ROWS, {"text": "who is " * 700_000, "label": "a"}], ""),
    "jsonl with a word of 1 MB": ("trains", "rows.jsonl", [*ROWS, {"text": "x" * 1_000_000, "label": "a"}], ""),
    "csv with 20,000 columns": (
        "refused",
        "rows.csv",
        ",".join(WIDE) + "\n" + ",".join(WIDE) + "\n",
        "20000 columns",
    ),
    "jsonl with 20,000 columns": ("refused", "rows.jsonl", [dict.fromkeys(WIDE, 1)] * 2, "20000 columns"),
    "jsonl nested 5,000 deep": ("refused", "rows.jsonl", '{"text": ' + "[" * 5000 + "]" * 5000 + "}", "nested"),
    "json nested 100,000 deep": ("refused", "rows.json", "[" * 100_000, "nested"),
    "jsonl nested 900 deep": ("refused", "rows.jsonl", '{"text": ' + "[" * 900 + "]" * 900 + ', "label": 1}', ""),
    "integer of 5,000 digits": ("refused", "rows.jsonl", '{"text": "a", "label": ' + "9" * 5000 + "}", "number"),
    "integer of 400 digits": ("refused", "rows.jsonl", '{"text": "a", "label": ' + "9" * 400 + "}", ""),
    "integer of 65 bits": ("either", "rows.jsonl", [{"text": "a", "label": 2**64 + i % 2} for i in range(9)], ""),
    "jsonl of lists": ("refused", "rows.jsonl", [["who", "a"]] * 3, "expected an object"),
    "jsonl of numbers": ("refused", "rows.jsonl", [1, 2], "expected an object"),
    "jsonl with commas": ("refused", "rows.jsonl", '{"text": "a", "label": 1},\n{"text": "b", "label": 2},', "line 1"),
    "jsonl with single quotes": ("refused", "rows.jsonl", "{'text': 'a', 'label': 1}", "is not JSON"),
    "jsonl over many lines": ("refused", "rows.jsonl", json.dumps(ROWS[0], indent=1), "one object a line"),
    "jsonl cut off": ("refused", "rows.jsonl", "\n".join(map(json.dumps, ROWS))[:-9], "line 18"),
    "jsonl under json": ("trains", "rows.json", ROWS, ""),
    "json list": ("trains", "rows.json", json.dumps(ROWS), ""),
    "json under data": ("trains", "rows.json", json.dumps({"version": 1, "data": ROWS}), ""),
    "json of two lists": ("refused", "rows.json", json.dumps({"train": ROWS, "test": ROWS}), ""),
    "json cut off": ("refused", "rows.json", json.dumps(ROWS)[:-5], "is not JSON"),
    "html": ("refused", "rows.jsonl", "<!DOCTYPE html>\n<html><body>404</body></html>", "is not JSON"),
    "a pointer of Git LFS": ("refused", "rows.csv", "version https://git-lfs.github.com/spec/v1\noid sha256:1\n", ""),
    "gzip under csv": ("refused", "rows.csv", gzip.compress(TABLE.encode()), "UTF-8"),
    "gzip": ("refused", "rows.csv.gz", gzip.compress(TABLE.encode()), "expected a file that ends in"),
    "a spreadsheet": ("refused", "rows.xlsx", _zip(), "expected a file that ends in"),
    "a spreadsheet under csv": ("refused", "rows.csv", _zip(), ""),
    "text": ("refused", "rows.txt", TABLE, "expected a file that ends in"),
    "parquet": ("trains", "rows.parquet", GOOD_PARQUET, ""),
    "parquet cut off": ("refused", "rows.parquet", GOOD_PARQUET[:-20], "Parquet"),
    "parquet with bytes changed": ("either", "rows.parquet", GOOD_PARQUET[:60] + b"\xff" * 40 + GOOD_PARQUET[100:], ""),
    "parquet with its end changed": (
        "refused",
        "rows.parquet",
        GOOD_PARQUET[:-60] + b"\xff" * 40 + GOOD_PARQUET[-20:],
        "Parquet",
    ),
    "parquet of four bytes": ("refused", "rows.parquet", b"PAR1", "Parquet"),
    "csv under parquet": ("refused", "rows.parquet", TABLE, "Parquet"),
    "parquet under csv": ("refused", "rows.csv", GOOD_PARQUET, ""),
    "one row": ("refused", "rows.jsonl", ROWS[:1], ""),
    "two rows": ("refused", "rows.jsonl", ROWS[:2], ""),
    "one class": ("refused", "rows.jsonl", [x | {"label": "a"} for x in ROWS], "one class only"),
    "as many classes as rows": ("refused", "rows.jsonl", [x | {"label": f"c{i}"} for i, x in enumerate(ROWS)], ""),
    "label missing": ("refused", "rows.jsonl", [{"text": "who"}] * 4, "no column 'label'"),
    "text missing": ("refused", "rows.jsonl", [{"body": "who", "label": i % 2} for i in range(8)], "task.text"),
    "escape sequences in a header": ("refused", "rows.csv", f"text{ESCAPE},label{ESCAPE}\na,b\n", ""),
    "escape sequences in a bad line": ("refused", "rows.jsonl", f"{{{ESCAPE}}}", ""),
    "markup in a header": ("refused", "rows.csv", "[/red],[bold]\na,b\n", "[/red]"),
    "markup in a bad line": ("refused", "rows.jsonl", "[/red][/]", ""),
    "markup in a short row": ("refused", "rows.csv", TABLE + "[/red]\n", "[/red]"),
}
"""name -> what should become of it, file, content, words of the message, keys of the run file."""


def _labels(*labels: Any) -> list[Any]:
    return [{"text": "who is", "label": x} for x in labels]


def _texts(*texts: Any) -> list[Any]:
    return [{"text": x, "label": "a"} for x in texts]


REGRESSION = {"task.kind": "regression"}
COLUMNS: dict[str, Any] = {
    "label null": ("refused", _labels(None), "row 13 has no value in column 'label'"),
    "label a list among texts": ("refused", _labels([1]), "'label'"),
    "label an object among texts": ("refused", _labels({"a": 1}), "'label'"),
    "label a number among texts": ("refused", _labels(1), "line 13"),
    "label an empty text": ("either", _labels("", ""), ""),
    "label of line ends": ("trains", _labels("x\ny", "x\ny"), ""),
    "label with escape sequences": ("trains", _labels(ESCAPE, ESCAPE), ""),
    "label with markup": ("trains", _labels("[/red]", "[/red]"), ""),
    "label half a character": ("refused", ['{"text": "a", "label": "\\ud800"}'], ""),
    "text null": ("refused", _texts(None), "row 13 has no value in column 'text'"),
    "text a list": ("refused", _texts(["a"]), "'text'"),
    "text an object": ("refused", _texts({"a": 1}), "'text'"),
    "text a number": ("refused", _texts(1), "line 13"),
    "text empty": ("trains", _texts("", "  "), ""),
    "text with escape sequences": ("trains", _texts(ESCAPE, "\0", "[/red]", "\u202e"), ""),
    "text half a character": ("refused", ['{"text": "\\ud800", "label": "a"}'], ""),
    "text of special tokens": ("trains", _texts("[CLS] [SEP] [PAD] [UNK]"), ""),
    "regression on texts": ("refused", [], "expected a number", REGRESSION),
    "no such column": ("refused", [], "no column 'sentence'", {"task.text": ["sentence"]}),
    "three columns": ("refused", [], "", {"task.text": ["text", "label", "text"]}),
    "the label as text": ("either", [], "", {"task.text": ["label"]}),
    "rows longer than positions": ("refused", [], "positions for 64", {"task.max_length": 1024}),
    "rows of one token": ("either", [], "", {"task.max_length": 1}),
    "fewer rows than clients": ("refused", [], "", {"clients.count": 50}),
    "partition by a missing field": (
        "refused",
        [],
        "no column 'site'",
        {"clients.partition": "by-field", "clients.field": "site"},
    ),
    "partition by a field with null": (
        "refused",
        [x | {"site": None} for x in _texts("a")],
        "'site'",
        {"clients.partition": "by-field", "clients.field": "site"},
    ),
    "holdout of all rows": ("refused", [], "cannot hold out", {"task.holdout": 0.999}),
}
"""name -> what should become of it, rows after good ones, words of the message, keys of the run file."""

N = len(ROWS)
PARQUET: dict[str, Any] = {
    "parquet: text in bytes": ("refused", {"text": [b"who"] * N, "label": LABELS}, "bytes"),
    "parquet: text in lists": ("refused", {"text": [["who"]] * N, "label": LABELS}, "lists"),
    "parquet: text in objects": ("refused", {"text": [{"a": "who"}] * N, "label": LABELS}, "objects"),
    "parquet: text all null": ("refused", {"text": pa.nulls(N), "label": LABELS}, "no value"),
    "parquet: label all null": ("refused", {"text": TEXTS, "label": pa.nulls(N, pa.string())}, "no value"),
    "parquet: label NaN": ("refused", {"text": TEXTS, "label": [float("nan"), *range(N - 1)]}, "no value"),
    "parquet: label in lists": ("refused", {"text": TEXTS, "label": [[1]] * N}, "lists"),
    "parquet: label true or false": ("trains", {"text": TEXTS, "label": [i % 2 == 0 for i in range(N)]}, ""),
    "parquet: label in float64": ("trains", {"text": TEXTS, "label": [float(i % 2) for i in range(N)]}, ""),
    "parquet: label in dates": (
        "either",
        {"text": TEXTS, "label": [datetime(2026, 1, 1 + i % 2) for i in range(N)]},
        "",
    ),
    "parquet: label in decimals": ("either", {"text": TEXTS, "label": [Decimal(i % 2) for i in range(N)]}, ""),
    "parquet: large strings": ("trains", {"text": pa.array(TEXTS, pa.large_string()), "label": LABELS}, ""),
    "parquet: string views": ("either", {"text": pa.array(TEXTS, pa.string_view()), "label": LABELS}, ""),
    "parquet: dictionaries": (
        "either",
        {"text": TEXTS, "label": pa.array(LABELS).dictionary_encode()},
        "",
    ),
    "parquet: no columns": ("refused", pa.table({}), ""),
    "parquet: no rows": ("refused", {"text": pa.array([], pa.string()), "label": pa.array([], pa.string())}, "no rows"),
    "parquet: a column twice": (
        "refused",
        pa.table([pa.array(TEXTS), pa.array(LABELS), pa.array(TEXTS)], names=["text", "label", "text"]),
        "more than one column 'text'",
    ),
    "parquet: features of no kind": (
        "refused",
        pa.table({"text": TEXTS, "label": LABELS}).replace_schema_metadata(
            {"huggingface": '{"info": {"features": {"text": {"_type": "Nonsense"}}}}'}
        ),
        "Parquet",
    ),
    "parquet: metadata that is no JSON": (
        "either",
        pa.table({"text": TEXTS, "label": LABELS}).replace_schema_metadata({"huggingface": "{", "pandas": "["}),
        "",
    ),
}

HELD_OUT: dict[str, Any] = {
    "a label not in training": ("refused", _labels("z"), "label 'z'"),
    "a label of markup": ("refused", _labels("[/red]"), "[/red]"),
    "a label of escape sequences": ("refused", _labels(ESCAPE), "does not occur"),
    "a label of 1 MB": ("refused", _labels("z" * 1_000_000), "does not occur"),
    "numbers for texts": ("refused", _labels(1), "does not occur"),
    "other columns": ("refused", [{"question": "who", "answer": "a"}], "no column 'text'"),
    "empty": ("refused", b"", "is empty"),
    "one row": ("trains", _labels("a"), ""),
}


def _link(folder: Path, target: str | Path) -> Path:
    (folder / "link.csv").symlink_to(target)
    return folder / "link.csv"


def _fifo(folder: Path) -> Path:
    os.mkfifo(folder / "fifo.csv")
    return folder / "fifo.csv"


def _folder(folder: Path) -> Path:
    (folder / "rows.csv").mkdir()
    return folder / "rows.csv"


def _unreadable(folder: Path) -> Path:
    file = written(folder / "rows.csv", TABLE)
    file.chmod(0)
    return file


PATHS: dict[str, tuple[Expected, Callable[[Path], Path | str], str]] = {
    "a link": ("trains", lambda f: _link(f, written(f / "a" / "rows.csv", TABLE)), ""),
    "a link to nothing": ("refused", lambda f: _link(f, "nothing.csv"), "not there"),
    "a link to itself": ("refused", lambda f: _link(f, "link.csv"), ""),
    "a link to a device": ("refused", lambda f: _link(f, "/dev/zero"), ""),
    "a fifo": ("refused", _fifo, ""),
    "a directory": ("refused", _folder, "is a directory"),
    "the folder": ("refused", lambda f: f, "is a directory"),
    "nobody may read it": ("refused" if os.geteuid() else "trains", _unreadable, "cannot be read"),
    "below a folder of markup": ("trains", lambda f: written(f / "a[" / "b]" / "rows.csv", TABLE), ""),
    "below a folder of escape sequences": ("trains", lambda f: written(f / "a\x1b[31mb" / "rows.csv", TABLE), ""),
    "not there, of markup": ("refused", lambda f: f / "a[" / "red].csv", "there is no file"),
    "not there, misspelt": (
        "refused",
        lambda f: written(f / "rows.csv", TABLE).with_name("row.csv"),
        "did you mean 'rows.csv'",
    ),
    "of 5,000 characters": ("refused", lambda f: f"{f}/{'x' * 5000}.csv", ""),
    "with NUL": ("refused", lambda f: f"{f}/a\0b.csv", ""),
    "empty": ("refused", lambda f: "", ""),
    "an address": ("refused", lambda f: "https://example.org/rows.csv", ""),
    "a packaged name misspelt": ("refused", lambda f: "trecc", "did you mean 'trec'"),
}

KEYS: dict[str, Any] = {
    "a template without its column": (
        "refused",
        {"task.kind": "causal-lm", "task.prompt": "text", "task.response": "label", "task.template": "{x}"},
        "",
    ),
    "labels by length": ("either", {"clients.partition": "by-length"}, ""),
    "f1 of three classes": ("refused", {"task.metrics": ["f1"]}, "f1"),
    "a metric that is none": ("refused", {"task.metrics": ["nonsense"]}, "nonsense"),
}

CHAT = {"task.template": "chat"}


def _turns(*turns: Any) -> list[Any]:
    return [*CHATS, {"messages": list(turns)}]


CAUSAL: dict[str, Any] = {
    "prompts": ("trains", DIALOGUES, {}, None, ""),
    "no prompts": ("refused", [{"response": "a"}] * 4, {}, None, "no column 'prompt'"),
    "an answer null": ("refused", [*DIALOGUES, {"prompt": "who", "response": None}], {}, None, "row 9"),
    "an answer that is a list": ("refused", [{"prompt": "who", "response": ["a"]}] * 8, {}, None, "lists"),
    "empty prompts and answers": ("either", [{"prompt": "", "response": ""}] * 8, {}, None, ""),
    "conversations": ("trains", CHATS, {}, TEMPLATE, ""),
    "conversations without a template": ("refused", CHATS, {}, None, "chat template"),
    "messages a text": ("refused", [{"messages": "who is"}] * 8, {}, TEMPLATE, "row 1"),
    "messages empty": ("refused", [*CHATS, {"messages": []}], {}, TEMPLATE, "row 9"),
    "no turn of an assistant": ("refused", _turns({"role": "user", "content": "who"}), {}, TEMPLATE, "row 9"),
    "a turn without content": ("refused", _turns({"role": "assistant"}), {}, TEMPLATE, "row 9"),
    "content in parts": (
        "refused",
        [{"messages": [{"role": "assistant", "content": [{"type": "text", "text": "x"}]}]}] * 8,
        {},
        TEMPLATE,
        "row 1",
    ),
    "a template that raises": ("refused", DIALOGUES, CHAT, "{{ raise_exception('[/red]\x1b[31m') }}", "chat template"),
    "a template that is none": ("refused", DIALOGUES, CHAT, "{% for %}", "chat template"),
    "a template of unknown names": ("refused", DIALOGUES, CHAT, "{{ nothing.at.all }}", "chat template"),
    "a template that reaches outside": (
        "refused",
        DIALOGUES,
        CHAT,
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "chat template",
    ),
    "a template that writes a terabyte": ("refused", DIALOGUES, CHAT, "{{ 'x' * 10**12 }}", "chat template"),
    "a template of 10^12 rounds": (
        "refused",
        DIALOGUES,
        CHAT,
        "{% for i in range(10**12) %}x{% endfor %}",
        "chat template",
    ),
    "a template of nothing": ("either", DIALOGUES, CHAT, "{{ '' }}", ""),
    "an answer longer than positions": ("refused", DIALOGUES, {"task.max_length": 4096}, None, "positions"),
    "a choice that is none": ("refused", DIALOGUES, {"task.choices": "nothing"}, None, ""),
}
"""name -> what should become of it, rows, keys of the run file, chat template (None: none), words of the message."""

ENDLESS = Case(
    "causal: a template that never ends",
    "refused",
    _causal(DIALOGUES, CHAT, "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"),
    "chat template",
)
"""Takes the half minute that a template is given."""
