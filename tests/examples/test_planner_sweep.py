"""The planner's studies: the expected shapes."""

import importlib.util
from pathlib import Path

import numpy as np

from fedloom.wireless import random_fleet
from fedloom.wireless.show.curves import LABELS, Sweep
from fedloom.wireless.show.figures import write

SPEC = importlib.util.spec_from_file_location(
    "planner_sweep", Path(__file__).parents[2] / "examples" / "planner_sweep.py"
)
assert SPEC is not None and SPEC.loader is not None
planner_sweep = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(planner_sweep)


def values(drawn: Sweep, curve: str) -> np.ndarray:
    return np.array([row.value for row in drawn.rows if row.curve == curve])


def test_convergence_falls_in_every_phase(tmp_path: Path) -> None:
    problem = random_fleet(3, 6, 0, latency_load=0.3, energy_load=0.6).problem()
    drawn = planner_sweep.convergence(problem, zetas=(0.0, 0.5), iterations=5)
    phases = {row.curve for row in drawn.rows if row.curve.startswith("objective")}
    assert len(phases) == 2
    for phase in phases:
        assert (np.diff(values(drawn, phase)) <= 1e-4).all()
    assert write(drawn, tmp_path).exists()


def test_more_band_helps_and_more_devices_cost() -> None:
    band = planner_sweep.band_sweep(lambda m, seed: planner_sweep.same_limits(3, m, seed), 2, (6, 8))
    assert (np.diff(values(band, LABELS["bnb"])) < 0.0).all() and band.x_ticks == (6.0, 8.0)
    devices = planner_sweep.devices_sweep(lambda k, seed: planner_sweep.same_limits(k, 8, seed), 2, (2, 4))
    assert (np.diff(values(devices, LABELS["bnb"])) > 0.0).all()


def test_psca_is_never_below_the_optimum() -> None:
    make = lambda m, seed: random_fleet(3, m, seed, latency_load=0.3).problem()  # noqa: E731
    times, gaps = planner_sweep.run_time(make, 2, (4, 5))
    assert {row.curve for row in times.rows} == {LABELS["bnb"], LABELS["psca"]}
    assert gaps.rows and all(row.value >= -1e-6 for row in gaps.rows)
