"""Options of a run file that would be ignored or could never be met: a run that is not the one asked for is not begun.

Only values that differ from their defaults count: the run.toml of a run directory names every default.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel

from fedloom import sampling
from fedloom.data import choices
from fedloom.data.metrics import NEEDS_TEXT
from fedloom.errors import ConfigError
from fedloom.runs.config import RunConfig
from fedloom.runs.plan import Plan
from fedloom.text import shown
from fedloom.toml import itemised


def refuse_contradictions(planned: Plan, engine: str) -> None:
    """Raise one ConfigError that names every option that this run could not follow with an engine, by its name."""
    c = planned.config
    found = [*_task(c), *_clients(c), *_train(c), *_engine(c, engine)]
    if c.task.proxy_data is not None and not planned.method.needs_proxy_data:
        found.append(f"task.proxy_data is set, but {planned.method.name} never trains on the server: remove it")
    if c.clients.count is not None:
        found += _too_many(c, c.clients.count)
    if found:
        raise ConfigError(f"options that this run cannot follow: {itemised(found)}")


def refuse_too_many(config: RunConfig, clients: int) -> None:
    """Raise one ConfigError for a quorum that no round can have, and for budgets of more clients than there are."""
    if found := list(_too_many(config, clients)):
        raise ConfigError(itemised(found))


def _too_many(config: RunConfig, clients: int) -> Iterator[str]:
    asked = sampling.count(config.clients.fraction, clients)
    if config.engine.quorum > asked:
        yield f"engine.quorum is {config.engine.quorum}, but a round asks {asked} of {clients} clients: lower it"
    for key in ("ranks", "keep"):
        values = getattr(config.clients, key)
        if isinstance(values, list) and len(values) > clients:
            yield f"clients.{key} has {len(values)} values, expected at most one for each of {clients} clients"


def _set(section: BaseModel, *keys: str) -> Iterator[tuple[str, str]]:
    """(key, value in words) of the options that differ from their defaults."""
    for key in keys:
        value = getattr(section, key)
        if value != type(section).model_fields[key].default:
            yield key, shown(value)


def _unused(name: str, section: BaseModel, why: str, *keys: str, instead: str = "remove it") -> Iterator[str]:
    for key, value in _set(section, *keys):
        yield f"{name}.{key} is {value}, but {why}: {instead}"


def _task(c: RunConfig) -> Iterator[str]:
    task = c.task
    if task.kind == "causal-lm":
        yield from _unused("task", task, "a causal LM has task.prompt and task.response", "text", "label")
        if task.messages is not None:
            why = "task.messages has whole conversations, in the model's own template"
            yield from _unused("task", task, why, "prompt", "response", "template")
        asked = {*(task.metrics or [])} & {*choices.METRICS}
        if asked and task.choices is None:
            yield f"task.metrics has {', '.join(sorted(asked))}, but task.choices is not set: name a column, or list them"
        if task.messages is not None and task.choices is not None:
            yield "task.choices is set, but task.messages has whole conversations: remove one of them"
        if not NEEDS_TEXT & {*(task.metrics or [])}:
            why = f"none of task.metrics needs a written answer ({', '.join(sorted(NEEDS_TEXT))})"
            yield from _unused("task", task, why, "max_new_tokens")
    else:
        why = f"a {task.kind} has task.text and task.label"
        yield from _unused("task", task, why, "prompt", "response", "choices", "messages", "template", "max_new_tokens")


def _clients(c: RunConfig) -> Iterator[str]:
    clients = c.clients
    readers = {
        "alpha": ["dirichlet"],
        "field": ["by-field", "by-length"],
        "classes_per_client": ["pathological"],
    }
    for key, partitions in readers.items():
        if clients.partition not in partitions:
            why = f"clients.partition is {clients.partition!r}, not {' or '.join(map(repr, partitions))}"
            yield from _unused("clients", clients, why, key)
    if clients.holdout and c.privacy is not None:
        if c.privacy.secure_aggregation:
            yield (
                f"clients.holdout is {clients.holdout:g}, but no client's own scores are told under secure_aggregation: remove "
                "one of them"
            )
        if c.privacy.canaries:
            yield (
                f"clients.holdout is {clients.holdout:g}, but canaries are planted among all rows: set privacy.canaries = 0, "
                "or remove it"
            )


def _train(c: RunConfig) -> Iterator[str]:
    if c.model.device == "split":
        yield (
            "model.device is 'split', but training uses one device, on which the base must fit: set it to 'auto' or one GPU "
            "('cuda:0'); over several a run is evaluated alone, by `fedloom evaluate RUN --device split`"
        )
    if c.train.int8_products and c.model.quantization is not None:
        yield (
            f"train.int8_products is true, but model.quantization is {c.model.quantization!r}, whose codes are made "
            "dense for every product: choose one of both"
        )
    if c.train.optimizer == "adamw":
        yield from _unused("train", c.train, "train.optimizer is 'adamw', not 'sgd'", "momentum")


READERS = {
    **{key: ["flower"] for key in ("superlink", "root_certificates", "nodes", "wire", "deadline_s", "oversample")},
    **{key: ["ray"] for key in ("workers", "address")},
    "patience_s": ["flower", "ray"],
}
"""Keys of [engine] that some engines alone read."""


def _engine(c: RunConfig, name: str) -> Iterator[str]:
    engine = c.engine
    if c.privacy is not None and c.privacy.roster is not None:
        if not c.privacy.secure_aggregation:
            yield "privacy.roster is set without secure_aggregation, whose keys it is of: remove it, or set that to true"
        elif engine.superlink is None:
            yield "privacy.roster is set, but all clients are on this machine: remove it, or start the run with `fedloom serve`"
    where = "in this process" if name == "inprocess" else f"by engine.name = {name!r}"
    for key, readers in READERS.items():
        if name not in readers:
            instead = f"remove it, or set engine.name = {' or '.join(map(repr, readers))}"
            yield from _unused("engine", engine, f"clients are trained {where}", key, instead=instead)
    if name == "ray" and c.model.device.startswith("cuda:"):
        yield f"model.device is {c.model.device!r}, but Ray gives each worker a GPU of its own: set it to 'cuda'"
    if name != "flower":
        return
    if engine.cohort not in ("auto", 1):
        yield f"engine.cohort is {engine.cohort}, but a node trains one client at a time: remove it"
    if engine.superlink is not None:
        yield from _unused("engine", engine, "the nodes of engine.superlink are there already", "nodes")
    else:
        why = "without engine.superlink a deployment is started on this machine"
        yield from _unused("engine", engine, why, "root_certificates")
