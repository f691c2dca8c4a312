"""The run file: TOML plus dotted overrides, checked by pydantic; unknown keys are refused with the nearest known one."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from fedloom import toml
from fedloom.errors import ConfigError
from fedloom.runs.privacy_section import PrivacySection
from fedloom.runs.section import Section
from fedloom.text import shown

_LARGE = 1e30
"""Of a number that float32 must hold, squared or times another one of the run."""


class ModelSection(Section):
    """[model]: the frozen base."""

    name: str
    """Packaged name ("minilm", "smollm2"), local directory, or hub id (owner/name, owner/name@revision)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the frozen base; adapters are float32. `auto`: bfloat16 where the processor or GPU has it."""
    quantization: Literal["nf4", "nf4-double", "int8"] | None = None
    """Of the base's linear layers, the heads apart, with bitsandbytes' codes: a weight takes 4.5, 4.1 or 8 bits."""
    device: str = "auto"
    """Where it is trained: `auto` (a GPU if there is one), `cpu`, `cuda`, or one GPU of several, such as `cuda:3`."""
    attention: Literal["auto", "eager", "sdpa"] = "auto"
    """Implementation of attention, by transformers' name."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""

    @field_validator("device")
    @classmethod
    def _known(cls, device: str) -> str:
        if re.fullmatch(r"auto|split|cpu|cuda(:(0|[1-9]\d{0,3}))?", device) is None:
            raise ValueError(f"{shown(device)} is no device, expected auto, cpu, cuda, or one of several GPUs: cuda:3")
        return device


class TaskSection(Section):
    """[task]: rows, and what is learnt from them."""

    kind: Literal["classification", "regression", "causal-lm"] = "classification"
    """What the model predicts: a class, a number, or the response to a prompt."""
    data: str
    """Packaged name ("trec", ...), .jsonl/.csv/.parquet file, glue/TASK, or hub id (owner/name:config@revision#split)."""
    eval_data: str | None = None
    """As `data`; by default a seeded hold-out of it (a GLUE task's own validation split)."""
    proxy_data: str | None = None
    """Rows that the server owns, for methods that train there."""
    text: Annotated[list[str], BeforeValidator(lambda x: [x] if isinstance(x, str) else x)] | None = None
    """One or two columns; by default `text` or `sentence`."""
    label: str = "label"
    """The column of the class or the number."""
    prompt: str = "prompt"
    """causal-lm: the column of prompts."""
    response: str = "response"
    """causal-lm: the column of responses; the loss counts them alone."""
    choices: str | list[str] | None = None
    """causal-lm: a column of lists of answers, or a list for all rows; the response is then the right one's text, letter, or
    index from 0. For metrics that begin with choice."""
    messages: str | None = None
    """Instead of prompt and response, for a causal LM: a column of conversations, lists of {"role", "content"}."""
    template: str = "plain"
    """Around the prompt: "plain", "question", "alpaca", "chat", or a text with {prompt} or other columns in it. With {response}
    in it too, row and answer are tokenised as one text, and {end} behind it adds the end token."""
    max_length: int = Field(128, ge=2, le=1_000_000)
    """Tokens a row; the default is no more than the model has positions."""
    holdout: float = Field(0.1, gt=0, lt=1)
    """Share of the rows held out when there is no eval_data."""
    limit: int | None = Field(None, ge=1)
    """Use so many training rows at most."""
    eval_limit: int | None = Field(None, ge=1)
    """Use so many held-out rows at most."""
    metrics: list[str] | None = None
    """What is scored besides the loss; by default what suits the task."""
    max_new_tokens: int = Field(32, ge=1, le=100_000)
    """For metrics of a causal LM that need an answer (exact_match, rouge_l)."""

    @field_validator("kind", mode="before")
    @classmethod
    def _left_aside(cls, kind: Any) -> Any:
        if kind in ("token-classification", "seq2seq", "seq2seq-lm", "question-answering", "masked-lm"):
            raise ValueError(f"{kind} is left aside: expected classification or regression of whole rows, or causal-lm")
        return kind


