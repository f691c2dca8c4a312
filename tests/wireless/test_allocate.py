"""What a user gets: an allocation, its JSON, its table, its errors; monotonicity and baselines, (13.19), (13.22)."""

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from fedloom.errors import ConfigError
from fedloom.wireless import Allocation, Status, allocate, diagnosis
from fedloom.wireless.allocate import solve
from fedloom.wireless.show.command import allocate_command
from fedloom.wireless.show.tables import print_allocation
from fedloom.wireless.solvers.baselines import BASELINES, baseline
from fedloom.wireless.system.problem import Problem
from fedloom.wireless.system.radio import Subcarriers

from .problems import FORMS, small

FLEET = """
seed = 3
[band]
subcarriers = 8
[limits]
latency_s = 5.0
energy_j = 4.0
[[device]]
id = "0"
distance_m = 120
samples = 300
[[device]]
id = "north"
gain_db = -112.5
samples = 500
energy_j = 3.0
"""


@pytest.fixture
def fleet_file(tmp_path: Path) -> Path:
    path = tmp_path / "fleet.toml"
    path.write_text(FLEET)
    return path


def test_torch_is_never_imported() -> None:
    code = (
        "import sys, fedloom.wireless as w, fedloom.wireless.show.command\n"
        "assert 'torch' not in sys.modules and callable(w.allocate)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("mode", ["subcarrier", "bandwidth"])
@pytest.mark.parametrize("solver", ["bnb", "psca"])
def test_allocation_adds_up(mode: str, solver: str) -> None:
    problem = small(1, mode=mode)  # type: ignore[arg-type]
    plan = allocate(problem, solver)  # type: ignore[arg-type]
    assert plan.objective == pytest.approx(plan.empirical + plan.gap, rel=1e-12)
    assert plan.lower <= plan.objective == plan.upper
    for device in plan.devices:
        assert device.latency_s == pytest.approx(device.down_s + device.compute_s + device.up_s)
        assert device.energy_j == pytest.approx(device.transmit_j + device.compute_j + device.overhead_j)
        assert device.up_s == pytest.approx(device.payload_bits / device.rate_up_bit_s)
        assert device.latency_s <= plan.latency_limit_s * (1.0 + 1e-6)
        assert device.energy_j <= device.energy_limit_j * (1.0 + 1e-6)
        # A device below the common best rate is there because something holds it.
        if device.keep < max(d.keep for d in plan.devices) - 1e-9:
            assert device.binds
    if mode == "subcarrier":
        held = [m for device in plan.devices for m in device.subcarriers or ()]
        assert len(held) == len(set(held)) and set(held) <= set(range(5))


def test_json_round_trip(tmp_path: Path) -> None:
    plan = allocate(small(2))
    path = tmp_path / "allocation.json"
    plan.to_json(path)
    raw = json.loads(path.read_text())
    assert list(raw["keep"]) == ["d0", "d1", "d2"] and raw["version"] == 1
    assert Allocation.from_json(path) == plan
    for damage in ("{", '{"version": 99}', "[]", '{"version": 1}'):
        path.write_text(damage)
        with pytest.raises(ConfigError, match="fedloom allocate"):
            Allocation.from_json(path)
    with pytest.raises(ConfigError, match="does not exist"):
        Allocation.from_json(tmp_path / "none.json")


def test_table_fits_eighty_columns(fleet_file: Path) -> None:
    out = io.StringIO()
    print_allocation(allocate(small(1)), Console(file=out, width=80))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines[:-5])) <= 80 and "…" not in out.getvalue()
    assert (
        "d0" in out.getvalue()
        and "proven optimal" in out.getvalue()
        and "binding constraint" in out.getvalue()
        and "Mbit/s" in out.getvalue()
    )


