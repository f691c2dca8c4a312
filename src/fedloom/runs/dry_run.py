"""What a run would load, train and send, and an estimate of its time, bytes and memory: a rehearsal in a few steps.

The data is read and the model loaded, all that is wrong is told, and then two rounds are run in which every client takes one
step, in this process and a temporary folder. Bytes are those of the two rounds; seconds grow with the samples of a round and
with the held-out rows. It is an estimate: a round's time depends on the rows that clients happen to draw.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from fedloom import sampling
from fedloom.core import Client
from fedloom.runs import memory
from fedloom.runs import run as runs
from fedloom.runs.config import EngineSection, RunConfig, TrackSection, TrainSection
from fedloom.runs.experiment import Experiment

ROUNDS = 2  # alternating methods send something else in every other round; the first also warms up
HELD_OUT = 64


@dataclass(frozen=True)
class DryRun:
    """What was found."""

    clients: int
    sampled: int
    """Clients of a round."""
    rows: int
    held_out: int
    longest_row: int
    """Tokens."""
    model: str
    device: str
    dtype: str
    base_bytes: int
    layers: int
    """That have an adapter."""
    trained: int
    """Parameters of a client, without a head."""
    head: int
    cohort: int
    """Clients in one pass."""
    why_cohort: str
    frozen_blocks: int
    """Below the first that is adapted, computed once for each row."""
    frozen_bytes: int
    """That what they make of all rows would take."""
    room_bytes: int
    """That it may take."""
    memory_bytes: int
    """The base, and what training a cohort adds, by the memory model."""
    rounds: int
    up_bytes: float
    """Of a round, all clients; mean of two rounds."""
    down_bytes: float
    load_s: float
    round_s: float
    """Training alone."""
    evaluation_s: float
    total_s: float
    """Loading, rounds and evaluations."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class _Seen(runs.Observer):
    """Remembers how long loading took."""

    def __init__(self, told: runs.Observer) -> None:
        self.told, self.began, self.load_s = told, time.perf_counter(), 0.0

    def assembled(self, experiment: Experiment) -> None:
        self.load_s = time.perf_counter() - self.began
        self.told.doing("rehearsing two rounds of one step")


def dry_run(config: RunConfig, observer: runs.Observer | None = None) -> DryRun:
    """Rehearse a configuration. Raises what `run.start` would raise before its first round, and leaves nothing."""
    told = observer or runs.Observer()
    e = runs.prepared(config, told)
    told.assembled(e)
    facts = _facts(e)
    samples, clients = _samples(config, e.clients), sampling.count(config.clients.fraction, len(e.clients))
    del e  # the rehearsal loads its own
    seen = _Seen(told)
    with tempfile.TemporaryDirectory() as folder:
        records = runs.start(_short(config), Path(folder) / "run", seen).rounds
    trained = [r for r in records if r["stage"] != "personal" and r["round"] > 0]
    last = trained[-1] if trained else None
    round_s = 0.0 if last is None else last["seconds"]["train"] * samples / max(1, last["samples"])
    evaluated = [r["seconds"]["evaluate"] for r in records if "eval" in r]
    evaluation_s = evaluated[-1] * max(1.0, facts["held_out"] / HELD_OUT)
    personal = sum(r["seconds"]["train"] * samples / max(1, r["samples"]) for r in records if r["stage"] == "personal")
    rounds = config.train.rounds
    return DryRun(
        **facts,
        sampled=clients,
        rounds=rounds,
        up_bytes=_mean_sum(trained, "bytes_up"),
        down_bytes=_mean_sum(trained, "bytes_down"),
        load_s=seen.load_s,
        round_s=round_s,
        evaluation_s=evaluation_s,
        total_s=seen.load_s + rounds * round_s + personal + _evaluations(config) * evaluation_s,
    )


def _facts(e: Experiment) -> dict[str, Any]:
    need = e.memory
    asked = e.config.engine.cohort
    return {
        "clients": len(e.clients),
        "rows": len(e.rows.train),
        "held_out": len(e.rows.eval),
        "longest_row": int(e.rows.train.lengths.max()),
        "model": e.config.model.name,
        "device": str(e.device),
        "dtype": e.base.quantization or str(e.dtype).removeprefix("torch."),
        "base_bytes": need.base,
        "layers": len(e.sites),
        "trained": e.parameters[0],
        "head": e.head_parameters,
        "cohort": e.cohort,
        "why_cohort": "engine.cohort" if asked != "auto" else "by tokens, memory and processor",
        "frozen_blocks": 0 if e.trainer.prefix is None else e.trainer.prefix.blocks,
        "frozen_bytes": memory.states_bytes(e.base.model, e.dtype, len(e.rows.train.tokens) + len(e.rows.eval.tokens)),
        "room_bytes": memory.prefix_bytes(e.config.engine, e.device),
        "memory_bytes": need.total(min(e.cohort, len(e.clients))),
    }


def _samples(config: RunConfig, clients: Sequence[Client]) -> float:
    """Rows that the clients of a round train on, on average."""
    train = config.train
    if train.local_steps is not None:
        mean = float(train.local_steps * train.batch_size)
    else:
        mean = (train.local_epochs or 1) * sum(client.examples for client in clients) / len(clients)
    return mean * sampling.count(config.clients.fraction, len(clients))


def _evaluations(config: RunConfig) -> int:
    """How often a run is scored: at its start, where it is due, and at its end."""
    train = config.train
    return sum(train.scored(t, train.rounds) for t in range(train.rounds + 1))


def _short(config: RunConfig) -> RunConfig:
    """Two rounds of one step here, few held-out rows, and no trackers or report."""
    train = config.train.model_dump() | {
        "rounds": min(ROUNDS, config.train.rounds),
        "local_steps": 1,
        "local_epochs": None,
        "evaluate_every": 0,
    }
    same = ("kernels", "cohort", "threads", "prefix_gib")
    engine = EngineSection.model_validate({key: getattr(config.engine, key) for key in same})
    limit = min(HELD_OUT, config.task.eval_limit or HELD_OUT)
    return config.model_copy(
        update={
            "train": TrainSection.model_validate(train),
            "task": config.task.model_copy(update={"eval_limit": limit}),
            "engine": engine,
            "track": TrackSection(),
        }
    )


def _mean_sum(records: Sequence[dict[str, Any]], key: str) -> float:
    return fmean(sum(r[key].values()) for r in records) if records else 0.0
