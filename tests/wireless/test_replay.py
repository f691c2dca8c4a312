"""A planned network replayed with what a run really sent and trained."""

import json

import pytest

from fedloom.errors import ConfigError
from fedloom.wireless import Network, allocate, random_fleet

from .problems import small


@pytest.mark.parametrize("mode", ["subcarrier", "bandwidth"])
def test_network_repeats_the_plan_for_the_planned_round(mode: str) -> None:
    problem = small(1, mode=mode)  # type: ignore[arg-type]
    plan = allocate(problem)
    network = Network.of(problem, plan)
    sent = {device.id: round(device.payload_bits / 8) for device in plan.devices}
    worked = {name: round(n) for name, n in zip(problem.ids, problem.samples, strict=True)}
    got = network.round(sent, sent, worked)
    for device in plan.devices:
        assert got["devices"][device.id]["seconds"] == pytest.approx(device.latency_s, rel=1e-5)
        assert got["devices"][device.id]["joules"] == pytest.approx(device.energy_j, rel=1e-5)
    assert got["seconds"] == max(device["seconds"] for device in got["devices"].values())
    assert got["predicted_seconds"] == pytest.approx(got["seconds"], rel=1e-5)
    json.dumps(got)


def test_network_charges_what_really_crossed() -> None:
    problem = small(1)
    plan = allocate(problem)
    network = Network.of(problem, plan)
    one = network.round({"d1": 1000}, {"d1": 4000}, {"d1": 7})
    assert list(one["devices"]) == ["d1"]
    device, planned = one["devices"]["d1"], plan.devices[1]
    assert device["up_s"] == pytest.approx(8000.0 / planned.rate_up_bit_s)
    assert device["down_s"] == pytest.approx(32000.0 / planned.rate_down_bit_s)
    assert device["compute_s"] == pytest.approx(planned.compute_s * 7 / problem.samples[1])
    assert device["transmit_j"] == pytest.approx(planned.power_w * device["up_s"])
    assert not device["late"] and not device["over"]
    assert network.round({"d1": 10**9}, {}, {"d1": 7})["devices"]["d1"]["late"]
    with pytest.raises(ConfigError, match="no device 'd9'"):
        network.round({"d9": 1}, {}, {"d9": 1})
    with pytest.raises(ConfigError, match="allocate again"):
        Network.of(random_fleet(4, 5, 0), plan)


def test_rounds_are_told_by_the_ids_of_the_clients() -> None:
    problem = small(1)
    plan = allocate(problem)
    mine, theirs = Network.of(problem, plan), Network.of(problem, plan, ids=["x", "y", "z"])
    assert (
        theirs.round({"y": 9}, {"y": 8}, {"y": 7})["devices"]["y"]
        == mine.round({"d1": 9}, {"d1": 8}, {"d1": 7})["devices"]["d1"]
    )
    with pytest.raises(ConfigError, match="no device 'd1'"):
        theirs.round({"d1": 1}, {}, {})
    with pytest.raises(ConfigError, match="3 devices, expected one for each of the 2 clients"):
        Network.of(problem, plan, ids=["x", "y"])


def test_a_refused_or_failed_client_costs_what_crossed() -> None:
    problem = small(1)
    plan = allocate(problem)
    got = Network.of(problem, plan).round(
        {"d0": 500, "d1": 10**9, "d2": 0}, {"d0": 100, "d1": 100, "d2": 4000}, {"d0": 7}
    )
    refused, silent = got["devices"]["d1"], got["devices"]["d2"]
    assert refused["up_s"] == pytest.approx(8e9 / plan.devices[1].rate_up_bit_s) and refused["transmit_j"] > 0.0
    assert silent["seconds"] == silent["down_s"] == pytest.approx(32000.0 / plan.devices[2].rate_down_bit_s)
    assert silent["joules"] == silent["overhead_j"] > 0.0 and silent["compute_j"] == 0.0
    assert got["seconds"] == refused["seconds"] and list(got["predicted"]) == ["d0", "d1", "d2"]
    assert got["joules"] == pytest.approx(sum(device["joules"] for device in got["devices"].values()))
