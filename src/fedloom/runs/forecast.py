"""What [privacy] of a run file will cost and give, said before any training."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedloom import describe, sampling
from fedloom.core import Client
from fedloom.errors import ConfigError
from fedloom.flows import rehearse
from fedloom.privacy import graph
from fedloom.runs import budget, private
from fedloom.runs.experiment import Experiment
from fedloom.runs.privacy_section import PrivacySection


@dataclass(frozen=True)
class Forecast:
    """The promise of a run and its price. What does not apply is None."""

    clients: int
    rounds: int
    """That the budget allows, train.rounds at most."""
    numbers: int
    """Of an upload, head included."""
    unit: str | None = None
    noise_multiplier: float | None = None
    epsilon: float | None = None
    """After `rounds`, the largest over the clients; infinite without noise."""
    delta: float | None = None
    noise_over_signal: float | None = None
    """Norm of a round's noise over the most that all clients, or rows, can move the model together."""
    smallest_sum: int | None = None
    """Clients of the smallest secure sum that is opened."""
    opens_without: int | None = None
    """Clients of a round that may drop out."""
    bytes_up: int | None = None
    """Of one client in a round, masks and boxes included."""
    bytes_masks: int | None = None
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON; infinity is null."""
        return {k: None if isinstance(x, float) and math.isinf(x) else x for k, x in asdict(self).items()}


def forecast(e: Experiment) -> Forecast:
    """Of an experiment. Raises ConfigError without [privacy]."""
    c = e.config.privacy
    if c is None or not (c.unit or c.secure_aggregation):
        raise ConfigError(
            "the run file has no [privacy], there is nothing to plan: set secure_aggregation = true, or unit and target_epsilon"
        )
    seen = rehearse(private.bare(e.config, e.method), Client("any", 1, e.method.rank), 1, e.sites)
    sent = {} if seen is None else seen.sent
    numbers = sum(x.numel() for role, group in sent.items() if role != "head" for x in group.values())
    if "head" in describe.roles_up(e.method):
        numbers += e.head_parameters
    asked = sampling.count(e.config.clients.fraction, len(e.clients))
    values: dict[str, Any] = {"clients": asked, "rounds": e.config.train.rounds, "numbers": numbers}
    if c.secure_aggregation:
        values |= _sums(c, asked, numbers)
    if c.unit is not None:
        values |= _promise(e, c, asked, numbers, both={"A", "B"} <= sent.keys())
    return Forecast(**values)


def _sums(c: PrivacySection, n: int, numbers: int) -> dict[str, Any]:
    group, t = (n, graph.threshold(n)) if n <= graph.COMPLETE else (graph.degree(n)[0] + 1, graph.degree(n)[1])
    masks = (
        (group - 1) * (16 * group + 16) + 16 * group + 16 * group
    )  # boxes, fingerprints, and shares that are given back
    return {
        "smallest_sum": max(c.min_clients, t if n <= graph.COMPLETE else c.min_clients),
        "opens_without": n - max(t, c.min_clients) if n <= graph.COMPLETE else round(graph.LOST * n),
        "bytes_up": numbers * c.bits // 8 + masks,
        "bytes_masks": masks,
    }


def _promise(e: Experiment, c: PrivacySection, n: int, numbers: int, both: bool) -> dict[str, Any]:
    z, wanted = private.noise_multiplier(e.config, e.clients), e.config.train.rounds
    each = budget.per_round(e, e.clients, z)

    fresh = budget.Budget(Path(os.devnull), c, each)
    rounds = fresh.last_round(0, wanted)
    if c.unit == "client":
        ratio = z * math.sqrt(numbers) / n
    else:
        steps = min(x.count for x in each.values())
        ratio = z * math.sqrt(numbers) / (e.config.train.batch_size * math.sqrt(n * steps))
    return {
        "unit": c.unit,
        "rounds": rounds,
        "noise_multiplier": z,
        "epsilon": fresh.epsilon(rounds),
        "delta": c.delta,
        "noise_over_signal": ratio,
        "warnings": tuple(_warnings(e, c, rounds, z, ratio, n, both)),
    }


def _warnings(e: Experiment, c: PrivacySection, rounds: int, z: float, ratio: float, n: int, both: bool) -> list[str]:
    found = []
    train = e.config.train
    if rounds < train.rounds:
        found.append(f"the budget ends the run after round {rounds} of {train.rounds}: more noise allows more rounds")
    if z == 0:
        found.append("noise_multiplier is 0: updates are clipped, and nothing is promised")
    if ratio > 1:
        found.append(
            f"a round's noise is {ratio:.3g} times what it can learn at most: the model will hardly learn. Fewer numbers help "
            "(ffa_lora, a small rank, a frozen head), "
            + ("more clients, " if c.unit == "client" else "larger batches, ")
            + "or a larger epsilon"
            + (" (with few clients, unit = 'example' costs less)" if c.unit == "client" and n < 100 else "")
        )
    sigma = z * c.clip / n if c.unit == "client" and not isinstance(c.clip, str) else 0.0
    width = max(m for _, m in e.sites.values())
    if both and sigma * math.sqrt(3 * width) > 1:
        found.append(
            "noise on A times noise on B outweighs the rest of it: a method that trains one factor (ffa_lora) suffers less"
        )
    if c.unit == "example" and train.optimizer == "adamw":
        found.append(
            "adamw learnt far less than sgd under noise in our trial: try train.optimizer = 'sgd' with a larger lr"
        )
    if c.delta > 1e-3 / max(1, n if c.unit == "client" else min(client.examples for client in e.clients)):
        found.append(f"delta {c.delta:g} is not far below one over the number of {c.unit}s that are protected")
    return found
