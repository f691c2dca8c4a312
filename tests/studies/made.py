"""Runs made up by a rule, so that what a report says of them can be worked out by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedloom.studies.results import Trace


def trace(
    label: str,
    draw: int,
    scores: Sequence[float | None],
    *,
    seed: int = 0,
    up: int = 100,
    down: int = 200,
    network: tuple[float, float] | None = None,
    dropped: Mapping[int, Mapping[str, str]] | None = None,
    clients: Mapping[str, float] | None = None,
    **manifest: Any,
) -> Trace:
    """A run whose rounds score `scores`, from round 0 on, each at `up` and `down` bytes and (seconds, joules)."""
    records: list[dict[str, Any]] = []
    for t, score in enumerate(scores):
        record: dict[str, Any] = {
            "round": t,
            "stage": "clients" if t else "none",
            "clients": ["client-0", "client-1"] if t else [],
            "dropped": dict((dropped or {}).get(t, {})),
            "train_loss": 1.0 / (t + 1) if t else None,
            "samples": 10 if t else 0,
            "bytes_up": {"A": up} if t else {},
            "bytes_down": {"A": down} if t else {},
            "bytes_clients": {"client-0": [down, up]} if t else {},
            "seconds": {"total": 2.0, "train": 1.0, "evaluate": 0.5}
            if t
            else {"total": 0.5, "train": 0, "evaluate": 0.5},
        }
        if score is not None:
            record["eval"] = {"accuracy": score, "loss": 1 - score}
            record["eval_of"] = "server"
        if network is not None and t:
            record["network"] = {"seconds": network[0], "joules": network[1]}
        records.append(record)
    if clients is not None:
        records[-1]["eval_clients"] = {client: {"accuracy": score} for client, score in clients.items()}
        records[-1]["eval_of"] = "clients"
    config = {
        "seed": seed,
        "model": {"name": "minilm"},
        "task": {"data": "trec", "kind": "classification"},
        "method": {"name": label},
        "clients": {"split_seed": draw, "count": 2},
        "train": {"lr": 0.01},
    }
    known = {
        "fedloom": "0",
        "rows": {"train": 800, "eval": 400},
        "versions": {"torch": "2"},
        "environment": {"device": "cpu"},
        "hashes": {"config": "c" * 64, "data": "d" * 64},
        "clients": {"client-0": {"examples": 400, "rank": 8}, "client-1": {"examples": 400, "rank": 4}},
    }
    return Trace(label, draw, seed, records, "accuracy", None, config, known | manifest)
