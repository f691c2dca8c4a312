"""Whole runs under differential privacy: the ledger, the stop before the budget is passed, and what records do not tell."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedloom
from fedloom.errors import ConfigError, RunError
from fedloom.privacy.accountant import Release, epsilon
from fedloom.runs import audit
from fedloom.runs.budget import Budget, opened
from fedloom.runs.experiment import experiment
from fedloom.runs.plan import plan
from fedloom.runs.run import Observer

Settings = Callable[..., dict[str, Any]]
CLIENTS = {"unit": "client", "clip": 0.5, "noise_multiplier": 4.0, "delta": 1e-3}
ROWS = {"unit": "example", "clip": 0.5, "noise_multiplier": 2.0, "delta": 1e-3}
NAME = "adapter_model.safetensors"


def adapter(path: Path) -> bytes:
    return (path / "adapter" / NAME).read_bytes()


def ledger(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "privacy.jsonl").read_text().splitlines()]


def test_a_run_with_private_clients(settings: Settings, tmp_path: Path) -> None:
    config = settings(method={"name": "fedit"}, privacy=CLIENTS)
    run = fedloom.run(config, tmp_path / "run")
    assert "privacy" in run.rounds[0] and run.rounds[0]["privacy"]["epsilon"] == 0.0
    for t, record in enumerate(run.rounds[1:], 1):
        assert record["privacy"] == {
            "unit": "client",
            "epsilon": pytest.approx(epsilon([Release(4.0, t)], 1e-3)),
            "delta": 1e-3,
            "noise_multiplier": 4.0,
        }
        assert record["train_loss"] is None and record["suspicious"] == {}
        assert not {"loss_max", "grad_norm_max"} & record["report"].keys()
        assert record["report"]["noise_std"] == pytest.approx(4.0 * 0.5 * 1.001 / 3)
    assert [line["round"] for line in ledger(run.path)] == [1, 2, 3]
    assert (run.path / "noise.key").stat().st_mode & 0o777 == 0o600
    other = fedloom.run(config, tmp_path / "other")
    assert adapter(run.path) != adapter(other.path)  # the seed of the run says nothing of the noise
    assert json.loads((run.path / "manifest.json").read_text())["method"]["name"] == "fedit"


def test_noise_goes_onto_a_secure_sum_as_well(settings: Settings, tmp_path: Path) -> None:
    config = settings(method={"name": "fedit"}, train={"rounds": 2}, privacy=CLIENTS | {"secure_aggregation": True})
    run = fedloom.run(config, tmp_path / "run")
    assert run.rounds[-1]["bytes_up"]["masks"] > 0
    assert run.rounds[-1]["privacy"]["epsilon"] == pytest.approx(epsilon([Release(4.0, 2)], 1e-3))
    assert run.rounds[-1]["report"]["noise_std"] == pytest.approx(4.0 * 0.5 * 1.001 / 3)


class Crash(Observer):
    def round(self, record: dict[str, Any]) -> None:
        if record["round"] == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("privacy", [CLIENTS, ROWS], ids=["client", "example"])
def test_a_resumed_run_has_the_same_bytes_and_pays_a_round_once(
    privacy: dict[str, Any], settings: Settings, tmp_path: Path
) -> None:
    pytest.importorskip("dp_accounting")
    config = settings(method={"name": "fedit"}, privacy=privacy)
    with pytest.raises(KeyboardInterrupt):  # after the ledger has round 2, before its checkpoint
        fedloom.run(config, tmp_path / "run", Crash())
    before = ledger(tmp_path / "run")
    assert max(line["round"] for line in before) == 2
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    runs = [fedloom.resume(tmp_path / name) for name in ("run", "copy")]
    assert adapter(runs[0].path) == adapter(runs[1].path)
    after = ledger(runs[0].path)
    assert after[: len(before)] == before and len(after) == len(before) * 3 // 2


def test_a_run_stops_before_its_budget_is_passed(settings: Settings, tmp_path: Path) -> None:
    """z = 4: two rounds are epsilon 0.895 at delta 1e-3, three are more than 1."""
    allowed = epsilon([Release(4.0, 2)], 1e-3)
    privacy = CLIENTS | {"target_epsilon": allowed + 1e-6}
    run = fedloom.run(settings(method={"name": "fedit"}, train={"rounds": 5}, privacy=privacy), tmp_path / "run")
    assert [r["round"] for r in run.rounds] == [0, 1, 2] and "eval" in run.rounds[-1]
    assert run.rounds[-1]["privacy"]["epsilon"] <= allowed + 1e-6
    assert run.adapter_dir.is_dir()
    few = CLIENTS | {"target_epsilon": 0.01}
    with pytest.raises(RunError, match=r"privacy budget is spent: epsilon 0 after 0 rounds, and one more would pass"):
        fedloom.run(settings(method={"name": "fedit"}, privacy=few), tmp_path / "few")


def test_a_spent_budget_is_not_resumed(settings: Settings, tmp_path: Path) -> None:
    run = fedloom.run(settings(method={"name": "fedit"}, train={"rounds": 2}, privacy=CLIENTS), tmp_path / "run")
    made = Budget(
        run.path / "privacy.jsonl",
        fedloom.RunConfig.model_validate(settings(privacy=CLIENTS | {"target_epsilon": 1.0})).privacy,  # type: ignore[arg-type]
        {"": Release(4.0)},
    )
    with pytest.raises(RunError, match=r"after 2 rounds.*set train.rounds = 2"):
        made.last_round(2, 9)
    assert made.last_round(2, 2) == 2 and made.last_round(1, 9) == 2


@pytest.mark.parametrize("unit", ["client", "example"])
def test_a_target_alone_sets_the_noise(unit: str, settings: Settings, tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting")
    privacy = {"unit": unit, "clip": 0.5, "target_epsilon": 3.0, "delta": 1e-3}
    run = fedloom.run(settings(method={"name": "fedit"}, train={"local_steps": 2}, privacy=privacy), tmp_path / "run")
    got = [r["privacy"]["epsilon"] for r in run.rounds]
    assert got == sorted(got) and 2.9 < got[-1] <= 3.0 and len(got) == 4


def test_a_run_with_private_rows(settings: Settings, tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting")
    config = settings(method={"name": "fedit"}, train={"rounds": 2, "local_steps": 3, "optimizer": "sgd"}, privacy=ROWS)
    run = fedloom.run(config, tmp_path / "run")
    clients = {line["whose"]: line["release"] for line in ledger(run.path)}
    e = experiment(run_config(config))
    assert clients == {
        c.id: {"noise_multiplier": 2.0, "count": 3, "sampling": 4 / c.examples, "grid": 0.0} for c in e.clients
    }
    worst = max(epsilon([Release(2.0, 6, 4 / c.examples)], 1e-3) for c in e.clients)
    assert run.rounds[-1]["privacy"]["epsilon"] == pytest.approx(worst)
    assert all(r["train_loss"] is None for r in run.rounds)
    assert adapter(run.path) != adapter(fedloom.run(config, tmp_path / "other").path)


def run_config(config: dict[str, Any]) -> fedloom.RunConfig:
    return fedloom.RunConfig.model_validate(config)


def test_clipping_alone_is_no_privacy(settings: Settings, tmp_path: Path) -> None:
    config = settings(method={"name": "fedit"}, train={"rounds": 1}, privacy=CLIENTS | {"noise_multiplier": 0.0})
    a, b = (fedloom.run(config, tmp_path / name) for name in "ab")
    assert a.rounds[-1]["privacy"]["epsilon"] is None and adapter(a.path) == adapter(b.path)


@pytest.mark.parametrize(
    "change, why",
    [
        ({"unit": "client"}, "unit is set without noise"),
        ({"noise_multiplier": 1.0}, "is set without a unit"),
        (CLIENTS | {"delta": 0.0}, "delta"),
        (CLIENTS | {"clip": -1.0}, "clip"),
        (CLIENTS | {"clip": "adaptif"}, "expected a number above 0, 'auto' or 'adaptive'"),
        (ROWS | {"clip": "adaptive"}, "clip is 'adaptive', which protects clients, and unit is 'example'"),
        (ROWS | {"noise": "clients"}, "noise is 'clients', which protects clients, and unit is 'example'"),
        (CLIENTS | {"noise": "clients"}, "a share of the noise protects nothing that is seen by itself"),
    ],
)
def test_sections_that_say_nothing(change: dict[str, Any], why: str, settings: Settings) -> None:
    from fedloom.runs.config import parse

    with pytest.raises(ConfigError, match=why):
        parse(settings(method={"name": "fedit"}, privacy=change), "the test")


@pytest.mark.parametrize(
    "sections, why",
    [
        ({"method": {"name": "flexlora"}, "privacy": CLIENTS}, "flexlora reads each upload itself"),
        ({"method": {"name": "median"}, "privacy": CLIENTS}, "reads each upload itself"),
        ({"clients": {"max_norm": 3.0}, "privacy": CLIENTS}, r"clients.max_norm is 3, and under \[privacy\] no upload"),
        (
            {"engine": {"name": "flower", "wire": "bfloat16"}, "privacy": CLIENTS},
            "engine.wire is 'bfloat16', but under privacy.unit = 'client' noise is made for changes as clients clipped them",
        ),
        ({"lora": {"dropout": 0.1}, "privacy": ROWS}, "has no dropout, got lora.dropout = 0.1"),
        ({"engine": {"name": "ray"}, "privacy": ROWS}, "not built for engine.name = 'ray' yet"),
        (
            {"engine": {"name": "flower"}, "privacy": CLIENTS | {"noise": "clients", "secure_aggregation": True}},
            "privacy.noise = 'clients' is not built for engine.name = 'flower' yet",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused(sections: dict[str, Any], why: str, settings: Settings) -> None:
    pytest.importorskip("dp_accounting")
    with pytest.raises(ConfigError, match=why):
        plan(run_config(settings(**{"method": {"name": "fedit"}} | sections)))


@pytest.mark.parametrize(
    "privacy, why", [(CLIENTS, "3 clients"), (ROWS, "rows of client '")], ids=["client", "example"]
)
def test_a_delta_above_one_over_n_is_refused(privacy: dict[str, Any], why: str, settings: Settings) -> None:
    pytest.importorskip("dp_accounting")
    with pytest.raises(
        ConfigError, match=rf"privacy.delta is 0.5, above 1 / \d+ \(\d+ {why}|privacy.delta is 0.5, .*{why}"
    ):
        experiment(run_config(settings(method={"name": "fedit"}, privacy=privacy | {"delta": 0.5})))


def test_without_privacy_there_is_no_budget(settings: Settings, tmp_path: Path) -> None:
    e = experiment(run_config(settings(method={"name": "fedit"}, privacy={"secure_aggregation": True})))
    assert opened(tmp_path, e) == (None, e) and not list(tmp_path.iterdir())


SHARES = CLIENTS | {"noise": "clients", "secure_aggregation": True}


def test_noise_from_the_clients_is_paid_and_repeated(settings: Settings, tmp_path: Path) -> None:
    """All three clients of a sum are needed, and none may collude: the noise is that of a trusted server."""
    config = settings(method={"name": "fedit"}, train={"rounds": 3}, privacy=SHARES)
    with pytest.raises(KeyboardInterrupt):
        fedloom.run(config, tmp_path / "run", Crash())
    run = fedloom.resume(tmp_path / "run")
    assert [line["release"] for line in ledger(run.path)] == [
        {"noise_multiplier": 4.0, "count": 1, "sampling": 1.0, "grid": 1024.0}
    ] * 3
    paid = [r["privacy"]["epsilon"] for r in run.rounds]
    assert paid[-1] == pytest.approx(epsilon([Release(4.0, 3, grid=1024.0)], 1e-3))
    assert paid[-1] > epsilon([Release(4.0, 3)], 1e-3)
    assert run.rounds[-1]["report"]["noise_std"] == pytest.approx(4.0 * 0.5 / 3, rel=0.01)
    assert audit.claim(run.path, run_config(config).privacy)["against"].endswith("the server too")
    found = audit.mechanism(experiment(run_config(config)), 1e-3)
    assert 0 <= found["epsilon_at_least"] <= found["claimed_a_round"]


def test_a_clipping_bound_from_the_servers_rows(settings: Settings, tmp_path: Path, questions: Path) -> None:
    config = settings(method={"name": "fedit"}, train={"rounds": 2}, task={"proxy_data": str(questions)})
    run = fedloom.run(config | {"privacy": CLIENTS | {"clip": "auto"}}, tmp_path / "run")
    manifest = json.loads((run.path / "manifest.json").read_text())
    assert manifest["lora_parameters"] == experiment(run_config(config)).parameters[1] > 0
    first, second = (r["report"] for r in run.rounds[1:])
    assert first["clip"] == second["clip"] > 0
    assert first["noise_std"] == pytest.approx(4.0 * first["clip"] * 1.001 / 3)
    with pytest.raises(ConfigError, match=r"privacy.clip is 'auto'.*name them, task.proxy_data"):
        plan(run_config(settings(method={"name": "fedit"}, privacy=CLIENTS | {"clip": "auto"})))


def test_a_clipping_bound_that_adapts_is_kept_with_the_state(settings: Settings, tmp_path: Path) -> None:
    """Without noise three clients can be counted: the bound moves by exp(0.2 (1/2 - share within)) a round."""
    privacy = SHARES | {"clip": "adaptive", "clip_start": 0.01, "noise_multiplier": 0.0}
    config = settings(method={"name": "fedit"}, train={"rounds": 3}, privacy=privacy)
    with pytest.raises(KeyboardInterrupt):
        fedloom.run(config, tmp_path / "run", Crash())
    rounds = fedloom.resume(tmp_path / "run").rounds[1:]
    assert [r["report"]["clip_within"] for r in rounds] == pytest.approx([0.0] * 3, abs=1e-9)
    assert [r["report"]["clip"] for r in rounds] == pytest.approx([0.01 * math.exp(0.1 * t) for t in range(3)])


def test_a_grid_too_coarse_for_integer_noise_is_refused(settings: Settings) -> None:
    with pytest.raises(ConfigError, match=r"steps of it, expected at least 10240: set privacy.bits to 64"):
        experiment(run_config(settings(method={"name": "fedit"}, privacy=SHARES | {"bits": 32})))


def test_few_clients_are_not_counted_under_noise(settings: Settings) -> None:
    with pytest.raises(ConfigError, match="needs at least 57 clients in a round, got 3"):
        experiment(run_config(settings(method={"name": "fedit"}, privacy=CLIENTS | {"clip": "adaptive"})))
