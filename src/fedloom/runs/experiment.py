"""An experiment: everything that a run works with, made once from its configuration and never changed.

RunConfig ──plan──► Plan ──tables, partition──► clients ──load──► base model ──adapt──► Experiment
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedloom import sampling
from fedloom.client import Client
from fedloom.core import Method, Visit, Work
from fedloom.data import load, partition
from fedloom.data.metrics import NEEDS_TEXT
from fedloom.data.tokenize import Encoded
from fedloom.errors import ConfigError, ModelError
from fedloom.flows import rehearse
from fedloom.models import huggingface, identity, quantised
from fedloom.models.blocks import below
from fedloom.models.dtypes import auto_dtype
from fedloom.models.usable import row_length
from fedloom.rng import generator
from fedloom.runs import memory, private
from fedloom.runs.adapted import adapted
from fedloom.runs.config import RunConfig
from fedloom.runs.given import GIVEN, Given
from fedloom.runs.plan import Plan, plan
from fedloom.runs.tables import Tables, tables
from fedloom.runs.token_rows import Rows
from fedloom.state import Sites, State
from fedloom.train.optim import Settings
from fedloom.train.trainer import Scorer, Trainer


@dataclass(frozen=True)
class Elsewhere:
    """Workers in other processes, which train and score in this one's place."""

    workers: int
    free: int | None
    """Bytes that training may take at each."""
    scorer: Scorer


@dataclass(frozen=True)
class Experiment:
    """A run's method, data, clients and model. `replace` gives one with other clients."""

    plan: Plan
    tables: Tables
    partition: Mapping[str, list[int]]
    """Client id -> rows of the training table that it trains on."""
    clients: list[Client]
    base: huggingface.Base
    targets: list[str]
    sites: Sites
    together: bool
    """Whether clients can train in one pass: not where an adapted layer reads what all rows share, as in DeBERTa-v3."""
    head: State
    """The task head as the model has it, under role `head` (empty for a causal LM)."""
    transposed: bool
    """Whether the adapted layers keep their weight as (in, out): GPT-2's Conv1D."""
    device: torch.device
    dtype: torch.dtype
    """Of the frozen base."""
    trainer: Trainer
    rows: Rows
    given: Given = field(default_factory=Given)
    """What the caller handed over in Python."""
    elsewhere: Elsewhere | None = None
    held_out: Mapping[str, list[int]] = field(default_factory=dict)
    """Client id -> rows of the training table that it is scored on; empty where all are scored on the same rows."""

    @property
    def config(self) -> RunConfig:
        return self.plan.config

    @property
    def method(self) -> Method:
        return self.plan.method

    @property
    def server(self) -> Client | None:
        """The server as a client that trains on its own proxy data, if it has any."""
        rows = self.tables.proxy
        return None if rows is None else Client("server", len(rows), self.method.rank)

    def initial_state(self) -> State:
        """The server's first state, head included: a function of the seed and the frozen weights."""

        def weight(site: str) -> Tensor:
            return quantised.dense(self.base.model.get_submodule(site))

        return self.method.init_from(self.sites, generator(self.config.seed, "init"), weight) | self.head

    def global_model(self, state: State) -> Work:
        """The server's model, as work that trains nothing: what a client that keeps nothing uses."""
        asking = Client("server", 0, self.method.rank)
        return self.method.model(self.method.serve(state, asking), self.head, Visit(0, asking, self.sites))

    @cached_property
    def parameters(self) -> tuple[int, int]:
        """Of the adapter, without a head: (trained, sent) by a client with whole budgets in the first round."""
        seen = rehearse(private.bare(self.config, self.method), Client("any", 1, self.method.rank), 1, self.sites)
        if seen is None:
            return 0, 0

        def count(state: State) -> int:
            return sum(x.numel() for role, group in state.items() if role != "head" for x in group.values())

        return count({} if seen.work is None else seen.work.train), count(seen.sent)

    @property
    def head_parameters(self) -> int:
        """Of the task head; 0 for a causal LM."""
        return sum(x.numel() for group in self.head.values() for x in group.values())

    def rows_of(self, client: str) -> Encoded:
        """The training rows of one client; the proxy rows of the server."""
        if client == "server":
            assert self.rows.proxy is not None
            return self.rows.proxy
        rows, planted = self.partition[client], self.rows.canaries
        return self.rows.train.select(rows if planted is None else [i for i in rows if i not in planted.left_out])

    @cached_property
    def cohort(self) -> int:
        """How many clients train in one pass: as memory and processor allow, where nobody says, and so that no worker idles."""
        if not self.together:
            return 1
        asked = self.config.engine.cohort
        if asked != "auto":
            return asked
        size = quantised.parameters(self.base.model)
        tokens = self.config.train.batch_size * max(1.0, float(self.rows.train.lengths.mean()))
        if (at := self.elsewhere) is None:
            return memory.cohort(self.memory, size, tokens, self.device, memory.free(self.device))
        share = math.ceil(sampling.count(self.config.clients.fraction, len(self.clients)) / at.workers)
        return min(share, memory.cohort(self.memory, size, tokens, self.device, at.free))

    @cached_property
    def memory(self) -> memory.Memory:
        """What training takes, for a step of the longest rows."""
        batch, rows = self.config.train.batch_size, self.rows.train
        longest = np.sort(rows.lengths)[-batch:]
        tokens = int(longest.max() * len(longest))
        return memory.memory(
            self.base.model,
            self.dtype,
            tokens=tokens,
            answers=tokens if rows.kind == "causal-lm" else 0,
            trained=self.parameters[0] + self.head_parameters,
            checkpointing=self.config.model.checkpointing,
            frozen=below(self.base.model, self.sites),
            int8_products=self.config.train.int8_products,
        )

    @cached_property
    def hashes(self) -> dict[str, Any]:
        """What the run was made from. Reads every row: once a process is enough."""
        found = {
            "model": self.base.sha256,
            "model_config": identity.config_sha256(self.base.model.config),
            "tokenizer": identity.tokenizer_sha256(self.base.tokenizer),
            "data": load.fingerprint(self.tables.train),
            "eval_data": load.fingerprint(self.tables.eval),
            "partition": partition.digest(dict(self.partition)),
        }
        if self.tables.proxy is not None:
            found["proxy_data"] = load.fingerprint(self.tables.proxy)
        return found


