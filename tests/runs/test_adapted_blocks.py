"""`lora.layers` through whole runs: what is trained, sent, exported and compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedloom
from fedloom.errors import RunError
from fedloom.runs.config import parse
from fedloom.runs.flower_node import agreement, differences

from .test_resume import unfinished
from .test_run import assert_peft_agrees, made

Settings = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("name", ["fedit", "lora_a2", "fedsa_lora"])
def test_a_run_in_two_of_twelve_blocks(name: str, deep_encoder: Path, settings: Settings, tmp_path: Path) -> None:
    sections = {"model": {"name": str(deep_encoder), "dtype": "float32"}, "method": {"name": name}}
    config = settings(lora={"layers": [1, 11], "targets": ["query"]}, train={"rounds": 1}, **sections)
    result = fedloom.run(config, tmp_path / "run")
    e = made(config)
    assert [s.split(".")[3] for s in e.sites] == ["1", "11"]
    whole = made(config | {"lora": config["lora"] | {"layers": "all"}})
    assert whole.parameters[0] == 6 * e.parameters[0] > 0
    assert_peft_agrees(e, result.adapter_dir)


def test_a_resumed_run_and_other_sites_must_have_the_same(settings: Settings, tmp_path: Path) -> None:
    config = settings(lora={"layers": "upper half"}, train={"rounds": 2})
    run = fedloom.run(config, tmp_path / "run").path
    unfinished(run, 1)
    file = run / "run.toml"
    file.write_text(file.read_text().replace('layers = "upper half"', "layers = [0]"))
    for consent in (False, True):
        with pytest.raises(RunError, match=r"in other layers than lora.targets and lora.layers"):
            fedloom.resume(run, accept_changes=consent)
    one, two = (agreement(parse(config | {"lora": {"layers": x}}, "it")) for x in ("upper half", [1]))
    assert differences(one, two) == ["lora.layers"]
