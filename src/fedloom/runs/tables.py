"""The rows of a run, before tokenisation: loaded, checked, held out and limited."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fedloom.data import chat, choices, load, metrics, templates
from fedloom.data.choices import Choices
from fedloom.data.glue import glue_fields, is_glue
from fedloom.data.tokenize import labels_of
from fedloom.errors import DataError
from fedloom.rng import generator
from fedloom.runs.config import RunConfig, TaskSection
from fedloom.runs.given import GIVEN, Given

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Tables:
    """The rows of a run."""

    train: Dataset
    eval: Dataset
    proxy: Dataset | None
    text: list[str]
    """Columns of text, or the prompt's."""
    labels: list[str]
    """Class names in sorted order; none unless it is a classification."""
    metrics: list[str]
    chats: bool = False
    """Whether `text` is a column of conversations."""
    choices: Choices | None = None
    """The answers that held-out rows choose from, if task.choices has any."""


def tables(config: RunConfig, given: Given | None = None) -> Tables:
    """Load, check, hold out and limit the rows that a run asks for. Rows given stand for those that the configuration names."""
    task = config.task
    given = given or Given()
    glue = glue_fields(task.data) if is_glue(task.data) else None
    train = read(task.data) if given.train is None else given.train
    held_out = given.eval
    if held_out is None and task.eval_data is not None:
        held_out = read(task.eval_data)
    elif held_out is None and glue:
        held_out = load.load(task.data.partition("#")[0], split="validation")
    chats = _chats(task, train) if task.kind == "causal-lm" else None
    if chats is not None:
        text, columns = [chats], []
    elif task.kind == "causal-lm":
        text = _prompt_columns(task)
        columns = [*text, task.response]
    else:
        text = task.text or (glue[0] if glue else _text_column(train))
        columns = [*text, task.label]
    _require(train, columns, chats)
    # Of the whole table: a class with few rows may be absent from a limited sample of it.
    labels = labels_of(train, task.label) if task.kind == "classification" else []
    if held_out is None:
        stratify = given.column or (task.label if task.kind == "classification" else None)
        train, held_out = load.split(train, task.holdout, config.split_seed, stratify)
    else:
        _require(held_out, columns, chats)
    train = _first(train, task.limit, config.split_seed, "train")
    held_out = _first(held_out, task.eval_limit, config.split_seed, "eval")
    proxy = None
    if task.proxy_data is not None:
        proxy = read(task.proxy_data)
        _require(proxy, columns, chats)
    names = task.metrics or metrics.default_metrics(task.kind, task.data)
    metrics.check(names, task.kind, len(labels) if labels else None)
    found = None
    if task.choices is not None:
        found = choices.flat(held_out, task.response, task.choices)
        train, held_out = (choices.with_answers(rows, task.response, task.choices) for rows in (train, held_out))
        proxy = proxy and choices.with_answers(proxy, task.response, task.choices)
    return Tables(train, held_out, proxy, text, labels, names, chats is not None, found)


def read(source: str) -> Dataset:
    """Rows of a data source. Raises DataError for rows that were given in Python and are not there now."""
    if source == GIVEN:
        raise DataError(
            "the rows of this run were given in Python: give them to fedloom.resume, too (data=..., eval_data=...)"
        )
    return load.load(source)


def _chats(task: TaskSection, train: Dataset) -> str | None:
    """The column of conversations, if there is one: the one named, or `messages` where there are no prompts."""
    asked = task.messages is not None or task.prompt in train.column_names or task.choices is not None
    if asked or "messages" not in train.column_names:
        return task.messages
    return "messages"


def _prompt_columns(task: TaskSection) -> list[str]:
    """The columns that a prompt is made from."""
    return [task.prompt] if task.template == templates.CHAT else templates.read(task.template).columns(task.prompt)


def _require(rows: Dataset, columns: list[str], chats: str | None) -> None:
    load.require(rows, columns)
    if chats is not None:
        chat.require_chats(rows, chats)


def _text_column(train: Dataset) -> list[str]:
    for name in ("text", "sentence", "question"):
        if name in train.column_names:
            return [name]
    raise DataError(f"no column named text, sentence or question in {train.column_names}: name it, task.text = [...]")


def _first(rows: Dataset, count: int | None, seed: int, purpose: str) -> Dataset:
    """A seeded sample, in a seeded order, where there are more rows than that."""
    if count is None or count >= len(rows):
        return rows
    order = torch.randperm(len(rows), generator=generator(seed, "limit", purpose))
    return rows.select(order[:count].tolist())