class LoraSection(Section):
    """[lora]: the adapter."""

    rank: int = Field(8, ge=1)
    """Rank r of the server's A (r, in) and B (out, r)."""
    alpha: float = Field(16.0, gt=0, le=1e6)
    """The product B A is multiplied by alpha / rank."""
    targets: Literal["auto", "all-linear"] | list[str] = "auto"
    """Endings of layers' names; `auto`: those of the architecture's papers or of PEFT, else every linear layer."""
    layers: Literal["all", "upper half", "lower half"] | list[int] = "all"
    """Blocks whose layers are adapted, by name or by number from 0. Those below the first are computed once for each row."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """On the adapters' inputs."""

    @field_validator("layers", mode="before")
    @classmethod
    def _blocks(cls, layers: Any) -> Any:
        if isinstance(layers, list):
            whole = layers and all(type(i) is int and i >= 0 for i in layers) and len({*layers}) == len(layers)
        else:
            whole = layers in ("all", "upper half", "lower half")
        if not whole:
            raise ValueError(
                f"got {shown(layers)}, expected 'all', 'upper half', 'lower half', or numbers of blocks: [3, 4, 5]"
            )
        return layers


Share = Annotated[float, Field(gt=0, le=1)]


class ClientsSection(Section):
    """[clients]: who takes part, with which rows and budgets."""

    count: int | None = Field(None, ge=1, le=1_000_000)
    """4 by default; a by-field partition has one client for each value."""
    fraction: float = Field(1.0, gt=0, le=1)
    """Sampled each round."""
    partition: Literal["iid", "dirichlet", "pathological", "by-field", "by-length"] = "iid"
    """How rows are dealt to clients."""
    alpha: float = Field(0.5, ge=1e-6, le=1e6)
    """Of the Dirichlet law: smaller is more skewed."""
    field: str | None = None
    """The column that a by-field partition follows."""
    classes_per_client: int = Field(2, ge=1)
    """Of a pathological partition."""
    split_seed: int | None = Field(None, ge=0)
    """Of hold-out, limits and partition; by default the run's seed, which start, sampling and batches follow."""
    holdout: float = Field(0.0, ge=0, lt=1)
    """Share of each client's rows that it does not train on, and is scored on alone; 0: all are scored on the same rows."""
    scored: int = Field(100, ge=1)
    """Clients that are scored where each has a model or rows of its own: the same ones in every round."""
    ranks: int | list[int] | None = None
    """Cycled over the clients; by default lora.rank."""
    keep: Share | list[Share] | str = 1.0
    """Cycled over the clients, or the file of an allocation."""
    max_norm: float | None = Field(None, gt=0, le=_LARGE)
    """Drop an upload whose norm is larger."""
    max_ratio: float | None = Field(10.0, gt=1, le=_LARGE)
    """Drop an upload that moves the model so many times as far as the median client's; 0 in the file stands for no bound."""

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        # TOML has no null: 0 says that there is no bound.
        if isinstance(values, dict) and values.get("max_ratio") == 0:
            values = {**values, "max_ratio": None}
        # by-field alone takes the number of clients from the data.
        if isinstance(values, dict) and values.get("partition") != "by-field":
            return {"count": 4} | values
        return values


