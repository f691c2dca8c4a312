"""Who has which rows: flwr-datasets' partitioners behind one function, from a seed to lists of row numbers.

Dirichlet label skew: Yurochkin et al., arXiv 1905.12022; pathological label skew: McMahan et al., arXiv 1602.05629.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedloom.data import hub
from fedloom.data.load import require
from fedloom.disk import write
from fedloom.errors import DataError, nearest
from fedloom.rng import seed_of

if TYPE_CHECKING:
    from datasets import Dataset

Partition = dict[str, list[int]]
"""Client id -> its rows, ascending. Ids sort in the order of their numbers."""

SCHEMES = ("iid", "dirichlet", "pathological", "by-field", "by-length")

_DRAWS = 20  # draws of a skewed partition before giving up; the Dirichlet partitioner repeats each ten times itself


def partition(
    ds: Dataset,
    count: int | None,
    scheme: str,
    *,
    seed: int,
    alpha: float = 0.5,
    field: str | None = None,
    label: str | None = None,
    text: str | None = None,
    classes_per_client: int = 2,
    min_rows: int = 1,
) -> Partition:
    """Deal the rows out to `count` clients; every row goes to exactly one.

    - `iid`: at random, in equal numbers.
    - `dirichlet`: each class of the `label` column in shares drawn from Dirichlet(`alpha`).
    - `pathological`: `classes_per_client` classes of the `label` column for each client.
    - `by-field`: one client for each value of the `field` column, named by it; `count` may be None.
    - `by-length`: sorted by the length of the `text` column and cut into equal parts, for text without labels.

    Raises DataError for an unknown scheme, a missing column or value, more clients than rows, a `count` that a field does
    not have, or a client with fewer than `min_rows` rows.
    """
    if scheme not in SCHEMES:
        raise DataError(
            f"there is no partition {scheme!r}, expected one of {', '.join(SCHEMES)}{nearest(scheme, SCHEMES)}"
        )
    if scheme == "by-field":
        result = _by_field(ds, count, _column(ds, scheme, "field", field))
    else:
        if count is None or count < 1:
            raise DataError(f"got {count} clients, expected at least 1: set count in [clients]")
        if count > len(ds):
            raise DataError(
                f"got {count} clients for {len(ds)} rows, expected no more clients than rows: lower count in [clients]"
            )
        if scheme == "iid":
            rows = _equal(np.random.default_rng(seed_of(seed, "iid")).permutation(len(ds)), count)
        elif scheme == "by-length":
            rows = _by_length(ds, count, _column(ds, scheme, "text", text or field), seed)
        elif scheme == "dirichlet":
            rows = _dirichlet(ds, count, _column(ds, scheme, "label", label), seed, alpha, min_rows)
        else:
            rows = _pathological(ds, count, _column(ds, scheme, "label", label), seed, classes_per_client)
        width = len(str(count - 1))
        result = {f"client-{k:0{width}d}": mine for k, mine in enumerate(rows)}
    for client, mine in result.items():
        if len(mine) < min_rows:
            raise DataError(
                f"client {client!r} has {len(mine)} rows, expected at least {min_rows}: use fewer clients or more data"
            )
    return result


def save(partition: Partition, path: Path) -> None:
    """Write a partition as JSON, whole or not at all."""
    write(path, _json(partition).encode())


def load_partition(path: Path) -> Partition:
    """Read what `save` wrote. Raises DataError if it cannot be read or is no partition."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {str(client): [int(row) for row in rows] for client, rows in found.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DataError(
            f"{path} is no readable partition ({error}), expected JSON of client ids and row numbers"
        ) from error


def digest(partition: Partition) -> str:
    """sha256 of a partition: of the very bytes that `save` writes."""
    return hashlib.sha256(_json(partition).encode()).hexdigest()


def _json(partition: Partition) -> str:
    return json.dumps(partition, sort_keys=True, separators=(",", ":"))


def _column(ds: Dataset, scheme: str, role: str, name: str | None) -> str:
    if name is None:
        raise DataError(
            f"partition {scheme!r} needs a {role} column, got none; the data has: {', '.join(ds.column_names)}"
        )
    require(ds, [name])
    return name


def _equal(order: np.ndarray[Any, Any], count: int) -> list[list[int]]:
    partitioners = _partitioners()
    return _deal(partitioners.IidPartitioner(count), order, None)


