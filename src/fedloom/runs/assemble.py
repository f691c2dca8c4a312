"""From a configuration to its parts: model, data, partition, clients, method, trainer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from fedloom import methods
from fedloom.checkpoint import disk_errors
from fedloom.core import Client, Method, Sites, State
from fedloom.data import load, metrics, partition
from fedloom.data.glue import glue_fields, is_glue
from fedloom.data.tokenize import Encoded, encode_causal, encode_labelled, labels_of
from fedloom.errors import ConfigError, DataError
from fedloom.models import huggingface, peft
from fedloom.rng import generator
from fedloom.runs.config import RunConfig
from fedloom.train.optim import Settings
from fedloom.train.trainer import Trainer

if TYPE_CHECKING:
    from datasets import Dataset

T = TypeVar("T")

TOKENS_AT_ONCE = 4096
"""What one pass over the base holds with cohort = "auto": enough to fill a processor, little enough for its memory."""


@dataclass(frozen=True)
class Tables:
    """The rows of a run, before tokenisation."""

    train: Dataset
    eval: Dataset
    proxy: Dataset | None
    text: list[str]
    labels: list[str]
    metrics: list[str]


def tables(config: RunConfig) -> Tables:
    """Load, check, hold out and limit the rows that a run asks for."""
    task = config.task
    glue = glue_fields(task.data) if is_glue(task.data) else None
    train = read(task.data)
    held_out = None
    if task.eval_data is not None:
        held_out = read(task.eval_data)
    elif glue:
        held_out = load.load(task.data, split="validation")
    if task.kind == "causal-lm":
        text, columns = [task.prompt], [task.prompt, task.response]
    else:
        text = task.text or (glue[0] if glue else _text_column(train))
        columns = [*text, task.label]
    load.require(train, columns)
    # Of the whole table: a class with few rows may be absent from a limited sample of it.
    labels = labels_of(train, task.label) if task.kind == "classification" else []
    if held_out is None:
        stratify = task.label if task.kind == "classification" else None
        train, held_out = load.split(train, task.holdout, config.seed, stratify)
    else:
        load.require(held_out, columns)
    if task.limit is not None and task.limit < len(train):
        train = _first(train, task.limit, config.seed, "train")
    if task.eval_limit is not None and task.eval_limit < len(held_out):
        held_out = _first(held_out, task.eval_limit, config.seed, "eval")
    proxy = None
    if task.proxy_data is not None:
        proxy = read(task.proxy_data)
        load.require(proxy, columns)
    names = task.metrics or metrics.default_metrics(task.kind, task.data)
    return Tables(train, held_out, proxy, text, labels, names)


def read(source: str) -> Dataset:
    """Rows of a data source; `NAME@SPLIT` asks for another split of a hub data set than train."""
    name, at, split = source.rpartition("@")
    return load.load(name, split) if at and not Path(source).exists() else load.load(source)


def _text_column(train: Dataset) -> list[str]:
    for name in ("text", "sentence", "question"):
        if name in train.column_names:
            return [name]
    raise DataError(f"no column named text, sentence or question in {train.column_names}: name it, task.text = [...]")


def _first(rows: Dataset, count: int, seed: int, purpose: str) -> Dataset:
    """A seeded sample, in a seeded order."""
    order = torch.randperm(len(rows), generator=generator(seed, "limit", purpose))
    return rows.select(order[:count].tolist())


class Parts:
    """Everything a run needs, made once from its configuration. The model is loaded when first asked for."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        fields = config.method.model_dump(exclude={"name"})
        shared = {"rank": config.lora.rank, "alpha": config.lora.alpha, "rslora": config.lora.rslora}
        # Before anything slow: a wrong method, field or budget should be told at once.
        self.method: Method = methods.build(config.method.name, **(shared | fields))
        if config.lora.rank != self.method.rank:
            raise ConfigError(f"method.rank is {self.method.rank}: set the rank in [lora]")
        self._ranks = _cycle(config.clients.ranks if config.clients.ranks is not None else config.lora.rank)
        self._keep = _keep(config)
        for i in range(max(len(self._ranks), len(self._keep))):
            self.method.check(Client("any", 1, self._ranks[i % len(self._ranks)], self._keep[i % len(self._keep)]))
        if self.method.stage(2) == "server" and config.task.proxy_data is None:
            raise ConfigError(f"{self.method.name} trains on the server in some rounds: name its rows, task.proxy_data")

    @cached_property
    def tables(self) -> Tables:
        return tables(self.config)

    @cached_property
    def partition(self) -> dict[str, list[int]]:
        """Client id -> rows of the training table."""
        c, task = self.config.clients, self.config.task
        return partition.partition(
            self.tables.train,
            c.count,
            c.partition,
            seed=self.config.seed,
            alpha=c.alpha,
            field=c.field or (self.tables.text[0] if c.partition == "by-length" else None),
            label=task.label if task.kind == "classification" else None,
            classes_per_client=c.classes_per_client,
        )

    @cached_property
    def clients(self) -> list[Client]:
        """The clients, with their budgets: cycled in the order of their ids."""
        return [
            Client(key, len(rows), self._ranks[i % len(self._ranks)], self._keep[i % len(self._keep)])
            for i, (key, rows) in enumerate(sorted(self.partition.items()))
        ]

    @cached_property
    def server(self) -> Client | None:
        """The server as a client that trains on its own proxy data, if it has any."""
        rows = self.tables.proxy
        return None if rows is None else Client("server", len(rows), self.method.rank)

    @cached_property
    def evaluator(self) -> Client:
        """Who asks for the global model."""
        return Client("server", 0, self.method.rank)

    @cached_property
    def device(self) -> torch.device:
        name = self.config.model.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda" and not torch.cuda.is_available():
            raise ConfigError("model.device is 'cuda', but torch sees no GPU: set it to 'auto' or 'cpu'")
        return torch.device(name)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the frozen base."""
        known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
        return known.get(self.config.model.dtype) or huggingface.auto_dtype(self.device)

    @cached_property
    def base(self) -> huggingface.Base:
        return huggingface.load_base(
            self.config.model.name,
            kind=self.config.task.kind,
            num_labels=max(1, len(self.tables.labels)),
            seed=self.config.seed,
        )

    @cached_property
    def targets(self) -> list[str]:
        t = self.config.lora.targets
        return huggingface.default_targets(self.base.model) if t == "auto" else list(t)

    @cached_property
    def sites(self) -> Sites:
        sites = huggingface.find_sites(self.base.model, self.targets)
        huggingface.check_rank(sites, self.method.rank)
        return sites

    @cached_property
    def head(self) -> State:
        """The task head as the model has it, under role `head` (empty for a causal LM)."""
        group = peft.head_group(self.base.model)
        return {"head": group} if group else {}

    @cached_property
    def transposed(self) -> bool:
        """Whether the adapted layers keep their weight as (in, out): GPT-2's Conv1D."""
        return any(huggingface.is_conv1d(self.base.model.get_submodule(site)) for site in self.sites)

    @cached_property
    def trainer(self) -> Trainer:
        c = self.config
        _ = self.head, self.sites, self.transposed  # read before the model is adapted in place
        return Trainer(
            self.base.model,
            list(self.sites),
            list(self.base.head),
            settings=Settings(
                optimizer=c.train.optimizer,
                lr=c.train.lr,
                weight_decay=c.train.weight_decay,
                clip=c.train.clip,
                momentum=c.train.momentum,
                schedule=c.train.schedule,
                warmup=c.train.warmup,
                batch_size=c.train.batch_size,
                steps=c.train.local_steps,
                epochs=c.train.local_epochs,
                seed=c.seed,
                dropout=c.lora.dropout,
                base_dropout=c.train.base_dropout,
                checkpointing=c.model.checkpointing,
            ),
            device=self.device,
            dtype=self.dtype,
            attention=c.model.attention,
        )

    def initial_state(self) -> State:
        """The server's first state, head included: a function of the seed alone."""
        return self.method.init(self.sites, generator(self.config.seed, "init")) | self.head

    # token rows

    def _encode(self, rows: Dataset) -> Encoded:
        task, tokenizer = self.config.task, self.base.tokenizer
        if task.kind == "causal-lm":
            return encode_causal(rows, tokenizer, task.prompt, task.response, task.template, task.max_length)
        labels = self.tables.labels or None
        return encode_labelled(rows, tokenizer, self.tables.text, task.label, labels, task.max_length, task.kind)

    @cached_property
    def train_rows(self) -> Encoded:
        return self._encode(self.tables.train)

    @cached_property
    def eval_rows(self) -> Encoded:
        return self._encode(self.tables.eval)

    @cached_property
    def proxy_rows(self) -> Encoded | None:
        return None if self.tables.proxy is None else self._encode(self.tables.proxy)

    def rows_of(self, client: str) -> Encoded:
        """The training rows of one client; the proxy rows of the server."""
        if client == "server":
            assert self.proxy_rows is not None
            return self.proxy_rows
        return self.train_rows.select(self.partition[client])

    @cached_property
    def cohort(self) -> int:
        """How many clients train in one pass."""
        asked = self.config.engine.cohort
        if asked != "auto":
            return asked
        lengths = self.train_rows.lengths
        tokens = self.config.train.batch_size * max(1.0, float(lengths.mean()))
        return max(1, min(32, int(TOKENS_AT_ONCE / tokens)))

    @cached_property
    def hashes(self) -> dict[str, Any]:
        """What the run was made from. Reads every row: once a process is enough."""
        found = {
            "model": self.base.sha256,
            "data": load.fingerprint(self.tables.train),
            "eval_data": load.fingerprint(self.tables.eval),
            "partition": partition.digest(self.partition),
        }
        if self.tables.proxy is not None:
            found["proxy_data"] = load.fingerprint(self.tables.proxy)
        return found