def test_command_writes_and_prints(fleet_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "allocation.json"
    allocate_command(fleet_file, out=out)
    assert "north" in capsys.readouterr().out
    assert list(Allocation.from_json(out).keep) == ["0", "north"]
    allocate_command(fleet_file, solver="psca", as_json=True)
    assert json.loads(capsys.readouterr().out)["solver"] == "psca"
    with pytest.raises(ConfigError, match="does not exist"):
        allocate_command(fleet_file, out=tmp_path / "no" / "where.json")
    with pytest.raises(ConfigError, match="did you mean 'bnb'"):
        allocate_command(fleet_file, solver="bnbb")


def test_a_device_that_cannot_be_served_is_named_with_what_it_takes() -> None:
    problem = small(1)
    slow = replace(
        problem, compute=replace(problem.compute, base_s=problem.compute.base_s + np.array([0.0, 50.0, 0.0]))
    )
    with pytest.raises(
        ConfigError, match=r"device 'd1' needs at least .* s a round.*raise limits.latency_s by"
    ) as caught:
        allocate(slow)
    more = float(str(caught.value).split("raise limits.latency_s by ")[1].split(" s")[0])
    enough = slow.with_limits(latency_factor=1.0 + 1.002 * more / slow.latency_limit_s)
    assert not diagnosis.infeasible_alone(enough), (
        "moving the limit by what the message says is enough for that device alone"
    )
    almost = slow.with_limits(latency_factor=1.0 + 0.99 * more / slow.latency_limit_s)
    assert diagnosis.infeasible_alone(almost)
    hungry = replace(problem, energy_limit_j=problem.energy_limit_j * np.array([1.0, 1.0, 0.01]))
    with pytest.raises(ConfigError, match=r"device 'd2' needs at least .* J a round.*raise its energy_j by"):
        allocate(hungry)


def test_devices_that_cannot_be_served_together_are_told_a_limit_that_is_enough() -> None:
    problem = next(
        crowded
        for seed in range(12)
        for keep_min in (0.3, 0.4, 0.5, 0.6)
        if not diagnosis.infeasible_alone(crowded := replace(small(seed), keep_min=keep_min))
        and solve(crowded).status is Status.INFEASIBLE
    )
    with pytest.raises(ConfigError, match=r"no share of the band serves all devices.*device 'd\d'") as caught:
        allocate(problem)
    message = str(caught.value)
    assert "limits.latency_s = " in message
    told = float(message.split("limits.latency_s = ")[1].split(" ")[0])
    assert told > problem.latency_limit_s
    assert solve(replace(problem, latency_limit_s=1.001 * told)).point is not None


def optimum(problem: Problem) -> float:
    return solve(problem).value


def test_optimum_is_monotone_in_limits_gain_and_costs() -> None:
    for seed, empirical in ((1, "linear"), (2, "sparsity"), (3, "rescaled")):
        base = small(seed, empirical)  # type: ignore[arg-type]
        assert isinstance(base.link, Subcarriers)
        link, compute = base.link, base.compute
        by_latency = [optimum(base.with_limits(latency_factor=f)) for f in (1.0, 1.2, 1.5, 3.0)]
        by_energy = [optimum(base.with_limits(energy_factor=f)) for f in (1.0, 1.05, 1.3, 3.0)]
        by_gain = [
            optimum(replace(base, link=replace(link, up=g * link.up, down=g * link.down))) for g in (1.0, 1.3, 2.0)
        ]
        by_overhead = [
            optimum(replace(base, compute=replace(compute, overhead_j=compute.overhead_j + j))) for j in (0.0, 0.005)
        ]
        by_payload = [optimum(replace(base, fixed_bits=base.fixed_bits + b)) for b in (0.0, 1e5, 3e5)]
        for better in (by_latency, by_energy, by_gain):
            assert (np.diff(better) <= 1e-9).all(), better
        for worse in (by_overhead, by_payload):
            assert worse == sorted(worse), worse
        assert by_latency[-1] < by_latency[0]


def test_without_limits_everybody_keeps_the_common_best_rate() -> None:
    for empirical in FORMS:
        problem = small(1, empirical).with_limits(latency_factor=100.0, energy_factor=100.0)
        plan = allocate(problem)
        assert plan.status is Status.OPTIMAL
        np.testing.assert_allclose(
            list(plan.keep.values()), problem.bound.free_rates(problem.samples, 0.05), rtol=1e-12
        )


def test_no_baseline_beats_the_optimum_and_uniform_is_its_own_best() -> None:
    seen = 0
    for seed in range(6):
        problem = small(seed)
        best = solve(problem)
        for name in BASELINES:
            found, keep = baseline(problem, name, seed)
            if keep is None:
                continue
            seen += 1
            assert found.point is not None and found.value >= best.value - 1e-9
            late, over = problem.excess(found.point, keep)
            assert max(late.max(), over.max()) <= 1e-6, name
    assert seen > 12
    found, keep = baseline(small(5), "uniform")
    assert keep is not None and np.ptp(keep) == 0.0
