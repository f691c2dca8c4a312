"""A whole run under secure sums: the same adapter whatever the keys, and no client's numbers in its records."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedloom
from fedloom.errors import ConfigError
from fedloom.runs import export
from fedloom.runs.plan import plan

Settings = Callable[..., dict[str, Any]]
SECURE = {"secure_aggregation": True}


def planned(config: dict[str, Any]) -> None:
    plan(fedloom.RunConfig.model_validate(config))


def test_a_secure_run_has_the_plain_runs_adapter(settings: Settings, tmp_path: Path) -> None:
    config = settings(method={"name": "fedit"}, train={"rounds": 2})
    plain = fedloom.run(config, tmp_path / "plain")
    secure = fedloom.run(config | {"privacy": SECURE}, tmp_path / "secure")
    again = fedloom.run(config | {"privacy": SECURE}, tmp_path / "again")
    name = "adapter_model.safetensors"
    assert (secure.adapter_dir / name).read_bytes() == (again.adapter_dir / name).read_bytes()
    a, b = export.read(plain.adapter_dir).train, export.read(secure.adapter_dir).train
    for role, group in a.items():
        for site, x in group.items():
            assert float((x - b[role][site]).abs().max()) < 2e-5, (role, site)
    for record in secure.rounds[1:]:
        assert record["train_loss"] is None and record["dropped"] == {} and record["suspicious"] == {}
        assert not {"loss_max", "grad_norm_max"} & record["report"].keys()
        assert record["bytes_up"]["masks"] == 3 * (2 * (3 * 16 + 16) + 3 * 16 + 3 * 16)
    assert json.loads((secure.path / "manifest.json").read_text())["hashes"]["config"]
    assert "[privacy]" in (secure.path / "run.toml").read_text()


@pytest.mark.parametrize(
    "change, why",
    [
        (
            {"method": {"name": "flexlora"}},
            r"flexlora needs them .the server reads every upload.*Methods that fit: fedit, ",
        ),
        (
            {"method": {"name": "fslora", "over": {"name": "fedex_lora"}}},
            r"hides single uploads, and fslora needs them",
        ),
        ({"method": {"name": "ravan", "heads": 2}}, r"ravan needs them .*holds integers"),
        ({"engine": {"name": "flower", "wire": "int8"}}, r"engine.wire is 'int8', but secure sums are of integers"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_read(
    change: dict[str, Any], why: str, settings: Settings
) -> None:
    with pytest.raises(ConfigError, match=why):
        planned(settings(**change, privacy=SECURE))


@pytest.mark.parametrize(
    "clients, why",
    [
        ({"count": 2}, "min_clients is 3, but a round asks 2 clients.*set min_clients to 2"),
        ({"count": 8, "fraction": 0.25}, "min_clients is 3, but a round asks 2 clients"),
    ],
)
def test_too_few_clients_are_refused(clients: dict[str, Any], why: str, settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=why):
        fedloom.run(settings(clients=clients, method={"name": "fedit"}, privacy=SECURE), tmp_path / "run")
    assert not (tmp_path / "run").exists()
