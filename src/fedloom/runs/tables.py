"""The rows of a run, before tokenisation: loaded, checked, held out and limited."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fedloom.data import load, metrics
from fedloom.data.glue import glue_fields, is_glue
from fedloom.data.tokenize import labels_of
from fedloom.errors import DataError
from fedloom.rng import generator
from fedloom.runs.config import RunConfig

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
        train, held_out = load.split(train, task.holdout, config.split_seed, stratify)
    else:
        load.require(held_out, columns)
    train = _first(train, task.limit, config.split_seed, "train")
    held_out = _first(held_out, task.eval_limit, config.split_seed, "eval")
    proxy = None
    if task.proxy_data is not None:
        proxy = read(task.proxy_data)
        load.require(proxy, columns)
    names = task.metrics or metrics.default_metrics(task.kind, task.data)
    metrics.check(names, task.kind, len(labels) if labels else None)
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


def _first(rows: Dataset, count: int | None, seed: int, purpose: str) -> Dataset:
    """A seeded sample, in a seeded order, where there are more rows than that."""
    if count is None or count >= len(rows):
        return rows
    order = torch.randperm(len(rows), generator=generator(seed, "limit", purpose))
    return rows.select(order[:count].tolist())
