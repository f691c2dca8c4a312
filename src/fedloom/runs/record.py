"""A line of rounds.jsonl: what a round did, cost and scored, as plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedloom.loop import Record
from fedloom.state import State

OF_CLIENTS = ("loss_max", "grad_norm_max")
"""Reported as their largest over the clients: the bound's constants are estimated from them."""


@dataclass(frozen=True)
class Scores:
    """What an evaluation found."""

    values: dict[str, float]
    of: str
    """`server`: the common model's; `clients`: the mean over the clients' own models."""
    clients: dict[str, dict[str, float]] = field(default_factory=dict)
    """Client id -> its own, where they are told one by one."""
    over: Mapping[str, Any] = field(default_factory=dict)
    """Which clients and rows `values` are the mean over, and how far the clients are apart."""
    seconds: float = 0.0


def line(
    record: Record,
    state: State,
    *,
    scores: Scores | None = None,
    train_s: float = 0.0,
    network: Mapping[str, Any] | None = None,
    engine: Mapping[str, Any] | None = None,
    privacy: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The line of a round, or of the personal phase after the last one. Numbers that are not finite are written as null."""
    evaluated = 0.0 if scores is None else scores.seconds
    made: dict[str, Any] = {
        "round": record.t,
        "stage": record.stage,
        "clients": record.clients,
        "dropped": record.dropped,
        "suspicious": record.suspicious,
        "train_loss": record.train_loss,
        "samples": int(sum(m.get("samples", 0) for m in record.metrics.values())),
    }
    if scores is not None:
        made |= {"eval": scores.values, "eval_of": scores.of}
        if scores.over:
            made["eval_over"] = dict(scores.over)
        if scores.clients:
            made["eval_clients"] = scores.clients
    made |= {
        "bytes_up": record.up.as_dict(),
        "bytes_down": record.down.as_dict(),
        "bytes_clients": record.per_client,
        "seconds": {
            "total": round(record.seconds + evaluated, 4),
            "train": round(train_s, 4),
            "evaluate": round(evaluated, 4),
        },
        "report": _report(record, state),
    }
    if network is not None:
        made["network"] = dict(network)
    if engine:
        made["engine"] = dict(engine)
    if privacy is not None:
        made["privacy"] = dict(privacy)
    strict: dict[str, Any] = _strict(made)
    return strict


def _report(record: Record, state: State) -> dict[str, float]:
    """What the method says of the round, extremes over its clients, and the norm of the adapter."""
    found = dict(record.report)
    for name in OF_CLIENTS:
        told = [m[name] for m in record.metrics.values() if name in m]
        if told:
            found[name] = max(told)
    square = sum(float(x.square().sum()) for role in ("A", "B") for x in state.get(role, {}).values())
    return found | {"adapter_norm": square**0.5}


def _strict(value: Any) -> Any:
    """The value as strict JSON has it: no NaN, no infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _strict(x) for key, x in value.items()}
    return [_strict(x) for x in value] if isinstance(value, list | tuple) else value