class MethodSection(BaseModel):
    """[method]: a name and that method's own fields; a wrapper has the table [method.over].

    A name `module:Class` imports that module, from the current folder too: such a run file runs code, as a script does.
    """

    model_config = ConfigDict(
        extra="allow", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
    name: str
    """One of `fedloom methods`, or your own as "module:Class"."""


class TrainSection(Section):
    """[train]: rounds, and local training."""

    rounds: int = Field(5, ge=0, le=1_000_000)
    """Rounds of the whole run."""
    local_steps: int | None = Field(None, ge=1, le=100_000)
    """Optimiser steps of a client in a round; or set local_epochs."""
    local_epochs: int | None = Field(None, ge=1, le=10_000)
    """Passes over a client's rows in a round; 1 if local_steps is unset too."""
    batch_size: int = Field(16, ge=1)
    """Rows of a client's step."""
    lr: float = Field(1e-3, ge=0, le=_LARGE)
    """Learning rate of local training."""
    lr_last: float | None = Field(None, ge=0, le=_LARGE)
    """Of the last round: the learning rate falls to it by a cosine over the rounds; without it, it stays."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Of local training; its moments start anew in every visit."""
    momentum: float = Field(0.0, ge=0, lt=1)
    """Of `sgd`."""
    weight_decay: float = Field(0.0, ge=0, le=1e6)
    """Decoupled, as in AdamW."""
    clip: float | None = Field(1.0, gt=0, le=_LARGE)
    """Largest norm of a client's gradient; 0 in the file stands for no limit."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Of the learning rate."""
    warmup: float = Field(0.0, ge=0, le=1)
    """Share of a client's steps over which the learning rate rises."""
    evaluate_every: int = Field(1, ge=0)
    """Rounds; the last is always evaluated. 0: only the first and the last."""
    base_dropout: bool = False
    """Train with the base's own dropout on: slower, and a client's result then depends on who trains beside it."""
    deterministic: bool = False
    """The same bytes at every run on GPUs of one kind too, where that is slower; on a processor they always are the same."""
    int8_products: bool = False
    """Multiply with the frozen layers in int8, on a processor: faster from wide models on, and rounded. Scores are not."""

    @model_validator(mode="before")
    @classmethod
    def _no_clip(cls, values: Any) -> Any:
        # TOML has no null: 0 says that there is no limit.
        return {**values, "clip": None} if isinstance(values, dict) and values.get("clip") == 0 else values

    @model_validator(mode="after")
    def _one_budget(self) -> TrainSection:
        if self.local_steps is not None and self.local_epochs is not None:
            raise ValueError("local_steps and local_epochs are both set, expected one of them")
        return self

    def scored(self, t: int, last: int) -> bool:
        """Whether the model of round t is evaluated, in a run that ends after round `last`."""
        return t in (0, last) or (self.evaluate_every > 0 and t % self.evaluate_every == 0)


class EngineSection(Section):
    """[engine]: where clients run."""

    name: Literal["inprocess", "ray", "flower"] = "inprocess"
    """`inprocess`: the simulator; `ray`: its clients trained by many workers; `flower`: across sites."""
    cohort: Literal["auto"] | int = "auto"
    """Clients trained in one pass. Results with another cohort size agree up to rounding."""
    threads: int | None = Field(None, ge=1, le=4096)
    """Of torch; by default torch's own choice, and with ray each worker's share of the cores."""
    kernels: Literal["auto", "off"] = "auto"
    """Fast paths of training where the architecture has them; `off`: the plain one, for any model."""
    prefix_gib: Literal["auto"] | Annotated[float, Field(ge=0, le=1e6)] = "auto"
    """Memory of a process for what the frozen blocks below lora.layers make of the rows; `auto`: a quarter of what is free.
    Rows without room, with 0 all, are computed anew in every step: slower, and the same numbers."""

    workers: int | None = Field(None, ge=1, le=4096)
    """ray: each holds the base once; by default one for each GPU, or two."""
    address: str | None = None
    """ray: host:port of a cluster's head, or `auto` for the one on this machine; without one, Ray is started for the run."""

    superlink: str | None = None
    """flower: host:port of a running SuperLink; without one, a deployment is started on this machine for the run."""
    root_certificates: str | None = None
    """flower: the PEM file of the authority that signed the SuperLink's certificate; without it, no TLS."""
    nodes: int | None = Field(None, ge=1, le=1024)
    """flower, on this machine: how many nodes share the clients; two by default."""
    wire: Literal["float32", "bfloat16", "int8"] = "float32"
    """flower: how float32 numbers cross. int8 is for uploads, with error feedback; what the server sends is then float32."""
    deadline_s: float = Field(600.0, gt=0, le=1e8)
    """flower: how long a round waits for answers."""
    quorum: int = Field(1, ge=1)
    """A round with fewer usable answers is not counted, and the run stops at its checkpoint."""
    oversample: float = Field(0.0, ge=0, le=100)
    """flower: ask so many more clients (0.5: half as many again) and take those that answer first."""
    patience_s: float = Field(600.0, gt=0, le=1e8)
    """flower, ray: how long the start waits for clients to announce themselves, or for workers to load the base."""

    @model_validator(mode="after")
    def _positive(self) -> EngineSection:
        if isinstance(self.cohort, int) and self.cohort < 1:
            raise ValueError(f"cohort is {self.cohort}, expected 'auto' or a number of at least 1")
        return self


class NetworkSection(Section):
    """[network]: simulated seconds and joules of every round, from the bytes that crossed and the rows trained on."""

    fleet: str
    """A fleet file, as for `fedloom allocate`; its k-th device is the k-th client."""
    allocation: str | None = None
    """Who sends on which part of the band; by default clients.keep if that names a file, else it is planned anew."""


class RunSection(Section):
    """[run]: the run directory."""

    keep_checkpoints: int = Field(2, ge=1)
    """So many of the last rounds can be gone back to: `fedloom resume RUN --round N`."""


class TrackSection(Section):
    """[track]: where the rounds are sent while the run goes on."""

    to: list[str] = Field([])
    """Trackers by accelerate's names: tensorboard, wandb, mlflow, trackio, ...; their files are below RUN/track."""
    project: str = "fedloom"
    """The project that trackers file the run under."""
    offline: bool = True
    """Nothing leaves this machine."""
    report: bool = False
    """Write RUN/report.html at the end."""


class RunConfig(Section):
    """A whole run: the keys of a run file, with their defaults."""

    seed: int = Field(0, ge=0)
    """Of every draw: the same seed gives the same bytes."""
    model: ModelSection
    task: TaskSection
    lora: LoraSection = LoraSection()
    clients: ClientsSection = ClientsSection.model_validate({})
    method: MethodSection
    train: TrainSection = TrainSection()
    engine: EngineSection = EngineSection()
    run: RunSection = RunSection()
    network: NetworkSection | None = None
    track: TrackSection = TrackSection()
    privacy: PrivacySection | None = None

    @property
    def split_seed(self) -> int:
        """Seed of hold-out, limits and partition: who has which rows."""
        return self.seed if self.clients.split_seed is None else self.clients.split_seed

    def to_toml(self) -> str:
        """The resolved configuration as a run file."""
        values = self.model_dump(exclude_none=True)
        if self.train.clip is None:
            values["train"]["clip"] = 0.0
        if self.clients.max_ratio is None:
            values["clients"]["max_ratio"] = 0.0
        return tomli_w.dumps(values)


def parse(values: Mapping[str, Any], source: str) -> RunConfig:
    """A RunConfig from nested values. Raises one ConfigError that names every wrong key of `source`."""
    return toml.validate(RunConfig, values, source)


def load(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a run file and apply `KEY=VALUE` overrides. Paths in the file are relative to where the command is run."""
    return parse(override(read_toml(path), overrides), str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """The values of a run file. Raises ConfigError if it cannot be read."""
    return toml.read_toml(
        path, missing=f"there is no run file {path}; without one, `fedloom run` runs the packaged quickstart"
    )


def override(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Apply `section.key=value` strings; a value is TOML, or else taken as text.

    >>> override({"train": {"rounds": 5}}, ["train.rounds=2", "method.name=fedit"])
    {'train': {'rounds': 2}, 'method': {'name': 'fedit'}}
    """
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not all(key.strip().split(".")):
            raise ConfigError(f"--set got {shown(text)}, expected KEY=VALUE with a dotted key such as train.rounds=5")
        put(values, key.strip(), _value(text, value))
    return values


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested values. Raises ConfigError if it leads through something that is no section."""
    *sections, last = key.split(".")
    into = values
    for part in sections:
        into = into.setdefault(part, {})
        if not isinstance(into, dict):
            raise ConfigError(f"{shown(key)} cannot be set: {shown(part)} is {shown(into)} there, expected a section")
    if last == "name" and sections[:1] == ["method"] and into.get("name") != value:
        into.clear()  # another method's fields do not carry over, nor the method under it
    into[last] = value


def _value(text: str, value: str) -> Any:
    try:
        parsed = tomllib.loads(f"x = {value}")
    except tomllib.TOMLDecodeError:
        return value
    except (ValueError, RecursionError):
        raise ConfigError(f"--set {shown(text)}: the value has thousands of digits or of brackets") from None
    return parsed["x"] if len(parsed) == 1 else value  # a line break would begin another key
