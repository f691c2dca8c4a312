"""Listings run: every Python block, run file and `console` session of README and docs, on a tiny model and tiny data.

A `console` block goes through the command line in this process; what it quotes is what is printed, numbers and blanks aside,
"..." standing for anything. A block with a title is a file of that name. Blocks without a language are not run.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedloom import methods
from fedloom.cli.main import call
from fedloom.cli.show import out as console
from fedloom.runs import config
from fedloom.studies import study

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r'^```(python|toml|console)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"\d[\d.,]*(e[+-]?\d+)?")
QUICKSTART = Path(config.__file__).parents[1] / "quickstart.toml"


@dataclass(frozen=True)
class Listing:
    """A block of a page."""

    page: Path
    line: int
    language: str
    title: str | None
    text: str


def listings(page: Path) -> Iterator[Listing]:
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        line = text.count("\n", 0, found.start()) + 1
        yield Listing(page, line, found[1], found[2], found[3])


@pytest.fixture
def folder(
    tmp_path: Path, encoder: Path, decoder: Path, questions: Path, dialogues: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Where a page is followed: its data and model are there, and packaged names stand for tiny ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "width", 80)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "run.toml").write_text(QUICKSTART.read_text())
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "model").symlink_to(decoder)
    rows = [json.loads(line) for line in dialogues.read_text().splitlines()]
    renamed = [json.dumps({"question": row["prompt"], "answer": row["response"]}) for row in rows]
    (tmp_path / "my.jsonl").write_text("\n".join(renamed) + "\n")
    (tmp_path / "minilm").symlink_to(encoder)
    (tmp_path / "trec.csv").symlink_to(questions)
    return tmp_path


def tiny(text: str) -> str:
    """Packaged names replaced by files of the folder."""
    return text.replace('"minilm"', '"./minilm"').replace('"trec"', '"trec.csv"')


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_listings_of_a_page_run_in_their_order(
    page: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    namespace: dict[str, Any] = {"__name__": "listing"} | (at_hand() if page.stem == "trainer" else {})
    for each in listings(page):
        if each.title is not None:
            (folder / each.title).write_text(tiny(each.text))
        if each.language == "toml":
            follow_table(each)
        elif each.language == "console":
            follow_session(each, capsys)
        elif each.title is None:
            code = "\n" * each.line + tiny(each.text)
            exec(compile(code, str(page), "exec", dont_inherit=True), namespace)


def at_hand() -> dict[str, Any]:
    """What a reader of the page for users of Trainer has loaded already."""
    import peft
    import transformers

    import fedloom
    from fedloom.data import files

    made, rows = transformers.AutoModelForSequenceClassification, files.read(Path("trec.csv"))
    return {
        "fedloom": fedloom,
        "PeftModel": peft.PeftModel,
        "AutoModelForSequenceClassification": made,
        "name": "./minilm",
        "model": made.from_pretrained("./minilm", num_labels=3),
        "tokenizer": transformers.AutoTokenizer.from_pretrained("./minilm"),
        "rows_a": rows.select(range(24)),
        "rows_b": rows.select(range(24, 48)),
        "test": rows.select(range(48, 60)),
    }


def follow_table(listing: Listing) -> None:
    """A run file is valid, or the part of one that a page shows; a study file is valid too."""
    table = tomllib.loads(listing.text)
    if "methods" in table:
        file = Path("study-of-the-page.toml")
        file.write_text(listing.text)
        assert study.load(file).file.methods
        return
    base = {} if "model" in table else tomllib.loads(QUICKSTART.read_text())
    if "method" in table:
        base.pop("method", None)
        methods.build(table["method"], {"rank": 8, "alpha": 16.0})
    config.parse(merged(base, table), f"{listing.page.name}, line {listing.line}")


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Two nested tables in one."""
    both = {key: merged(base[key], over[key]) for key in base.keys() & over.keys() if isinstance(base[key], dict)}
    return base | over | both


def follow_session(listing: Listing, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command ends well and prints what is quoted below it."""
    for command, *quoted in (part.splitlines() for part in re.split(r"^\$ ", listing.text, flags=re.MULTILINE)[1:]):
        where = f"{listing.page.name}, line {listing.line}: {command}"
        program, *arguments = shlex.split(command)
        assert program == "fedloom", where
        if arguments[0] == "run" and "--help" not in arguments:
            arguments += ["--set", "train.rounds=1", "--set", "train.local_steps=1"]
        capsys.readouterr()
        assert call(arguments) == 0, f"{where}: {capsys.readouterr().err}"
        printed = alike(capsys.readouterr().out)
        wanted = ".*".join(re.escape(alike(part)) for part in re.split(r"^\s*\.\.\.$", "\n".join(quoted), flags=re.M))
        assert not quoted or re.fullmatch(wanted, printed, re.DOTALL), f"{where} prints\n{printed}"


def alike(text: str) -> str:
    """Text without what differs from run to run."""
    return " ".join(NUMBER.sub("#", text).split())


def test_listings_are_found() -> None:
    found = [each for page in PAGES for each in listings(page)]
    for language, least in (("python", 4), ("toml", 5), ("console", 20)):
        assert sum(each.language == language for each in found) >= least
