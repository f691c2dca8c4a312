"""What runs left on disk, as columns by round: what they scored, and what they had spent by then."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from fedloom.runs.run_directory import RunDirectory
from fedloom.studies.study import Budget


@dataclass(frozen=True)
class Trace:
    """One run, round by round from the untuned model on."""

    label: str
    draw: int
    seed: int
    records: list[dict[str, Any]]
    """Of rounds.jsonl, the personal phase apart."""
    score: str
    """The metric that is read."""
    personal: dict[str, Any] | None = None
    """The record of the personal phase, if there was one."""
    config: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    path: str = ""

    @cached_property
    def scores(self) -> list[float | None]:
        """Held-out score after each round; None where it was not evaluated."""
        return [record.get("eval", {}).get(self.score) for record in self.records]

    @property
    def evaluated(self) -> list[int]:
        """Indices of the rounds that were scored."""
        return [i for i, x in enumerate(self.scores) if x is not None]

    @property
    def simulated(self) -> bool:
        """Whether seconds and joules are those of a simulated network."""
        return any("network" in record for record in self.records)

    @cached_property
    def spent(self) -> dict[str, list[float]]:
        """What was spent up to and with each round: bytes (up and down), up, down, seconds, rounds, samples, and joules."""
        network = [record.get("network", {}) for record in self.records]
        up = [sum(record["bytes_up"].values()) for record in self.records]
        down = [sum(record["bytes_down"].values()) for record in self.records]
        each: dict[str, list[float]] = {
            "bytes": [a + b for a, b in zip(up, down, strict=True)],
            "up": [float(x) for x in up],
            "down": [float(x) for x in down],
            "seconds": [
                n.get("seconds", 0.0) if self.simulated else record["seconds"]["total"] - record["seconds"]["evaluate"]
                for n, record in zip(network, self.records, strict=True)
            ],
            "rounds": [0.0 if record["round"] == 0 else 1.0 for record in self.records],
            "samples": [float(record.get("samples", 0)) for record in self.records],
        }
        if self.simulated:
            each["joules"] = [n.get("joules", 0.0) for n in network]
        return {name: list(accumulate(values)) for name, values in each.items()}


@dataclass(frozen=True)
class Scored:
    """A run's score where it had spent a budget."""

    round: int
    score: float
    spent: float
    """Of the budget's kind, up to that round."""
    whole: bool
    """Whether the budget was spent: a further round would have gone beyond it."""


def read(path: Path, score: str, label: str = "", draw: int = 0) -> Trace:
    """A run directory's rounds. Raises RunError if it is none."""
    run = RunDirectory.open(path)
    config = run.config()
    records = run.rounds()
    personal = next((r for r in records if r["stage"] == "personal"), None)
    return Trace(
        label or path.name,
        draw,
        config.seed,
        [record for record in records if record["stage"] != "personal"],
        score,
        personal,
        config.model_dump(exclude_none=True),
        run.manifest() if run.manifest_file.is_file() else {},
        str(path),
    )


def finished(path: Path) -> bool:
    """Whether a run directory holds a run that came to its end. Cheap: no tensor is read."""
    try:
        latest = json.loads((path / "checkpoint" / "latest.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(latest, Mapping) and latest.get("done") is True


def at_budget(trace: Trace, budget: Budget | None) -> Scored | None:
    """The score at the last evaluated round that the budget allows: never the best round. None if nothing was evaluated.

    Without a budget, the last round's.
    """
    evaluated = trace.evaluated
    if not evaluated:
        return None
    kind, amount = ("rounds", float("inf")) if budget is None else (budget.kind, budget.amount)
    spent = trace.spent.get(kind, [0.0] * len(trace.records))
    allowed = [i for i in evaluated if spent[i] <= amount * (1 + 1e-9)]
    at = allowed[-1] if allowed else evaluated[0]
    step = spent[-1] - spent[-2] if len(spent) > 1 else 0.0
    score = trace.scores[at]
    assert score is not None
    whole = budget is None or spent[-1] >= amount * (1 - 1e-9) or spent[-1] + step > amount
    return Scored(trace.records[at]["round"], score, spent[at], whole)


def reach(trace: Trace, target: float, higher_is_better: bool) -> tuple[float, float] | None:
    """Bytes (up, down) by the first evaluated round whose score is the target or better; None if there is none."""
    for i in trace.evaluated:
        score = trace.scores[i]
        if score is not None and (score >= target if higher_is_better else score <= target):
            return trace.spent["up"][i], trace.spent["down"][i]
    return None


def dropped(traces: Iterable[Trace]) -> list[tuple[str, int, int, str, str]]:
    """(label, draw, round, client, why) of every update that was not used."""
    return [
        (trace.label, trace.draw, record["round"], client, why)
        for trace in traces
        for record in trace.records
        for client, why in record["dropped"].items()
    ]
