"""Exports are whole or not there, and a client's name leads nowhere else."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

import fedloom
from fedloom.errors import RunError
from fedloom.runs import finished

Settings = Callable[..., dict[str, Any]]


@pytest.fixture
def run(settings: Settings, tmp_path: Path) -> Path:
    config = settings(method={"name": "fedsa_lora"}, train={"rounds": 1, "local_steps": 1}, task={"limit": 12})
    return fedloom.run(config, tmp_path / "run").path


def test_a_client_is_a_name_and_no_path(run: Path, tmp_path: Path) -> None:
    finished.export_saved(run, tmp_path / "one", "client-0")
    assert (tmp_path / "one" / "adapter_config.json").is_file()
    outside = tmp_path / "outside"
    outside.joinpath("adapter").mkdir(parents=True)
    (outside / "adapter" / "adapter_config.json").write_text("{}")
    for name in ("../../outside", str(outside), "../..", ".", "", "\x1b[31m"):
        with pytest.raises(RunError, match=r"holds no model of client .*: it has client-0, client-1, client-2"):
            finished.adapter_of(finished.RunDirectory.open(run), name)


@pytest.mark.parametrize("merge", [False, True])
def test_a_full_disk_leaves_no_half_export(
    merge: bool, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    dest = tmp_path / "to" / "dest"
    with monkeypatch.context() as patch:
        if merge:
            patch.setattr("transformers.modeling_utils.safe_save_file", full)
        else:
            patch.setattr("pathlib.Path.write_bytes", full)
        with pytest.raises(RunError, match=r"cannot write .*No space left .*export again"):
            finished.export_saved(run, dest, "client-0", merge)
    assert list(dest.parent.iterdir()) == []
    finished.export_saved(run, dest, "client-0", merge)
    assert safetensors.torch.load_file(next(dest.glob("*.safetensors")))


def test_an_empty_directory_may_be_where_the_command_is_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    finished.export_saved(run, Path("."), "client-0")
    assert "adapter_config.json" in os.listdir(here)
    with pytest.raises(RunError, match="not empty"):
        finished.export_saved(run, Path("."), "client-0")


def test_a_file_in_the_way_is_an_error(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        finished.export_saved(run, tmp_path / "file" / "dest", "client-0")
