"""`lora.layers` through whole runs: what is trained, sent, exported and compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fedloom
from fedloom.errors import RunError
from fedloom.runs import memory
from fedloom.runs.config import EngineSection, parse
from fedloom.runs.flower_node import agreement, differences
from fedloom.runs.inversion import tokens_found

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


def test_the_same_adapter_with_any_room_for_the_frozen_blocks(
    deep_encoder: Path, settings: Settings, tmp_path: Path
) -> None:
    """Also where a run is stopped and goes on; the manifest says what was kept."""
    told, adapters = {}, set()
    for room in ("auto", 1e-5, 0.0):
        sections = {"model": {"name": str(deep_encoder), "dtype": "bfloat16"}, "engine": {"prefix_gib": room}}
        run = fedloom.run(
            settings(lora={"layers": "upper half"}, train={"rounds": 2}, **sections), tmp_path / f"{room}"
        )
        for resumed in (False, True):
            if resumed:
                unfinished(run.path, 1)
                fedloom.resume(run.path)
            adapters.add((run.adapter_dir / "adapter_model.safetensors").read_bytes())
        told[room] = json.loads((run.path / "manifest.json").read_text())["frozen_prefix"]
    assert len(adapters) == 1
    assert all(x["blocks"] == 6 and x["why_not"] is None for x in told.values())
    assert told["auto"]["kept_rows"] > told[1e-5]["kept_rows"] > told[0.0]["kept_rows"] == 0
    assert told["auto"]["computed_anew"] == 0 < told[1e-5]["computed_anew"] < told[0.0]["computed_anew"]


def test_what_training_and_the_frozen_blocks_take(deep_encoder: Path, settings: Settings) -> None:
    sections = {"model": {"name": str(deep_encoder), "dtype": "float32"}}
    whole, upper = (made(settings(lora={"layers": x}, **sections)) for x in ("all", "upper half"))
    assert upper.memory.base == whole.memory.base
    assert 0.4 * whole.memory.client < upper.memory.client < 0.6 * whole.memory.client
    gib = EngineSection(prefix_gib=0.5)
    assert memory.prefix_bytes(gib, torch.device("cpu")) == 1 << 29
    alone, shared = (
        memory.prefix_bytes(EngineSection.model_validate(x), torch.device("cpu"))
        for x in ({}, {"name": "ray", "workers": 1000})
    )
    assert alone > 100 * shared > 0
    assert memory.states_bytes(upper.base.model, torch.bfloat16, 10) == 10 * 16 * 2


def test_tokens_are_not_sought_behind_blocks_that_mix_them(deep_encoder: Path, settings: Settings) -> None:
    config = settings(model={"name": str(deep_encoder)}, lora={"layers": [3]}, method={"name": "fedit"})
    e = made(config)
    state = e.initial_state()
    state["B"] = {site: torch.ones_like(x) for site, x in state["B"].items()}
    assert "first block has no adapter" in tokens_found(e, state)["tokens"]
