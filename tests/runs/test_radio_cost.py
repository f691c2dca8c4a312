"""Plan, train with the plan, and read what its rounds would have cost on that network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedloom
from fedloom.cli.main import call
from fedloom.errors import ConfigError
from fedloom.loop import Record
from fedloom.runs.radio_cost import cost
from fedloom.wireless import Network, allocate, random_fleet

Settings = Callable[..., dict[str, Any]]

FLEET = """
[band]
subcarriers = 6
[model]
run = "{run}"
base_flop_per_sample = 1e8
[limits]
latency_s = 0.05
energy_j = 1.0
[[device]]
id = "near"
distance_m = 60
samples = 16
[[device]]
id = "middle"
distance_m = 200
samples = 16
[[device]]
id = "far"
distance_m = 420
samples = 16
"""


@pytest.fixture
def fleet(settings: Settings, tmp_path: Path) -> Path:
    """Three devices, for the adapter of a finished run."""
    run = fedloom.run(settings(train={"rounds": 1}), tmp_path / "sizes").path
    manifest = json.loads((run / "manifest.json").read_text())
    # Two layers, query and value, 16 in and out, rank 4; a head of three classes.
    assert manifest["lora_parameters"] == 4 * 4 * 32 and manifest["head_parameters"] == 3 * 16 + 3
    path = tmp_path / "fleet.toml"
    path.write_text(FLEET.format(run=run))
    return path


def test_a_run_trains_with_exactly_the_planned_rates(fleet: Path, settings: Settings, tmp_path: Path) -> None:
    plan = tmp_path / "allocation.json"
    assert call(["allocate", str(fleet), "--out", str(plan)]) == 0
    keep = list(json.loads(plan.read_text())["keep"].values())
    assert all(0 < rate < 1 for rate in keep)
    config = settings(
        method={"name": "fedlodrop", "law": "exact"}, clients={"keep": str(plan)}, network={"fleet": str(fleet)}
    )
    result = fedloom.run(config, tmp_path / "run")
    clients = json.loads((result.path / "manifest.json").read_text())["clients"]
    assert [client["keep"] for client in clients.values()] == keep

    devices = json.loads(plan.read_text())["devices"]
    for record in result.rounds[1:]:
        network = record["network"]
        assert list(network["devices"]) == record["clients"] == list(network["predicted"])
        assert network["seconds"] == max(cost["seconds"] for cost in network["devices"].values())
        up = sum(cost["up_s"] * device["rate_up_bit_s"] for cost, device in
                 zip(network["devices"].values(), devices, strict=True))  # fmt: skip
        assert up == pytest.approx(8 * sum(record["bytes_up"].values()), rel=1e-9)
        for client, device in zip(record["clients"], devices, strict=True):
            # What came up: whole rows and columns of 16 at rank 4 in four sites, and the head.
            kept = 16 - int((1 - device["keep"]) * 16)
            sent = 4 * (4 * 4 * 2 * kept + 3 * 16 + 3)
            assert network["devices"][client]["up_s"] == pytest.approx(8 * sent / device["rate_up_bit_s"])
            assert network["predicted"][client]["seconds"] == pytest.approx(device["latency_s"])


@pytest.mark.parametrize("method", ["fedit", "fslora"])
def test_any_method_can_be_costed(method: str, fleet: Path, settings: Settings, tmp_path: Path) -> None:
    result = fedloom.run(settings(method={"name": method}, network={"fleet": str(fleet)}), tmp_path / "run")
    assert all(record["network"]["joules"] > 0 for record in result.rounds[1:])
    assert "network" not in result.rounds[0]


def test_constants_come_from_a_run(fleet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["allocate", str(fleet)]) == 0
    default = capsys.readouterr().out
    assert call(["allocate", str(fleet), "--constants-from", str(tmp_path / "sizes")]) == 0
    assert capsys.readouterr().out != default


def test_wrong_plans_are_one_error(fleet: Path, settings: Settings, tmp_path: Path) -> None:
    drop = {"name": "fedlodrop"}
    with pytest.raises(ConfigError, match=r"nowhere\.json.*does not exist.*fedloom allocate"):
        fedloom.run(settings(method=drop, clients={"keep": "nowhere.json"}), tmp_path / "a")
    plan = tmp_path / "allocation.json"
    assert call(["allocate", str(fleet), "--out", str(plan)]) == 0
    with pytest.raises(ConfigError, match="plans 3 devices, expected 5"):
        fedloom.run(settings(method=drop, clients={"keep": str(plan), "count": 5}), tmp_path / "b")
    with pytest.raises(ConfigError, match="3 devices, expected one for each of the 4"):
        fedloom.run(settings(clients={"count": 4}, network={"fleet": str(fleet)}), tmp_path / "c")
    plan.write_text("[1, 2]")
    with pytest.raises(ConfigError, match="no allocation"):
        fedloom.run(settings(method=drop, clients={"keep": str(plan)}), tmp_path / "d")


def test_a_client_whose_update_was_not_used_costs_what_crossed() -> None:
    problem = random_fleet(3, 6, 1).problem()
    network = Network.of(problem, allocate(problem, "psca"), ids=["a", "b", "c"])
    crossed = {"a": [4000, 3000], "b": [4000, 3000], "c": [4000, 0]}
    metrics = {client: {"loss": 1.0, "samples": 16.0} for client in crossed}
    every = cost(network, Record(1, clients=list(crossed), metrics=metrics, per_client=crossed))
    used = {"a": metrics["a"]}
    dropped = {"b": "its norm is 9, allowed is 1", "c": "no answer"}
    got = cost(network, Record(1, clients=list(crossed), dropped=dropped, metrics=used, per_client=crossed))
    assert list(got["devices"]) == ["a", "b", "c"] and got["devices"]["a"] == every["devices"]["a"]
    for client in dropped:
        before, after = every["devices"][client], got["devices"][client]
        assert after["compute_s"] == 0.0 < before["compute_s"]
        assert after["down_s"] == before["down_s"] > 0.0 and after["up_s"] == before["up_s"]
        assert after["joules"] == after["transmit_j"] + after["overhead_j"] > 0.0
    assert got["devices"]["b"]["transmit_j"] > 0.0 == got["devices"]["c"]["transmit_j"]


def test_what_the_wire_rounds_is_not_paid_for() -> None:
    """In bfloat16 half of the bytes of the tensors cross: half of the seconds and joules of sending."""
    problem = random_fleet(2, 6, 1).problem()
    network = Network.of(problem, allocate(problem, "psca"), ids=["a", "b"])
    record = Record(1, clients=["a", "b"], per_client={"a": [4000, 3000], "b": [4000, 3000]})
    record.up.add({"A": 6000})
    record.down.add({"A": 8000})
    whole, half = cost(network, record), cost(network, record, {"up": 3000, "down": 8000})
    for client in ("a", "b"):
        before, after = whole["devices"][client], half["devices"][client]
        assert after["up_s"] == pytest.approx(before["up_s"] / 2) and after["down_s"] == before["down_s"]
