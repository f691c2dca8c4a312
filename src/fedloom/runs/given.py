"""What a caller hands over in Python, in place of what a configuration names: rows, model, metrics, sampler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedloom.errors import ConfigError, DataError
from fedloom.sampling import Sampler

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn

GIVEN = "given"
"""What stands in a configuration for a model or rows that were given."""

CLIENT = "client"
"""The column that says whose a row is, where rows were given client by client."""

Metric = Callable[[Any, Any], float]
"""(predictions, references) -> score: class indices or values (n,), or the texts written and those of the data."""


@dataclass(frozen=True)
class Given:
    """Objects of the caller's; what is None is as the configuration says."""

    model: nn.Module | None = None
    tokenizer: Any = None
    train: Dataset | None = None
    eval: Dataset | None = None
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    sampler: Sampler | None = None
    column: str | None = None
    """The column of clients of `train`, if it has one."""


def gather(
    values: dict[str, Any],
    *,
    model: nn.Module | None,
    tokenizer: Any,
    data: Any,
    eval_data: Any,
    metrics: Mapping[str, Metric] | None,
    sampler: Sampler | None,
) -> tuple[dict[str, Any], Given]:
    """(a configuration's values with what was given entered, what was given).

    `data` is rows, or client -> rows, each of them a `datasets.Dataset`, a pandas DataFrame or a list of dicts. Raises
    DataError for anything else, ConfigError for an engine whose clients are in other processes.
    """
    values = {key: dict(x) if isinstance(x, Mapping) else x for key, x in values.items()}
    own = [x for x in (model, data, eval_data, metrics, sampler) if x is not None]
    engine = values.get("engine", {}).get("name", "inprocess")
    if own and engine == "flower":
        raise ConfigError(
            "model, data, metrics and samplers of Python cannot reach other processes: set engine.name = 'inprocess'"
        )
    if model is not None and engine == "ray":
        raise ConfigError(
            "a model of Python cannot reach the workers of engine.name = 'ray', which load one each: name it (model.name)"
        )
    if model is not None:
        values["model"] = {"name": GIVEN} | values.get("model", {})
    train, column = None, None
    if data is not None:
        values["task"] = values.get("task", {}) | {"data": GIVEN}
        if isinstance(data, Mapping) and not hasattr(data, "num_rows"):
            train, column = _by_client(data), CLIENT
            values["clients"] = values.get("clients", {}) | {"partition": "by-field", "field": CLIENT}
            values["clients"].pop("count", None)
        else:
            train = rows_of(data, "data")
    held_out = None if eval_data is None else rows_of(eval_data, "eval_data")
    return values, Given(model, tokenizer, train, held_out, metrics or {}, sampler, column)


def rows_of(source: Any, what: str) -> Dataset:
    """A data set of the caller's rows."""
    import datasets
    import pandas as pd  # type: ignore[import-untyped]  # ships no types

    if isinstance(source, datasets.Dataset):
        return source
    if isinstance(source, pd.DataFrame):
        return datasets.Dataset.from_pandas(source, preserve_index=False)
    if isinstance(source, list) and source and all(isinstance(row, Mapping) for row in source):
        return datasets.Dataset.from_list([dict(row) for row in source])
    if isinstance(source, datasets.DatasetDict):
        raise DataError(
            f"{what} is a DatasetDict, expected one of its splits ({', '.join(source)}): data=sets['train']"
        )
    raise DataError(
        f"{what} is a {type(source).__name__}, expected a datasets.Dataset, a pandas DataFrame or a list of dicts"
    )


def _by_client(data: Mapping[str, Any]) -> Dataset:
    import datasets

    if isinstance(data, datasets.DatasetDict) or not data:
        return rows_of(data, "data")
    parts = []
    for client, rows in data.items():
        part = rows_of(rows, f"data[{client!r}]")
        if CLIENT in part.column_names:
            part = part.remove_columns([CLIENT])
        parts.append(part.add_column(CLIENT, [str(client)] * len(part)))
    try:
        return datasets.concatenate_datasets(parts)
    except ValueError as error:
        raise DataError(f"clients have columns of different types ({str(error)[:200]}): give all the same") from error