def _cycle(value: T | list[T]) -> list[T]:
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ConfigError("clients.ranks or clients.keep is an empty list, expected at least one budget")
    return values


def _keep(config: RunConfig) -> list[float]:
    keep = config.clients.keep
    if not isinstance(keep, str):
        return [float(x) for x in _cycle(keep)]
    path = Path(keep)
    try:
        rates: dict[str, float] = json.loads(path.read_text())["keep"]
    except FileNotFoundError:
        raise ConfigError(
            f"clients.keep names the allocation {keep!r}, which does not exist: make it with "
            f"`fedloom allocate FLEET.toml --out {keep}`"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"clients.keep: {keep!r} is no allocation ({error}), expected JSON with a table keep"
        ) from None
    if config.clients.count is not None and len(rates) != config.clients.count:
        raise ConfigError(
            f"clients.keep: {keep!r} plans {len(rates)} devices, expected {config.clients.count} (clients.count)"
        )
    return list(rates.values())


def absolute(config: RunConfig) -> RunConfig:
    """The configuration with local files and directories as absolute paths, so that a run can be resumed from anywhere."""

    def resolve(name: str | None) -> str | None:
        if name is None:
            return None
        with disk_errors(Path(name)):
            return str(Path(name).resolve()) if Path(name).exists() else name

    values = config.model_dump()
    values["model"]["name"] = resolve(config.model.name)
    for key in ("data", "eval_data", "proxy_data"):
        values["task"][key] = resolve(values["task"][key])
    if isinstance(config.clients.keep, str):
        values["clients"]["keep"] = resolve(config.clients.keep)
    if config.network is not None:
        values["network"] = {key: resolve(name) for key, name in values["network"].items()}
    return RunConfig.model_validate(values)