def _by_length(ds: Dataset, count: int, field: str, seed: int) -> list[list[int]]:
    lengths = np.asarray([len(str(text)) for text in ds[field]])
    order = np.random.default_rng(seed_of(seed, "length")).permutation(len(ds))
    return _equal(order[np.argsort(lengths[order], kind="stable")], count)


def _dirichlet(ds: Dataset, count: int, label: str, seed: int, alpha: float, min_rows: int) -> list[list[int]]:
    if not alpha > 0:
        raise DataError(
            f"got alpha {alpha}, expected a number above 0 (small is skewed, 100 is nearly iid): change alpha in [clients]"
        )
    partitioners = _partitioners()

    def draw(seed: int) -> Any:
        return partitioners.DirichletPartitioner(count, "by", float(alpha), min_partition_size=min_rows, seed=seed)

    advice = "raise alpha, or use fewer clients"
    return _drawn(ds, label, draw, (seed, "dirichlet"), f"Dirichlet({alpha}) shares for {count} clients", advice)


def _pathological(ds: Dataset, count: int, label: str, seed: int, classes: int) -> list[list[int]]:
    known = len(set(ds[label]))
    if not 1 <= classes <= known or classes * count < known:
        raise DataError(
            f"{count} clients of {classes} classes cannot hold the {known} classes of column {label!r} between them: set "
            f"classes_per_client from {-(-known // count)} to {known}"
        )
    partitioners = _partitioners()

    def draw(seed: int) -> Any:
        return partitioners.PathologicalPartitioner(
            count, "by", classes, class_assignment_mode="first-deterministic", seed=seed
        )

    advice = "raise classes_per_client, or change the number of clients"
    return _drawn(ds, label, draw, (seed, "pathological"), f"{classes} classes each for {count} clients", advice)


def _drawn(
    ds: Dataset, label: str, draw: Callable[[int], Any], key: tuple[int, str], what: str, advice: str
) -> list[list[int]]:
    """The first of some draws that leaves no client empty and no row over."""
    reason = ""
    labels = [str(x) for x in ds[label]]
    for attempt in range(_DRAWS):
        try:
            rows = _deal(draw(seed_of(*key, attempt) % 2**32), np.arange(len(ds)), labels)
        except ValueError as error:
            reason = str(error).splitlines()[0]
            continue
        if sum(map(len, rows)) == len(ds):
            return rows
        reason = "some classes went to nobody"
    raise DataError(f"{what} of {len(ds)} rows were drawn {_DRAWS} times and none would do ({reason}): {advice}")


def _by_field(ds: Dataset, count: int | None, field: str) -> Partition:
    values = [str(x) for x in ds[field]]
    known = sorted(set(values))
    if count is not None and count != len(known):
        some = ", ".join(known[:5]) + (", ..." if len(known) > 5 else "")
        raise DataError(
            f"column {field!r} has {len(known)} values ({some}), got {count} clients: set count = {len(known)}"
        )
    partitioners = _partitioners()
    rows = _deal(partitioners.NaturalIdPartitioner("by"), np.arange(len(ds)), values)
    ids: list[str] = []
    for value in known:  # natural ids are numbered in sorted order
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", value).strip("-.")[:60] or "client"
        taken = {"server", *(x.lower() for x in ids)}  # ids name directories, which may not tell upper from lower case
        unique, n = name, 2
        while unique.lower() in taken:
            unique, n = f"{name}-{n}", n + 1
        ids.append(unique)
    return dict(sorted(zip(ids, rows, strict=True)))


def _deal(partitioner: Any, order: np.ndarray[Any, Any], by: list[str] | None) -> list[list[int]]:
    """Run a partitioner over row numbers, with the column that it goes by beside them."""
    import datasets

    columns: dict[str, Any] = {"row": order.tolist()}
    if by is not None:
        columns["by"] = by
    partitioner.dataset = datasets.Dataset.from_dict(columns)
    # Its warnings say that a draw is repeated, and its progress bars come too late to be of use.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        return [sorted(partitioner.load_partition(k)["row"]) for k in range(partitioner.num_partitions)]


def _partitioners() -> Any:
    hub.quiet()
    # The package imports a plotting library, which may announce on stderr that it looks for fonts.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore", DeprecationWarning)
        from flwr_datasets import partitioner
    return partitioner
