"""Run a configuration, or go on with a run: rounds, records, checkpoints, and a PEFT adapter at the end."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedloom import checkpoint, sampling
from fedloom.checkpoint import ClientStates
from fedloom.client import Client, Failure
from fedloom.data import partition
from fedloom.engine import Job, Total
from fedloom.errors import RunError
from fedloom.flower.transport import Transport
from fedloom.loop import Record, federate, in_order
from fedloom.models import quantised
from fedloom.runs import (
    budget,
    engines,
    evaluate,
    export,
    flower_server,
    private,
    radio_cost,
    resumption,
    site_budget,
    track,
)
from fedloom.runs.config import RunConfig
from fedloom.runs.contradictions import refuse_contradictions, refuse_too_many
from fedloom.runs.engines import Reached
from fedloom.runs.experiment import Experiment, experiment
from fedloom.runs.given import Given
from fedloom.runs.plan import absolute, plan
from fedloom.runs.record import Scores, line
from fedloom.runs.run_directory import RunDirectory, digest_file, digest_files
from fedloom.state import State


@dataclass(frozen=True)
class Result:
    """What a run leaves."""

    path: Path
    rounds: list[dict[str, Any]]
    """The records of rounds.jsonl."""

    @property
    def adapter_dir(self) -> Path:
        """The PEFT directory."""
        return self.path / "adapter"

    @property
    def eval(self) -> dict[str, float]:
        """The last scores."""
        return next((r["eval"] for r in reversed(self.rounds) if "eval" in r), {})


class Observer:
    """What is told while a run goes on; this one ignores it."""

    def assembled(self, experiment: Experiment) -> None:
        """All is loaded; training is about to begin."""

    def round(self, record: dict[str, Any]) -> None:
        """A round was recorded (also those found when a run is resumed)."""

    def doing(self, what: str) -> None:
        """What happens next, in a few words."""

    def warning(self, what: str) -> None:
        """What a person must know before it happens."""


def start(
    config: RunConfig,
    out: Path | None = None,
    observer: Observer | None = None,
    transport: Transport | None = None,
    given: Given | None = None,
) -> Result:
    """Run a configuration in a new directory (by default the next free one below `runs/`).

    `transport` leads to nodes that are there already; without one, `config.engine` says where clients are.
    """
    observer = observer or Observer()
    config = absolute(config)
    path = out if out is not None else free_name(config)
    RunDirectory.require_free(path)
    track.check(config.track)
    # Whatever is wrong with method, data or model is told before anything is written.
    e = prepared(config, observer, transport, given)
    run = RunDirectory.create(path, config)
    with run.held():
        return _go(run, e, observer, transport, [])


def prepared(
    config: RunConfig, observer: Observer, transport: Transport | None = None, given: Given | None = None
) -> Experiment:
    """The experiment, with all checked that can be before the first round. Writes nothing."""
    planned = plan(config)
    refuse_contradictions(planned, engines.name_of(config, transport))
    engines.check_startable(config, transport)
    e = experiment(planned, observer.doing, given=given, device=engines.device(config))
    refuse_too_many(config, len(e.clients))
    e.rows.encode()
    if config.network is not None and transport is None and config.engine.superlink is None:
        radio_cost.plan(config, [client.id for client in e.clients])
    return e


def resume(
    path: Path,
    observer: Observer | None = None,
    transport: Transport | None = None,
    *,
    accept_changes: bool = False,
    back_to: int | None = None,
    given: Given | None = None,
) -> Result:
    """Go on with a run from its newest checkpoint: it ends with the same adapter bytes as if it had never stopped.

    `back_to` is an earlier round whose checkpoint is kept. Raises RunError if what the run was made from is not what it was,
    naming what changed; with `accept_changes` the run goes on, and its manifest says so.
    """
    observer = observer or Observer()
    run = RunDirectory.open(path)
    with run.held():
        if back_to is not None:
            resumption.go_back(run, back_to)
        started = run.manifest() if run.manifest_file.is_file() else {}
        if (
            (run.checkpoint / "latest.json").exists()
            and checkpoint.load(run.checkpoint)[3]
            and resumption.whole(run, started)
        ):
            records = run.rounds()
            for record in records:
                observer.round(record)
            return Result(run.path, records)
        config = run.config()
        engines.check_startable(config, transport)
        e = experiment(config, observer.doing, given=given, device=engines.device(config))
        e.rows.encode()
        resumption.same_layers(path, started, e)
        accepted = list(started.get("accepted_changes", []))
        if changed := resumption.changes(run, started, e):
            if not accept_changes:
                raise RunError(
                    f"{path} was made from something else: {', '.join(changed)} changed since it began. Restore what it was, "
                    f"or go on with `fedloom resume {path} --accept-changes`, which its manifest will say"
                )
            accepted.append({"changed": changed})
        return _go(run, e, observer, transport, accepted)


def free_name(config: RunConfig) -> Path:
    """`runs/METHOD-DATA`, or the first of `-2`, `-3`, ... that does not exist."""
    data = Path(config.task.data).stem.replace(":", "-")
    base = Path("runs") / f"{config.method.name.rpartition(':')[2]}-{data}"
    n = 2
    path = base
    while path.exists():
        path = base.with_name(f"{base.name}-{n}")
        n += 1
    return path


def _go(
    run: RunDirectory, e: Experiment, observer: Observer, transport: Transport | None, accepted: list[dict[str, Any]]
) -> Result:
    t, state, client_states, done = -1, State(), ClientStates(run.checkpoint / "kept"), False
    if (run.checkpoint / "latest.json").exists():
        t, state, client_states, done = checkpoint.load(run.checkpoint)
        if t > e.config.train.rounds + 1:
            raise RunError(
                f"{run.checkpoint} is of round {t}, but the run has {e.config.train.rounds} (train.rounds): the checkpoint is "
                "another run's, or the run file was changed"
            )
    threads = e.config.engine.threads
    if threads is not None:
        torch.set_num_threads(threads)
    link = engines.connected(run, e, transport, observer.doing, observer.warning)
    with link as reached, track.tracked(run.path, e.config) as trackers:
        return _Run(run, reached, observer, client_states, accepted, trackers).go(t, state, done)


class _Run:
    """One process's part of a run."""

    def __init__(
        self,
        run: RunDirectory,
        reached: Reached,
        observer: Observer,
        client_states: ClientStates,
        accepted: list[dict[str, Any]],
        trackers: list[Any],
    ) -> None:
        self.run, self.observer, self._accepted, self.trackers = run, observer, accepted, trackers
        self.budget, e = budget.opened(run.path, reached.e)
        self.engine, self.e = engines.engine(
            run, replace(reached, e=e), client_states, self._cohort(e), self._progress, observer.doing
        )
        self.budget = site_budget.at_server(self.budget, run.path, self.engine, self.e)
        self.rounds = e.config.train.rounds
        self.radio = radio_cost.plan(e.config, [c.id for c in self.e.clients]) if e.config.network is not None else None
        self._trained = 0

    def _cohort(self, e: Experiment) -> int:
        """What the run began with, if it is resumed: who trains in one pass decides the last bits of a result."""
        began = self.run.manifest().get("cohort") if self.run.manifest_file.is_file() else None
        return began if isinstance(began, int) and e.config.engine.cohort == "auto" else e.cohort

    def _progress(self, count: int) -> None:
        self._trained += count
        self.observer.doing(f"trained {self._trained} clients of this round")

    def go(self, t: int, state: State, done: bool) -> Result:
        e, c = self.e, self.e.config
        records = self.run.rounds() if done else self.run.keep_rounds(t)
        self._manifest()
        partition.save(dict(e.partition), self.run.partition_file)
        self.observer.assembled(e)
        for record in records:
            self._tell(record)
        if self.budget is not None and not done:
            self.rounds = self.budget.last_round(max(t, 0), self.rounds)
            if self.rounds < c.train.rounds:
                self.observer.doing(f"the privacy budget ends the run after round {self.rounds} of {c.train.rounds}")
        if done:  # but for its adapters, which are missing or damaged
            return self._finish(state)
        if t < 0:
            state = e.initial_state()
            self._record(Record(0), state)
            self._save(0, state)
            t = 0
        self.observer.doing(f"round {t + 1}")
        state = federate(
            e.method,
            self.engine,
            state,
            e.clients,
            self.rounds,
            start=t + 1,
            sample=e.given.sampler or flower_server.sampler(e),
            limits=private.limits(c),
            recent_steps=[r["report"]["step_norm"] for r in records if "step_norm" in r.get("report", {})],
            on_round=self._after,
        )
        if e.method.personal_phase:
            self._personalise(state)
        return self._finish(state)

    def _finish(self, state: State) -> Result:
        """Write the adapters, then that the run is done."""
        e = self.e
        self.run.check_in_place()
        self.observer.doing("writing the adapter")
        export.write(e, e.global_model(state), self.run.adapter)
        if e.method.personal_models or e.method.personal_phase:
            self.engine.export(e.method, self._served(state, e.clients), self.rounds + 1)
        clients = {path.parent.name: digest_files(path) for path in sorted(self.run.path.glob("clients/*/adapter"))}
        for shortfall in (e.trainer.prefix and e.trainer.prefix.shortfall, e.trainer.rows_at_once.shortfall):
            if shortfall:
                self.observer.warning(shortfall)
        self._manifest(adapter=digest_files(self.run.adapter), **({"clients": clients} if clients else {}))
        self._save(self.rounds, state, done=True)
        return Result(self.run.path, self.run.rounds())

    def _save(self, t: int, state: State, done: bool = False) -> None:
        self.run.check_in_place()
        keep = self.e.config.run.keep_checkpoints
        checkpoint.save(self.run.checkpoint, t, state, self.engine.client_states, done, keep)

    def _after(self, state: State, record: Record) -> None:
        self._record(record, state)
        self._save(record.t, state)
        self._trained = 0
        if record.t < self.rounds:
            self.observer.doing(f"round {record.t + 1}")

    def _record(self, record: Record, state: State) -> None:
        """Evaluate if it is time to, and add the round's line to rounds.jsonl."""
        due = self.e.config.train.scored(record.t, self.rounds)
        scores = self._scores(state, record.t) if due else None
        self._write(record, state, scores)

    def _write(self, record: Record, state: State, scores: Scores | None) -> None:
        stats = self.engine.stats()
        train_s = stats.pop("train_s")
        network = (
            radio_cost.cost(self.radio, record, stats.get("wire"))
            if self.radio is not None and record.stage == "clients"
            else None
        )
        engine = stats if record.t > 0 else None
        spent = self.budget.spend(record, state) if self.budget is not None else None
        made = line(record, state, scores=scores, train_s=train_s, network=network, engine=engine, privacy=spent)
        self.run.append(made)
        self._tell(made)

    def _tell(self, record: dict[str, Any]) -> None:
        track.send(self.trackers, record)
        self.observer.round(record)

    def _scores(self, state: State, t: int) -> Scores:
        """Of the server's model, or the mean over clients where each has a model or rows of its own."""
        self.observer.doing("evaluating")
        own = self.e.method.personal_models
        if own or self.e.config.clients.holdout:
            return self._client_scores(state, t, own, one_by_one=t == self.rounds)
        start = time.perf_counter()
        values = evaluate.score(self.e, self.e.global_model(state))
        return Scores(values, "server", seconds=time.perf_counter() - start)

    def _client_scores(self, state: State, t: int, own: bool, one_by_one: bool) -> Scores:
        """Over the clients that are scored: of their own models, or of the server's on their rows."""
        start = time.perf_counter()
        c = self.e.config
        panel = sampling.panel(self.e.clients, c.clients.scored, c.seed)
        method = self.e.method
        common = method.serve(state, Client("server", 0, method.rank))
        served = self._served(state, panel) if own else ((client, common) for client in panel)
        each = self.engine.scores(method, served, t, common=not own)
        mean, spread = evaluate.summary({x.id: x.examples for x in panel if x.id in each}, each)
        rows = "own" if c.clients.holdout else "common"
        over = {"clients": len(each), "of": len(self.e.clients), "rows": rows, **spread}
        return Scores(mean, "clients", each if one_by_one else {}, over, time.perf_counter() - start)

    def _served(self, state: State, clients: Sequence[Client]) -> Iterator[Job]:
        """What each client is sent so that it has its own model."""
        return ((client, self.e.method.serve(state, client)) for client in clients)

    def _personalise(self, state: State) -> None:
        """The personal phase: every client trains for itself and uploads nothing. One more line in rounds.jsonl."""
        record, ids = Record(self.rounds + 1, stage="personal"), [client.id for client in self.e.clients]
        start = time.perf_counter()
        for result in in_order(self.engine.personal(self.e.method, self._served(state, self.e.clients), record.t), ids):
            if isinstance(result, Failure):
                record.dropped[result.client.id] = result.reason
                record.clients.append(result.client.id)
            elif not isinstance(result, Total):
                record.metrics[result.client.id] = result.metrics
                record.examples[result.client.id] = result.client.examples
                record.clients.append(result.client.id)
        record.seconds = time.perf_counter() - start
        self.observer.doing("evaluating the personal models")
        self._write(record, state, self._client_scores(state, record.t, own=True, one_by_one=True))

    def _manifest(self, **adapters: Any) -> None:
        """What the run is made from; at the end with the hashes of its adapters."""
        e, c = self.e, self.e.config
        self.run.write_manifest(
            {
                "seed": c.seed,
                "method": {"name": e.method.name, "paper": e.method.paper},
                "labels": e.tables.labels,
                "targets": e.targets,
                "clients": {client.id: _without_id(client.to_dict()) for client in e.clients},
                "rows": {"train": len(e.tables.train), "eval": len(e.tables.eval)},
                "cohort": self._cohort(e),
                "environment": {
                    "device": str(e.device),
                    "dtype": str(e.dtype).removeprefix("torch."),
                    **({"quantization": coded} if (coded := e.base.quantization) else {}),
                    "threads": torch.get_num_threads(),
                },
                "lora_parameters": e.parameters[1],
                "head_parameters": e.head_parameters,
                **({} if e.trainer.prefix is None else {"frozen_prefix": asdict(e.trainer.prefix)}),
                **({} if e.trainer.rows_at_once.most is None else {"scored_at_once": e.trainer.rows_at_once.most}),
                "versions": versions(*(["bitsandbytes"] if quantised.quantised(e.base.model) else [])),
                "accepted_changes": self._accepted,
                "hashes": {"config": digest_file(self.run.config_file), **e.hashes, "adapter": None, **adapters},
            }
        )


def _without_id(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "id"}


def versions(*others: str) -> dict[str, str]:
    """Of Python and the libraries that a result depends on, and of others."""
    from importlib.metadata import version

    packages = ("torch", "transformers", "peft", "datasets", "safetensors", "numpy", *others)
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
