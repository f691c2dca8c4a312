"""`fedloom keys` and `fedloom init`: what the configuration says of itself, and run files made from it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import get_args

import pytest

from fedloom.cli import starter
from fedloom.cli.keys import sections
from fedloom.cli.main import call
from fedloom.cli.show import out as console
from fedloom.data import packaged
from fedloom.runs import config


@pytest.mark.parametrize("width", [60, 80, 160])
def test_every_key_is_printed_with_its_default_and_meaning(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "width", width)
    assert call(["keys"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= width
    words = " ".join(text.split())
    for section in sections().values():
        assert all(f"  {key.name} " in text and key.meaning and key.meaning in words for key in section.keys)
    assert 'schedule "constant" "constant" | "linear" | "cosine" Of the learning rate.' in words
    assert "holdout 0.1 float, above 0, below 1 Share of the rows" in words
    assert "ranks unset int | list of int Cycled" in words and "data required text" in words


def test_the_keys_are_those_of_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    written = tomllib.loads(config.load(Path(config.__file__).parents[1] / "quickstart.toml").to_toml())
    for name, table in written.items():
        known = {key.name for key in sections()[name if isinstance(table, dict) else ""].keys}
        assert (set(table) if isinstance(table, dict) else {name}) <= known
    assert call(["keys", "train"]) == 0
    assert "local_steps" in (text := capsys.readouterr().out) and "[lora]" not in text
    assert call(["keys", "trian"]) == 2
    assert "did you mean 'train'" in capsys.readouterr().err


@pytest.mark.parametrize("kind", get_args(starter.Kind))
def test_a_started_run_file_is_valid_and_asks_nothing(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "my.toml"
    assert call(["init", "--kind", kind, str(file)]) == 0
    assert f"fedloom run {file}" in capsys.readouterr().out
    made = config.load(file)
    assert made.task.kind == kind and made.task.data in packaged.DATA and made.model.name in packaged.MODELS
    assert max(map(len, file.read_text().splitlines())) <= 80
    # Every key behind a # that has a default is a key, and has it: uncommented, the file says the same.
    on = [line[1:] if line[:1] == "#" and line[1:2].isalpha() and not line.endswith("=") else line
          for line in file.read_text().splitlines()]  # fmt: skip
    assert config.parse(tomllib.loads("\n".join(on)), "all").model_dump() == made.model_dump()
    assert len(on) > 100 and sum("# " not in line[:2] for line in on) > 40


def test_a_file_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("mine")
    assert call(["init", str(file)]) == 2
    assert "exists" in capsys.readouterr().err and file.read_text() == "mine"
    assert call(["init", str(tmp_path / "no" / "where.toml")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert call(["init", "--kind", "clasification", str(tmp_path / "x.toml")]) == 2
    assert "did you mean 'classification'" in capsys.readouterr().err
