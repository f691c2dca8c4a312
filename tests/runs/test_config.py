"""Run files: what overrides do, and bounds that keep a run from ending in memory or in the float32 range."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from fedloom.errors import ConfigError
from fedloom.runs import config
from fedloom.runs.plan import absolute, plan

MINIMAL: dict[str, Any] = {"model": {"name": "m"}, "task": {"data": "d"}, "method": {"name": "fedit"}}


@pytest.mark.parametrize(
    "override",
    [
        "x=" + "[" * 5000 + "]" * 5000,
        "seed=" + "9" * 5000,
        f"seed={2**64}",
        ".".join(["a"] * 5000) + "=1",
        "seed.x=1",
        "train.lr.x=1",
    ],
    ids=["deep value", "5000 digits", "65 bits", "deep key", "below a number", "below a key"],
)
def test_a_wrong_override_is_one_short_error(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse(config.override({"seed": 1, "train": {"lr": 1.0}} | MINIMAL, [override]), "it")
    assert len(str(caught.value)) < 1000


def test_a_line_break_in_an_override_sets_one_key() -> None:
    assert config.override({}, ["task.template=Say\n{prompt}", "a.b=1\nc = 2"]) == {
        "task": {"template": "Say\n{prompt}"},
        "a": {"b": "1\nc = 2"},
    }


BEYOND = [
    ("engine", "threads", 10**6),
    ("train", "local_steps", 10**9),
    ("train", "local_epochs", 10**9),
    ("train", "rounds", 10**9),
    ("lora", "alpha", 1e308),
    ("train", "lr", 1e300),
    ("train", "clip", 1e300),
    ("train", "weight_decay", 1e300),
    ("clients", "max_norm", 1e300),
    ("clients", "alpha", 1e-300),
    ("engine", "deadline_s", 1e300),
]


@pytest.mark.parametrize(("section", "key", "value"), BEYOND, ids=[f"{s}.{k}" for s, k, _ in BEYOND])
def test_a_number_beyond_reason_is_refused(section: str, key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"it: {section}\.{key}: got .*, expected (less|greater) than or equal to"):
        config.parse(MINIMAL | {section: {key: value}}, "it")


def test_an_own_method_is_found_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_one.py").write_text("from fedloom.methods.fedit import FedIT\n\n\nclass Mine(FedIT):\n    pass\n")
    (tmp_path / "json.py").write_text("raise AssertionError('a file of the folder hides no library')\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    for method in ({"name": "own_one:Mine"}, {"name": "fslora", "over": {"name": "own_one:Mine"}}):
        assert "Mine" in repr(plan(config.parse(MINIMAL | {"method": method}, "it")).method)
    assert sys.path == before
    with pytest.raises(ConfigError, match="cannot be imported"):
        plan(config.parse(MINIMAL | {"method": {"name": "own_none:Mine"}}, "it"))


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "x/" * 3000])
def test_a_path_that_is_none_is_one_error(name: str) -> None:
    for section, key in (("model", "name"), ("task", "data")):
        with pytest.raises(ConfigError, match=r"is no path that can be read: "):
            absolute(config.parse(MINIMAL | {section: {key: name}}, "it"))
