"""Plan and audit on a tiny model: canaries that were learnt by heart are told apart, and those under noise are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fedloom
from fedloom.cli.main import call
from fedloom.errors import ConfigError, RunError
from fedloom.privacy.client_level import ClientLevel
from fedloom.privacy.noise import noised
from fedloom.runs import audit, canaries, forecast
from fedloom.runs.experiment import Experiment, experiment
from fedloom.runs.run_directory import RunDirectory

Settings = Callable[..., dict[str, Any]]
CLIENTS = {"unit": "client", "clip": 0.5, "noise_multiplier": 1.0, "delta": 1e-3}


def made(config: dict[str, Any]) -> Experiment:
    return experiment(fedloom.RunConfig.model_validate(config))


def test_a_plan_by_hand(settings: Settings) -> None:
    e = made(
        settings(method={"name": "ffa_lora"}, privacy=CLIENTS | {"secure_aggregation": True, "noise_multiplier": 4.0})
    )
    found = forecast.forecast(e)
    B = sum(4 * out for out, _ in e.sites.values())
    head = sum(x.numel() for x in e.head["head"].values())
    assert (found.clients, found.rounds, found.numbers) == (3, 3, B + head)
    assert found.epsilon == pytest.approx(1.153, abs=0.1) and found.noise_multiplier == 4.0
    assert found.noise_over_signal == pytest.approx(4.0 * (B + head) ** 0.5 / 3)
    assert found.bytes_masks == 2 * (16 * 3 + 16) + 2 * 16 * 3 and found.bytes_up == 8 * (B + head) + found.bytes_masks
    assert (found.smallest_sum, found.opens_without) == (3, 0)
    assert any("will hardly learn" in text and "unit = 'example'" in text for text in found.warnings)
    both = forecast.forecast(
        made(settings(method={"name": "fedit"}, privacy=CLIENTS | {"noise_multiplier": 9.0, "clip": 9.0}))
    )
    assert any("noise on A times noise on B" in text for text in both.warnings)


def test_a_plan_of_rows_and_its_warnings(settings: Settings) -> None:
    pytest.importorskip("dp_accounting")
    rows = {"unit": "example", "noise_multiplier": 1.0, "target_epsilon": 9.0, "delta": 1e-2}
    found = forecast.forecast(made(settings(method={"name": "fedit"}, train={"rounds": 50}, privacy=rows)))
    assert 0 < found.rounds < 50 and found.epsilon is not None and found.epsilon <= 9.0
    said = " ".join(found.warnings)
    assert "the budget ends the run after round" in said and "sgd" in said and "not far below one over" in said
    with pytest.raises(ConfigError, match=r"no \[privacy\], there is nothing to plan"):
        forecast.forecast(made(settings()))


def test_the_plan_command(settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = fedloom.RunConfig.model_validate(settings(method={"name": "fedit"}, privacy=CLIENTS))
    (tmp_path / "run.toml").write_text(config.to_toml())
    assert call(["plan", str(tmp_path / "run.toml")]) == 0
    said = capsys.readouterr().out
    assert "noise_over_signal" in said and "warning: a round's noise" in said
    assert call(["plan", str(tmp_path / "run.toml"), "--json", "--set", "privacy.noise_multiplier=0.0"]) == 0
    assert json.loads(capsys.readouterr().out)["epsilon"] is None


LEARN = {"rounds": 6, "local_epochs": 10, "lr": 3e-2, "batch_size": 4}
"""Enough to learn thirty labels by heart."""


def test_an_audit_tells_a_clipped_run_from_an_unclipped_one(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two dozen secret coins spread an attack's success by a tenth: here the coins and the noise are always the same.
    for module in ("canaries", "budget"):
        monkeypatch.setattr(f"fedloom.runs.{module}.secret_file", lambda path: bytes(range(32)))
    planted = {"canaries": 24, "delta": 1e-3}
    config = settings(method={"name": "fedit"}, train=LEARN, lora={"rank": 8})
    bare = fedloom.run(config | {"privacy": planted}, tmp_path / "bare")
    held = fedloom.run(config | {"privacy": CLIENTS | planted | {"noise_multiplier": 3.0}}, tmp_path / "held")
    assert call(["audit", str(bare.path)]) == 0
    said = capsys.readouterr().out
    assert "loss attack" in said and "no claim" in said
    found = json.loads((bare.path / "audit.json").read_text())
    quiet = audit.audit(held.path)
    assert found["canaries"]["auc"] > 0.75 > 0.7 > quiet["canaries"]["auc"] - 0.1
    assert found["canaries"]["auc"] > quiet["canaries"]["auc"]
    assert found["claim"]["epsilon"] is None and quiet["claim"]["epsilon"] > 0
    assert quiet["mechanism"]["epsilon_at_least"] <= quiet["mechanism"]["claimed_a_round"]
    assert quiet["verdict"].startswith("PASS")
    assert any(key.startswith("tokens of 1 rows") for key in found["one plain upload"])


def test_canaries_are_in_or_out_by_a_coin_and_have_their_labels(settings: Settings, tmp_path: Path) -> None:
    e = made(settings(method={"name": "fedit"}, privacy={"canaries": 20}))
    planted = canaries.plant(tmp_path, e)
    again = canaries.plant(tmp_path, e)
    assert (planted.rows == again.rows).all() and (planted.coins == again.coins).all() and len(set(planted.rows)) == 20
    marked = replace(e, rows=replace(e.rows, canaries=planted))
    total = sum(len(marked.rows_of(c.id)) for c in e.clients)
    assert total == len(e.tables.train) - int((~planted.coins).sum())
    assert (marked.rows.train.targets[planted.rows] == planted.labels).all()  # type: ignore[index]
    with pytest.raises(ConfigError, match="at most half of the"):
        canaries.plant(tmp_path, made(settings(method={"name": "fedit"}, privacy={"canaries": 40})))


def test_the_mechanism_check_finds_forgotten_noise(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    e = made(settings(method={"name": "fedit"}, privacy=CLIENTS | {"noise_multiplier": 2.0}))
    good = audit.mechanism(e, 1e-5)
    assert 0 <= good["epsilon_at_least"] <= good["claimed_a_round"]

    def quarter(x: torch.Tensor, std: float, key: bytes, *context: Any) -> torch.Tensor:
        return noised(x, std / 4, key, *context)

    monkeypatch.setattr("fedloom.privacy.client_level.noised", quarter)
    bad = audit.mechanism(e, 1e-5)
    assert bad["epsilon_at_least"] > bad["claimed_a_round"]
    report = {"claim": {"epsilon": 2.0}, "mechanism": bad}
    assert audit.verdict(report).startswith("FAIL: the mechanism adds less noise")
    assert audit.verdict({"claim": {"epsilon": 1.0}, "canaries": {"epsilon_at_least": 2.2}}).startswith("FAIL: epsilon")
    assert isinstance(e.method, ClientLevel)


def test_tokens_of_one_plain_upload_are_read(settings: Settings, tmp_path: Path) -> None:
    # Of 16 directions the gradients of the first layer's sites hold 2 each: more would fill the tiny model's space.
    config = settings(method={"name": "fedit"}, lora={"rank": 2, "targets": ["query", "key", "value"]})
    run = fedloom.run(config, tmp_path / "run")
    found = audit.upload(RunDirectory.open(run.path), made(config))
    hits, total = map(int, found["tokens of 1 rows"].split(" / "))
    assert hits >= total - 1 and found["seen_by_server"] == "every upload"
    frozen = fedloom.run(settings(method={"name": "ffa_lora"}), tmp_path / "frozen")
    told = audit.upload(RunDirectory.open(frozen.path), made(settings(method={"name": "ffa_lora"})))
    assert "A is not trained" in told["tokens"]


def test_an_unfinished_run_is_not_audited(settings: Settings, tmp_path: Path) -> None:
    RunDirectory.create(tmp_path / "run", fedloom.RunConfig.model_validate(settings()))
    with pytest.raises(RunError, match="has no adapter yet"):
        audit.audit(tmp_path / "run")
