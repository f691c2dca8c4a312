"""Sweeps: the expected shapes, and that pictures and tables come out."""

import csv
from pathlib import Path

import numpy as np

from fedloom.wireless.show import sweep
from fedloom.wireless.system.fleet import random_fleet
from fedloom.wireless.system.problem import Problem


def values(drawn: sweep.Sweep, curve: str) -> np.ndarray:
    return np.array([row.value for row in drawn.rows if row.curve == curve])


def base(seed: int) -> Problem:
    return random_fleet(3, 6, seed, latency_load=0.3, energy_load=0.6).problem()


def test_tighter_latency_costs_and_the_optimum_is_lowest(tmp_path: Path) -> None:
    drawn = sweep.latency_sweep(base, 1, (0.95, 1.1, 2.0))
    best = values(drawn, sweep.LABELS["bnb"])
    assert len(best) == 3 and (np.diff(best) <= 1e-9).all() and best[0] > best[-1]
    for row in drawn.rows:
        at = next(r.value for r in drawn.rows if r.curve == sweep.LABELS["bnb"] and r.x == row.x)
        assert row.value >= at - 1e-9
    picture = sweep.write(drawn, tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "E4_latency.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(drawn.rows) and set(rows[0]) == {"x", "curve", "value", "low", "high"}


def test_minimum_of_the_bound_moves_right_with_less_data(tmp_path: Path) -> None:
    drawn = sweep.bound_shape(samples=(500, 2000))
    less, more = (row.x for row in drawn.rows if row.curve == "minimum")
    assert less > more
    assert sweep.write(drawn, tmp_path).exists()


def test_convergence_falls_in_every_phase(tmp_path: Path) -> None:
    drawn = sweep.convergence(base(0), zetas=(0.0, 0.5), iterations=5)
    phases = {row.curve for row in drawn.rows if row.curve.startswith("objective")}
    assert len(phases) == 2
    for phase in phases:
        assert (np.diff(values(drawn, phase)) <= 1e-4).all()
    assert sweep.write(drawn, tmp_path).exists()


def test_a_tighter_energy_limit_and_a_narrower_band_cost() -> None:
    energy = values(sweep.energy_sweep(base, 1, (0.7, 1.0, 2.0)), sweep.LABELS["bnb"])
    assert len(energy) == 3 and (np.diff(energy) <= 1e-9).all()
    times, gaps = sweep.run_time(lambda m, s: random_fleet(3, m, s, latency_load=0.3).problem(), 2, (4, 5))
    assert {row.curve for row in times.rows} == {sweep.LABELS["bnb"], sweep.LABELS["psca"]}
    assert all(row.value >= -1e-6 for row in gaps.rows)
