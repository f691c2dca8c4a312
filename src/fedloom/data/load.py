"""Data sets of raw columns: packaged names, local files, hub ids and GLUE tasks; checked, hashed and split.

A data source is a name and, for the hub, more: `owner/name:config@revision#split`, `glue/mnli#validation_mismatched`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedloom.data import files, glue, hub, hub_rows, packaged
from fedloom.data.glue import glue_fields as glue_fields
from fedloom.errors import DataError, nearest
from fedloom.rng import seed_of
from fedloom.text import shortened

if TYPE_CHECKING:
    from datasets import Dataset


def load(source: str, split: str | None = None) -> Dataset:
    """The rows of a data source: a packaged name, a local file, a GLUE task (`glue/cola`) or a hub id.

    A hub id is `owner/name`, with `:config`, `@revision` (a branch, tag or commit) and `#split` where they are wanted. `split`
    says which where the source does not (`train` by default); packaged data and files have one split only. Raises DataError
    if there is no such source or it cannot be read, HubError if it is only on a hub that cannot be reached.
    """
    hub.quiet()
    import datasets

    name, _, own = source.partition("#")
    if name in packaged.DATA:
        columns = packaged.read(name)
        if columns is not None:
            _one_split(name, own or split)
            return datasets.Dataset.from_dict(columns)
        return _original(name, own or split)
    if files.is_path(source):
        _one_split(source, split)
        return files.read(Path(source).expanduser())
    split = own or split
    name, revision = hub.named(name)
    if glue.is_glue(name):
        return _from_hub(glue.HUB, name.removeprefix("glue/"), glue.glue_split(name, split), source, revision=revision)
    name, _, config = name.partition(":")
    known = ", ".join(packaged.DATA)
    advice = f"Packaged data: {known}{nearest(source, packaged.DATA)}; files: {', '.join(files.SUFFIXES)}"
    return _from_hub(name, config or None, split or "train", source, advice, revision)


def require(ds: Dataset, columns: Iterable[str]) -> None:
    """Raise DataError unless the data set has rows, and these columns, with a value in every row (rows count from 1)."""
    import pyarrow as pa  # type: ignore[import-untyped]  # ships no types
    import pyarrow.compute as pc  # type: ignore[import-untyped]  # ships no types

    if len(ds) == 0:
        raise DataError("the data set has no rows, expected at least one")
    for name in columns:
        if name not in ds.column_names:
            raise DataError(
                f"there is no column {name!r}, the data has: "
                f"{shortened(', '.join(ds.column_names), 300)}{nearest(name, ds.column_names)}"
            )
        values = ds.select_columns([name]).with_format("arrow")[:].column(name)
        if why := _no_value(values.type):
            raise DataError(f"column {name!r} holds {why}, expected text or numbers: flatten or convert it")
        bad = pc.is_null(values, nan_is_null=pa.types.is_floating(values.type))
        count = pc.sum(bad).as_py()
        if count:
            row = pc.index(bad, True).as_py() + 1
            raise DataError(f"row {row} has no value in column {name!r} ({count} such rows): fill or remove them")


def _no_value(kind: Any) -> str | None:
    """What an Arrow type holds where it is neither text nor a number, or None."""
    import pyarrow as pa

    t = pa.types
    if t.is_struct(kind) or t.is_map(kind) or t.is_union(kind):
        return "objects"
    if t.is_nested(kind):
        return "lists"
    if t.is_binary(kind) or t.is_large_binary(kind) or t.is_fixed_size_binary(kind):
        return "bytes"
    return None


def fingerprint(ds: Dataset) -> str:
    """sha256 of the content, columns and rows in order; the same in every process and for every kind of source."""
    digest = hashlib.sha256(json.dumps(ds.column_names).encode())
    for first in range(0, len(ds), 1024):
        rows = ds[first : first + 1024]
        digest.update(json.dumps([rows[name] for name in ds.column_names], default=str).encode())
    return digest.hexdigest()


def split(ds: Dataset, holdout: float, seed: int, stratify: str | None = None) -> tuple[Dataset, Dataset]:
    """(train, held-out) rows, drawn from the seed; each keeps the order of the data.

    `holdout` below 1 is a share of the rows, else a number of rows. With `stratify`, a label column, every class is held out in
    proportion, and at least one row of each stays in train. Raises DataError if either part would be empty.
    """
    n = len(ds)
    wanted = round(holdout * n) if 0 < holdout < 1 else int(holdout)
    if not 1 <= wanted < n:
        raise DataError(
            f"cannot hold out {holdout} of {n} rows: expected a share between 0 and 1, or fewer rows than there are"
        )
    order = np.random.default_rng(seed_of(seed, "holdout")).permutation(n)
    held = (
        order[:wanted]
        if stratify is None
        else _proportional(np.asarray([str(x) for x in ds[stratify][:]]), order, wanted)
    )
    kept = np.setdiff1d(np.arange(n), held)
    if not len(held):
        raise DataError(f"cannot hold out {wanted} rows: no class of column {stratify!r} has a row to spare")
    return ds.select(kept.tolist()), ds.select(np.sort(held).tolist())


def _proportional(labels: np.ndarray[Any, Any], order: np.ndarray[Any, Any], wanted: int) -> np.ndarray[Any, Any]:
    """`wanted` rows of `order`, by class in proportion: whole parts first, then the largest remainders."""
    names, counts = np.unique(labels, return_counts=True)
    exact = wanted * counts / counts.sum()
    take = np.minimum(np.floor(exact).astype(int), counts - 1)
    for i in np.argsort(-(exact - np.floor(exact)), kind="stable"):
        if take.sum() < wanted and take[i] < counts[i] - 1:
            take[i] += 1
    return np.concatenate([order[labels[order] == name][:k] for name, k in zip(names, take, strict=True)])


def _one_split(source: str, split: str | None) -> None:
    if split not in (None, "train"):
        raise DataError(
            f"{source!r} has no split {split!r}: it is one set of rows; leave the split out, or name another source"
        )


def _original(name: str, split: str | None) -> Dataset:
    """A packaged data set whose package is not installed, from the hub."""
    import datasets

    advice = packaged.absent(name)
    original = packaged.DATA[name].hub
    if original is None:
        raise DataError(advice)
    # The repository itself holds a script, which datasets no longer runs; the hub's own conversion is on this branch.
    ds = _from_hub(original, None, split or "train", name, advice, revision="refs/convert/parquet")
    labels = [ds.features["fine_label"].int2str(i) for i in ds["fine_label"][:]]
    return datasets.Dataset.from_dict(packaged.questions(name, list(zip(labels, ds["text"], strict=True))))


def _from_hub(
    name: str, config: str | None, split: str, source: str, advice: str = "", revision: str | None = None
) -> Dataset:
    with hub.access("data set", source, DataError, advice) as online:
        ds: Any = hub_rows.rows(name, config, split, revision, online)
    if len(ds) == 0:
        raise DataError(f"data set {source!r} has no rows in split {split!r}, expected at least one")
    return ds