def experiment(
    config: RunConfig | Plan,
    on_status: Callable[[str], None] = lambda what: None,
    *,
    table: Tables | None = None,
    base: huggingface.Base | None = None,
    only_client: str | None = None,
    given: Given | None = None,
    device: torch.device | None = None,
) -> Experiment:
    """Make an experiment: read the data, load the model, put its adapters in place.

    `table` and `base` are used instead of being read and loaded, as is what is `given`; `only_client` gives all rows to one
    client of that id. `device` stands for the configuration's, of a process that does not train.
    Raises ConfigError, DataError, ModelError or HubError for what is wrong, and writes nothing.
    """
    planned = plan(config) if isinstance(config, RunConfig) else config
    c = planned.config
    device = device or device_of(c)
    dtype = dtype_of(c, device)
    on_status("reading the data")
    given = given or Given()
    table = table or tables(c, given)
    parts = _partition(c, table) if only_client is None else {only_client: list(range(len(table.train)))}
    held_out: partition.Partition = {}
    if c.clients.holdout:
        parts, held_out = partition.hold_out(parts, c.clients.holdout, c.split_seed)
    on_status("loading the model")
    labels = max(1, len(table.labels))
    base = base or _given_base(c, given, labels) or base_of(c, labels, device, dtype, on_status)
    clients = planned.clients(parts)
    if only_client is None and (c.engine.superlink is None or (c.privacy is not None and c.privacy.unit != "example")):
        private.check_clients(c, clients)  # rows that protect nobody here are checked where they are
    targets, sites = adapted(c.lora, base.model)
    together = huggingface.check_sites(base.model, sites)
    huggingface.check_rank(sites, planned.method.rank)
    head = dict(base.head_weights)
    layers = [base.model.get_submodule(site) for site in sites]
    transposed = any(huggingface.is_conv1d(x) or getattr(x, "turned", False) for x in layers)
    return Experiment(
        plan=planned,
        tables=table,
        partition=parts,
        clients=clients,
        base=base,
        targets=targets,
        sites=sites,
        together=together,
        head={"head": head} if head else {},
        transposed=transposed,
        device=device,
        dtype=dtype,
        trainer=trainer_of(c, base, sites, device, dtype),
        rows=Rows(c, table, base.tokenizer, _row_length(c, table, base)),
        given=given,
        held_out=held_out,
    )


