"""Who has which rows: from a seed to lists of row numbers, in time linear in rows and clients.

Dirichlet label skew: Yurochkin et al., arXiv 1905.12022; pathological label skew: McMahan et al., arXiv 1602.05629.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedloom.data.load import require
from fedloom.disk import write
from fedloom.errors import DataError, nearest
from fedloom.rng import seed_of

if TYPE_CHECKING:
    from datasets import Dataset

Partition = dict[str, list[int]]
"""Client id -> its rows, ascending. Ids sort in the order of their numbers."""

SCHEMES = ("iid", "dirichlet", "pathological", "by-field", "by-length")

_SEEDS = 20  # of a skewed partition, before giving up
_DRAWS = 11  # of Dirichlet shares from one seed


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


def hold_out(partition: Partition, share: float, seed: int) -> tuple[Partition, Partition]:
    """(rows to train on, rows to be scored on) of every client: a share of its rows held out, one at least.

    Drawn by seed and client, so that a client alone on its machine holds out the same numbers as in a simulation of all.
    Raises DataError for a client with a single row.
    """
    kept, held = {}, {}
    for client, rows in partition.items():
        if len(rows) < 2:
            raise DataError(
                f"client {client!r} has one row, expected two or more: clients.holdout = {share:g} holds one out and trains on "
                "the rest; use fewer clients, more data, or clients.holdout = 0"
            )
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        order = np.random.default_rng(seed_of(seed, client, "own hold-out")).permutation(len(rows))
        mine = np.asarray(rows)
        kept[client], held[client] = (np.sort(mine[some]).tolist() for some in (order[count:], order[:count]))
    return kept, held


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


def _equal(order: NDArray[np.int64], count: int) -> list[list[int]]:
    return [np.sort(rows).tolist() for rows in np.array_split(order, count)]


def _by_length(ds: Dataset, count: int, field: str, seed: int) -> list[list[int]]:
    lengths = np.asarray([len(str(text)) for text in ds[field][:]])
    order = np.random.default_rng(seed_of(seed, "length")).permutation(len(ds))
    return _equal(order[np.argsort(lengths[order], kind="stable")], count)


def _dirichlet(ds: Dataset, count: int, label: str, seed: int, alpha: float, min_rows: int) -> list[list[int]]:
    if not alpha > 0:
        raise DataError(
            f"got alpha {alpha}, expected a number above 0 (small is skewed, 100 is nearly iid): change alpha in [clients]"
        )
    classes = _classes(ds, label)[1]

    def draw(rng: np.random.Generator) -> NDArray[np.int64] | None:
        for _ in range(_DRAWS):
            owner = np.empty(len(ds), np.int64)
            for rows in classes:
                shares = rng.dirichlet(np.full(count, float(alpha)))
                bounds = (np.cumsum(shares) * len(rows)).astype(np.int64)[:-1]
                owner[rows] = np.repeat(np.arange(count), np.diff(bounds, prepend=0, append=len(rows)))
            if np.bincount(owner, minlength=count).min() >= min_rows:
                return owner
        return None

    what = f"Dirichlet({alpha}) shares of {len(ds)} rows for {count} clients"
    why = f"a client had fewer than {min_rows} rows"
    return _drawn(draw, count, (seed, "dirichlet"), what, f"({why}): raise alpha, or use fewer clients")


def _pathological(ds: Dataset, count: int, label: str, seed: int, wanted: int) -> list[list[int]]:
    classes = _classes(ds, label)[1]
    known = len(classes)
    if not 1 <= wanted <= known or wanted * count < known:
        raise DataError(
            f"{count} clients of {wanted} classes cannot hold the {known} classes of column {label!r} between them: set "
            f"classes_per_client from {-(-known // count)} to {known}"
        )

    def draw(rng: np.random.Generator) -> NDArray[np.int64] | None:
        owners: list[list[int]] = [[] for _ in classes]
        for client in range(count):
            mine = [client % known]  # so that every class has an owner where there are enough clients
            while len(mine) < wanted:
                drawn = int(rng.integers(known, size=1)[0])
                if drawn not in mine:
                    mine.append(drawn)
            for k in mine:
                owners[k].append(client)
        if any(not 1 <= len(who) <= len(rows) for who, rows in zip(owners, classes, strict=True)):
            return None
        owner = np.empty(len(ds), np.int64)
        for who, rows in zip(owners, classes, strict=True):
            whole, more = divmod(len(rows), len(who))
            owner[rows] = np.repeat(who, np.where(np.arange(len(who)) < more, whole + 1, whole))
        return owner

    what = f"{wanted} classes each for {count} clients of {len(ds)} rows"
    advice = "(a class went to nobody, or to more clients than it has rows): change classes_per_client or count"
    return _drawn(draw, count, (seed, "pathological"), what, advice)


def _drawn(
    draw: Callable[[np.random.Generator], NDArray[np.int64] | None],
    count: int,
    key: tuple[int, str],
    what: str,
    advice: str,
) -> list[list[int]]:
    """The first of some draws of an owner for each row that leaves no client too few and no class to nobody."""
    for attempt in range(_SEEDS):
        owner = draw(np.random.default_rng(seed_of(*key, attempt) % 2**32))
        if owner is not None:
            return _grouped(owner, count)
    raise DataError(f"{what} were drawn {_SEEDS} times and none would do {advice}")


def _by_field(ds: Dataset, count: int | None, field: str) -> Partition:
    known, rows = _classes(ds, field)
    if count is not None and count != len(known):
        some = ", ".join(known[:5]) + (", ..." if len(known) > 5 else "")
        raise DataError(
            f"column {field!r} has {len(known)} values ({some}), got {count} clients: set count = {len(known)}"
        )
    ids: list[str] = []
    taken = {"server"}
    for value in known:
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", value).strip("-.")[:60] or "client"
        unique, n = name, 2
        while unique.lower() in taken:  # ids name directories, which may not tell upper from lower case
            unique, n = f"{name}-{n}", n + 1
        taken.add(unique.lower())
        ids.append(unique)
    return dict(sorted(zip(ids, (x.tolist() for x in rows), strict=True)))


def _classes(ds: Dataset, column: str) -> tuple[list[str], Sequence[NDArray[np.int64]]]:
    """The values of a column as text, sorted, and the rows of each, ascending."""
    values = [str(x) for x in ds[column][:]]
    known = sorted(set(values))
    number = {value: i for i, value in enumerate(known)}
    codes = np.fromiter((number[x] for x in values), np.int64, len(values))
    return known, _split(codes, len(known))


def _grouped(owner: NDArray[np.int64], count: int) -> list[list[int]]:
    return [rows.tolist() for rows in _split(owner, count)]


def _split(owner: NDArray[np.int64], count: int) -> Sequence[NDArray[np.int64]]:
    """The rows of each owner, ascending."""
    bounds = np.cumsum(np.bincount(owner, minlength=count))[:-1]
    return np.split(np.argsort(owner, kind="stable"), bounds)
