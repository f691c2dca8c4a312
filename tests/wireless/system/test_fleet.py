"""A fleet file: what is wrong is said once, with what was got, what was expected and what to do."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedloom.errors import ConfigError, RunError
from fedloom.wireless import from_run, read_fleet
from fedloom.wireless.system.fleet import parse_fleet
from fedloom.wireless.system.radio import Band, Subcarriers, path_gain, shannon

DEVICE: dict[str, Any] = {"id": "a", "samples": 100, "distance_m": 200.0}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"device": [DEVICE | {"power_w": -0.2}]}, r"power_w of device 'a': got -0.2, expected greater than 0"),
        (
            {"device": [DEVICE], "band": {"mode": "bandwidth", "bandwidth_hz": 0}},
            r"band.bandwidth_hz: got 0, expected greater than 0",
        ),
        ({"device": [{"id": "a", "distance_m": 10.0}]}, r"samples of device 'a' is missing"),
        ({"device": [{"samples": 10, "distance_m": 10.0}]}, r"id of device number 1 is missing"),
        ({"device": [{"id": "a", "samples": 5}]}, r"device 'a' has neither of distance_m and gain_db"),
        ({"device": [DEVICE | {"gain_db": -100.0}]}, r"device 'a' has both of distance_m and gain_db"),
        (
            {"device": [{"id": "a", "samples": 5, "distance_km": 1.0}]},
            r"unknown key 'distance_km' of device 'a'; did you mean 'distance_m'\?; known here: id, ",
        ),
        ({"device": [DEVICE | {"power_mw": 200}]}, r"unknown key 'power_mw' of device 'a'; did you mean 'power_w'\?"),
        (
            {"device": [{"id": "a", "samples": 5, "gain_db": float("nan")}]},
            r"gain_db of device 'a': got nan, expected a finite number",
        ),
        ({"device": [{"id": "a", "samples": 5, "gain_db": [-100.0]}]}, r"has 1 gains, expected 8"),
        ({"device": [DEVICE, DEVICE]}, r"two devices have the id 'a'"),
        ({"device": []}, r"no device"),
        ({"device": [DEVICE], "limit": {}}, r"unknown key 'limit'; did you mean 'limits'\?; known here: seed, band, "),
        (
            {"device": [DEVICE], "limits": {"latency_ms": 5}},
            r"unknown key 'limits.latency_ms'; did you mean 'latency_s'\?",
        ),
        (
            {"device": [DEVICE], "bound": {"empirical": "lineer"}},
            r"bound.empirical: got 'lineer', expected 'sparsity', 'linear' or 'rescaled'",
        ),
        ({"device": [DEVICE], "bound": {"failure": 1.0}}, r"bound.failure is 1.0, expected a probability"),
        ({"device": [DEVICE], "bound": {"lipshitz": 1.0}}, r"unknown key 'bound.lipshitz'; did you mean 'lipschitz'\?"),
        ({"device": [DEVICE | {"compute_j_per_flop": 1e-12, "kappa_j_s2_per_flop3": 1e-36}]}, r"expected one"),
        ({"device": [DEVICE], "limits": {"latency_s": "5 s"}}, r"limits.latency_s: got '5 s', expected a valid number"),
    ],
)
def test_bad_fleets_get_one_clear_message(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_fleet(raw).problem()
    assert "\n" not in str(caught.value) and "pydantic" not in str(caught.value)


def test_files_that_are_no_fleet(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read_fleet(tmp_path / "none.toml")
    path = tmp_path / "fleet.toml"
    path.write_text("seed = ")
    with pytest.raises(ConfigError, match=r"fleet.toml is not valid TOML"):
        read_fleet(path)
    path.write_text("[[device]]\nid = 'a'\nsamples = 3\n[device.x]\n")
    with pytest.raises(ConfigError, match=r"fleet.toml: .*unknown key 'x' of device 'a'"):
        read_fleet(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_fleet(tmp_path)


def test_arrays_by_hand() -> None:
    raw = {
        "band": {"subcarriers": 4, "fading": False},
        "model": {"lora_parameters": 1000, "head_parameters": 10, "bits_per_parameter": 16, "local_epochs": 2},
        "defaults": {"compute_flop_per_s": 1e12, "compute_j_per_flop": 2e-12},
        "device": [DEVICE, {"id": "b", "samples": 50, "gain_db": [-100.0, -110.0, -120.0, -130.0], "power_w": 0.4}],
    }
    problem = parse_fleet(raw).problem()
    assert problem.ids == ("a", "b") and problem.fixed_bits == 160.0 and problem.lora_bits == 16000.0
    noise = 10 ** (-17.4) * 1e-3 * 10**0.9
    link = problem.link
    assert isinstance(link, Subcarriers)
    np.testing.assert_allclose(link.up[0], shannon(1e6, 0.05 * path_gain(200.0) / noise))
    np.testing.assert_allclose(link.up[1, 1], shannon(1e6, 0.1 * 1e-11 / noise))
    np.testing.assert_allclose(link.power_per_subcarrier_w, [0.05, 0.1])
    np.testing.assert_allclose(problem.compute.base_s, [2 * 100 * 5e9 / 1e12, 2 * 50 * 5e9 / 1e12])
    np.testing.assert_allclose(problem.compute.base_j, problem.compute.base_s * 2.0)
    band = parse_fleet({**raw, "band": {"mode": "bandwidth", "fading": False}, "device": [DEVICE]}).problem().link
    assert isinstance(band, Band) and band.total_hz == 8e6


def test_switched_capacitance_is_energy_per_operation_over_speed_squared() -> None:
    raw = {"device": [DEVICE | {"kappa_j_s2_per_flop3": 2e-36, "compute_flop_per_s": 1e12}]}
    problem = parse_fleet(raw).problem()
    np.testing.assert_allclose(problem.compute.base_j, 100 * 5e9 * 2e-12)


def test_sizes_from_a_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    path = tmp_path / "fleet.toml"
    path.write_text("model.run = 'run'\n[[device]]\nid = 'a'\nsamples = 5\ndistance_m = 90\n")
    with pytest.raises(ConfigError, match=r"manifest\.json does not exist"):
        read_fleet(path).problem()
    (run / "manifest.json").write_text(json.dumps({"lora_parameters": 123}))
    with pytest.raises(ConfigError, match="head_parameters"):
        read_fleet(path).problem()
    (run / "manifest.json").write_text(json.dumps({"lora_parameters": 123, "head_parameters": 7}))
    problem = read_fleet(path).problem()
    assert (problem.lora_bits, problem.fixed_bits) == (123 * 32.0, 7 * 32.0)


def report(loss: float, grad: float, norm: float) -> dict[str, float]:
    return {"loss_max": loss, "grad_norm_max": grad, "adapter_norm": norm}


def test_constants_from_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be read"):
        from_run(tmp_path)
    lines = [
        {"round": 0},
        {"round": 1, "report": {"0": report(2.0, 1.0, 0.5), "1": report(3.0, 0.8, 0.4)}},
        {"round": 2, "report": {"0": report(1.0, 1.5, 0.9), "1": report(1.5, 0.7, 2.0)}},
    ]
    path = tmp_path / "rounds.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    (tmp_path / "run.toml").write_text("[train]\nlr = 0.01\n")
    found = from_run(tmp_path)
    assert (found.loss_max, found.grad_norm_max, found.adapter_norm, found.rounds) == (3.0, 1.5, 2.0, 2)
    # L = G / D unless given, so A1 = lr (L^2 D^2 + G^2) = 2 lr G^2.
    assert found.dropout_penalty == pytest.approx(0.01 * 2.0 * 1.5**2)
    bound = found.bound("sparsity")
    assert (bound.loss_range, bound.lipschitz, bound.empirical) == (3.0, 1.5, "sparsity")
    assert bound.curvature_min >= 1e-3

    path.write_text(json.dumps({"round": 1, "report": {"loss_max": 1.0, "adapter_norm": 1.0}}))
    with pytest.raises(ConfigError, match=r"line 1 .*nothing for report.grad_norm_max"):
        from_run(tmp_path)
    path.write_text(json.dumps({"round": 1}))
    with pytest.raises(ConfigError, match="has no report"):
        from_run(tmp_path)
    path.write_text(json.dumps({"round": 0}))
    with pytest.raises(ConfigError, match="no round of training"):
        from_run(tmp_path)