def with_clients(made: Experiment, clients: list[Client]) -> Experiment:
    """The experiment with the clients that announced themselves. Raises ConfigError if the method cannot follow them."""
    for client in clients:
        made.method.check(client)
    private.check_clients(made.config, clients)
    return replace(made, clients=clients)


def device_of(config: RunConfig) -> torch.device:
    """Where the model computes. Raises ConfigError if it is not there."""
    name = config.model.device
    if name in ("auto", "split"):
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"model.device is {name!r}, but torch sees no GPU: set it to 'auto' or 'cpu'")
    if device.index is not None and device.index >= (count := torch.cuda.device_count()):
        raise ConfigError(
            f"model.device is {name!r}, but torch sees {count} GPUs, cuda:0 to cuda:{count - 1}: set it to one of them"
        )
    return device


def dtype_of(config: RunConfig, device: torch.device) -> torch.dtype:
    """Of the frozen base on this device."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(config.model.dtype) or auto_dtype(device)


def _given_base(config: RunConfig, given: Given, labels: int) -> huggingface.Base | None:
    """The base that the caller made, if any."""
    if given.model is None:
        if config.model.name == GIVEN:
            raise ModelError(
                "the model of this run was given in Python: give it to fedloom.resume, too (model=..., tokenizer=...)"
            )
        return None
    if config.model.quantization is not None:
        raise ConfigError(
            "model.quantization is set, but the model was given in Python: load it quantised, and remove it"
        )
    return huggingface.adopt(given.model, given.tokenizer, kind=config.task.kind, num_labels=labels)


def base_of(
    config: RunConfig,
    labels: int,
    device: torch.device,
    dtype: torch.dtype,
    on_status: Callable[[str], None] = lambda what: None,
) -> huggingface.Base:
    """The base model that the configuration names, with a head of so many labels."""
    return huggingface.load_base(
        config.model.name,
        kind=config.task.kind,
        num_labels=labels,
        dtype=dtype,
        device=device,
        split=config.model.device == "split",
        seed=config.seed,
        quantization=config.model.quantization,
        on_status=on_status,
    )


def _partition(config: RunConfig, table: Tables) -> dict[str, list[int]]:
    c, task = config.clients, config.task
    return partition.partition(
        table.train,
        c.count,
        c.partition,
        seed=config.split_seed,
        alpha=c.alpha,
        field=c.field or (table.text[0] if c.partition == "by-length" else None),
        label=task.label if task.kind == "classification" else None,
        classes_per_client=c.classes_per_client,
    )


def _row_length(config: RunConfig, table: Tables, base: huggingface.Base) -> int:
    task = config.task
    answer = task.max_new_tokens if NEEDS_TEXT & {*table.metrics} else 0
    # The default asks for no length: a resolved run file has it too.
    asked = task.max_length != type(task).model_fields["max_length"].default
    return row_length(task.max_length, asked, answer, base.model)


def trainer_of(
    config: RunConfig, base: huggingface.Base, sites: Iterable[str], device: torch.device, dtype: torch.dtype
) -> Trainer:
    """The trainer, which adapts the base in place."""
    # Settings are named as the keys of [train]; the rest of its keys are the run's.
    settings = {
        name: value for name, value in config.train.model_dump().items() if name in Settings.__dataclass_fields__
    }
    return Trainer(
        base.model,
        list(sites),
        list(base.head),
        settings=Settings(
            **settings, seed=config.seed, dropout=config.lora.dropout, checkpointing=config.model.checkpointing
        ),
        device=device,
        dtype=dtype,
        attention=config.model.attention,
        kernels=config.engine.kernels,
        prefix_bytes=memory.prefix_bytes(config.engine, device),
    )
