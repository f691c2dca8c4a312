from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedloom.errors import ModelError
from fedloom.models import gguf


def test_two_at_once_end_with_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Path] = []

    def convert(file: Path, dest: Path) -> None:
        (dest / "model.safetensors").write_text("weights")
        if not found:  # another process begins and ends while this one is at work
            found.append(dest)
            found.append(gguf.converted(file, "ab" * 32))
        (dest / "config.json").write_text("{}")

    monkeypatch.setenv("FEDLOOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf, "_convert", convert)
    abandoned = tmp_path / "cache" / f".m-{'ab' * 8}-killed"
    abandoned.mkdir(parents=True)
    os.utime(abandoned, (0, 0))
    target = gguf.converted(Path("m.gguf"), "ab" * 32)
    assert target == found[1] and sorted(os.listdir(target)) == ["config.json", "model.safetensors"]
    assert os.listdir(tmp_path / "cache") == [target.name]  # the loser's copy is gone
    assert gguf.converted(Path("m.gguf"), "ab" * 32) == target  # and nothing is converted again


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(file: Path, dest: Path) -> None:
        (dest / "model.safetensors").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("FEDLOOM_CACHE", str(tmp_path))
    monkeypatch.setattr(gguf, "_convert", convert)
    with pytest.raises(ModelError, match=r"No space left .* FEDLOOM_CACHE"):
        gguf.converted(Path("m.gguf"), "ab" * 32)
    assert os.listdir(tmp_path) == []


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLOOM_CACHE", "/somewhere")
    assert gguf.cache_dir() == Path("/somewhere")
    monkeypatch.delenv("FEDLOOM_CACHE")
    assert gguf.cache_dir() == Path.home() / ".cache" / "fedloom"
