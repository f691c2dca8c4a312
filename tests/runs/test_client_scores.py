"""Scores of clients: of which of them, on whose rows, together or alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedloom
from fedloom import sampling
from fedloom.core import Client
from fedloom.data.partition import hold_out
from fedloom.errors import ConfigError, DataError
from fedloom.runs import evaluate, export, finished
from fedloom.runs.config import parse
from fedloom.runs.flower_node import agreement, differences

from .test_resume import unfinished
from .test_run import made

Settings = Callable[..., dict[str, Any]]


def sums(table: dict[str, dict[str, float]], weights: dict[str, int], metric: str) -> float:
    return float(np.average([table[k][metric] for k in table], weights=[weights[k] for k in table]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["fedit", "fedsa_lora", "fedlora_optimizer"])
def test_each_client_is_scored_on_rows_of_its_own(
    name: str, dtype: str, deep_encoder: Path, settings: Settings, tmp_path: Path
) -> None:
    """Twelve layers; what the line says is what each saved model says of these rows, and nobody trained on them."""
    config = settings(
        model={"name": str(deep_encoder), "dtype": dtype},
        clients={"count": 5, "holdout": 0.3, "partition": "dirichlet"},
        method={"name": name},
        train={"rounds": 1},
    )
    run = fedloom.run(config, tmp_path / "run")
    e = made(config)
    last, over = run.rounds[-1], run.rounds[-1]["eval_over"]
    assert (over["clients"], over["of"], over["rows"]) == (5, 5, "own")
    rows = sorted(i for part in (e.partition, e.held_out) for mine in part.values() for i in mine)
    assert rows == list(range(len(e.tables.train)))
    trained = {client.id: client.examples for client in e.clients}
    assert trained == {k: len(mine) for k, mine in e.partition.items()}
    assert json.loads((run.path / "partition.json").read_text()) == e.partition
    for client, found in last["eval_clients"].items():
        whose = None if name == "fedit" else client
        work = export.read(finished.adapter_of(finished.RunDirectory.open(run.path), whose))
        assert evaluate.score(e, work, evaluate.own(e, client)) == pytest.approx(
            found, abs=2e-2 if dtype == "bfloat16" else 1e-5
        )
        if whose:
            assert finished.evaluate_saved(run.path, client) == pytest.approx(
                found, abs=2e-2 if dtype == "bfloat16" else 1e-5
            )
    for metric, value in last["eval"].items():
        each = [x[metric] for x in last["eval_clients"].values()]
        assert value == pytest.approx(sums(last["eval_clients"], trained, metric))
        assert [over[word][metric] for word in ("std", "min", "max")] == pytest.approx(
            [np.std(each), min(each), max(each)]
        )


def test_text_and_choices_are_scored_on_rows_of_ones_own(decoder: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    lines = [
        {"prompt": f"is the {w} old", "response": "yes" if i % 3 else "no"} for i, w in enumerate(["city", "king"] * 15)
    ]
    data.write_text("\n".join(map(json.dumps, lines)))
    config = {
        "model": {"name": str(decoder), "dtype": "float32"},
        "task": {
            "kind": "causal-lm",
            "data": str(data),
            "choices": ["yes", "no"],
            "metrics": ["choice", "exact_match"],
            "max_new_tokens": 2,
        },
        "clients": {"count": 3, "holdout": 0.2},
        "lora": {"targets": ["q_proj"]},
        "method": {"name": "fedit"},
        "train": {"rounds": 1, "batch_size": 4},
    }
    run = fedloom.run(config, tmp_path / "run")
    e = made(config)
    work = export.read(run.adapter_dir)
    right = {k: [e.tables.train["response"][i] for i in rows] for k, rows in e.held_out.items()}
    for client, found in run.rounds[-1]["eval_clients"].items():
        rows = e.rows.train.select(e.held_out[client])
        assert found["loss"] == pytest.approx(e.trainer.evaluate(work, rows).loss, abs=1e-5)
        said = [
            e.trainer.log_likelihoods(
                work, e.rows.answers(e.tables.train.select(e.held_out[client]), x.choices)
            ).reshape(-1, 2)
            for x in [evaluate.own(e, client)]
            if x.choices is not None
        ]
        likeliest = ["yes" if yes > no else "no" for yes, no in said[0]]
        assert found["choice"] == pytest.approx(
            np.mean([a == b for a, b in zip(likeliest, right[client], strict=True)])
        )


def test_some_clients_are_scored_the_same_in_every_round_and_after_a_resumption(
    settings: Settings, tmp_path: Path
) -> None:
    config = settings(
        method={"name": "fedsa_lora"}, clients={"count": 6, "scored": 2, "holdout": 0.2}, train={"rounds": 2}
    )
    run = fedloom.run(config, tmp_path / "run")
    chosen = sampling.panel(made(config).clients, 2, 0)
    assert [r["eval_over"]["clients"] for r in run.rounds] == [2, 2, 2]
    assert [*run.rounds[-1]["eval_clients"]] == [client.id for client in chosen]
    told = [r["eval"] for r in run.rounds]
    unfinished(run.path, 1)
    assert [r["eval"] for r in fedloom.resume(run.path).rounds] == told


def test_a_panel_is_of_all_clients_and_other_ones_with_another_seed() -> None:
    clients = [Client(f"c{i:03d}", 1, 4) for i in range(200)]
    assert sampling.panel(clients, 200, 0) is clients
    panels = [sampling.panel(clients, 20, seed) for seed in range(40)]
    assert all(len({*p}) == 20 and p == sorted(p, key=lambda client: client.id) for p in panels)
    assert len({client.id for p in panels for client in p}) > 190


def test_one_row_cannot_be_held_out_and_a_site_holds_out_as_in_the_simulation(settings: Settings) -> None:
    with pytest.raises(DataError, match=r"'b' has one row, expected two or more: clients.holdout = 0.1"):
        hold_out({"a": [0, 1], "b": [2]}, 0.1, 0)
    _, held = hold_out({"a": [*range(10)], "b": [*range(20, 24)]}, 0.3, 0)
    assert (len(held["a"]), len(held["b"])) == (3, 1)
    alone = hold_out({"b": [*range(4)]}, 0.3, 0)[1]["b"]
    assert held["b"] == [20 + i for i in alone]
    assert hold_out({"a": [5, 7]}, 0.99, 0)[0]["a"] in ([5], [7]), "one row is left to train on"
    one, two = (agreement(parse(settings(clients={"holdout": x}), "it")) for x in (0.0, 0.5))
    assert differences(one, two) == ["clients.holdout"]


def test_what_would_tell_a_clients_scores_or_audit_rows_held_out_is_refused(settings: Settings, tmp_path: Path) -> None:
    for privacy, words in (
        ({"secure_aggregation": True}, "no client's own scores are told"),
        ({"unit": "example", "noise_multiplier": 1.0, "canaries": 4}, "canaries are planted among all rows"),
    ):
        with pytest.raises(ConfigError, match=words):
            fedloom.run(settings(clients={"holdout": 0.2}, method={"name": "fedit"}, privacy=privacy), tmp_path / "run")
        assert not (tmp_path / "run").exists()
