"""Run files: what overrides do, and bounds that keep a run from ending in memory or in the float32 range."""

from __future__ import annotations

from typing import Any

import pytest

from fedloom.errors import ConfigError
from fedloom.runs import config

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
