from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from fedloom.data.partition import SCHEMES, digest, load_partition, partition, save
from fedloom.errors import DataError


@pytest.fixture
def ds() -> Dataset:
    """200 rows: 5 classes of unequal size, 4 domains, texts of 1 to 40 letters."""
    rng = np.random.default_rng(0)
    return Dataset.from_dict(
        {
            "text": ["x" * int(n) for n in rng.integers(1, 41, 200)],
            "label": [f"c{int(i)}" for i in rng.choice(5, 200, p=[0.4, 0.3, 0.15, 0.1, 0.05])],
            "domain": [["b/x y", "a", "server", "A"][int(i)] for i in rng.integers(0, 4, 200)],
        }
    )


def arguments(scheme: str) -> dict[str, Any]:
    common: dict[str, Any] = {"scheme": scheme, "count": None if scheme == "by-field" else 6, "seed": 3}
    return common | {"label": "label", "field": "domain", "text": "text"}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_row_goes_to_one_client(ds: Dataset, scheme: str) -> None:
    parts = partition(ds, **arguments(scheme))
    assert sorted(row for rows in parts.values() for row in rows) == list(range(200))
    assert all(rows and rows == sorted(rows) for rows in parts.values())
    assert list(parts) == sorted(parts)
    assert parts == partition(ds, **arguments(scheme))


@pytest.mark.parametrize("scheme", ["iid", "dirichlet", "pathological"])
def test_another_seed_deals_otherwise(ds: Dataset, scheme: str) -> None:
    assert partition(ds, **arguments(scheme)) != partition(ds, **(arguments(scheme) | {"seed": 4}))


def test_ids_sort_as_their_numbers_do(ds: Dataset) -> None:
    parts = partition(ds, 12, "iid", seed=0)
    assert list(parts)[:2] == ["client-00", "client-01"] and len(parts) == 12
    assert list(partition(ds, 10, "iid", seed=0))[-1] == "client-9"
    assert {len(rows) for rows in parts.values()} == {16, 17}


def test_alpha_sets_the_skew(ds: Dataset) -> None:
    labels = np.asarray(ds["label"])

    def largest_share(alpha: float) -> float:
        parts = partition(ds, 4, "dirichlet", seed=0, alpha=alpha, label="label")
        return float(np.mean([np.unique(labels[x], return_counts=True)[1].max() / len(x) for x in parts.values()]))

    assert largest_share(0.1) > 0.7 > 0.5 > largest_share(1000.0)


def test_a_small_alpha_is_drawn_until_nobody_is_empty(ds: Dataset) -> None:
    parts = partition(ds, 10, "dirichlet", seed=0, alpha=0.1, label="label", min_rows=2)
    assert min(map(len, parts.values())) >= 2


def test_pathological_clients_have_few_classes(ds: Dataset) -> None:
    labels = np.asarray(ds["label"])
    parts = partition(ds, 6, "pathological", seed=0, label="label", classes_per_client=2)
    assert {len(set(labels[rows])) for rows in parts.values()} == {2}


def test_integer_classes(ds: Dataset) -> None:
    names = sorted(set(ds["label"]))
    features = Features({"y": ClassLabel(names=names), "text": Value("string")})
    numbered = Dataset.from_dict({"y": [names.index(x) for x in ds["label"]], "text": ds["text"][:]}, features=features)
    assert len(partition(numbered, 4, "dirichlet", seed=0, label="y")) == 4


def test_a_field_names_its_clients(ds: Dataset) -> None:
    parts = partition(ds, 4, "by-field", seed=0, field="domain")
    domain = ds["domain"]
    # Ids name directories, where case may not count, and `server` is the server's own.
    named = {client: {domain[row] for row in rows} for client, rows in parts.items()}
    assert named == {"A": {"A"}, "a-2": {"a"}, "b-x-y": {"b/x y"}, "server-2": {"server"}}


def test_by_length_cuts_the_sorted_texts(ds: Dataset) -> None:
    parts = partition(ds, 4, "by-length", seed=0, text="text")
    lengths = [[len(ds["text"][row]) for row in rows] for rows in parts.values()]
    assert all(max(a) <= min(b) for a, b in pairwise(lengths))
    assert {len(x) for x in lengths} == {50}


@pytest.mark.parametrize(
    ("count", "scheme", "options", "message"),
    [
        (4, "idd", {}, "did you mean 'iid'"),
        (201, "iid", {}, "201 clients for 200 rows"),
        (0, "iid", {}, "got 0 clients"),
        (None, "iid", {}, "got None clients"),
        (3, "iid", {"min_rows": 100}, "'client-0' has 67 rows, expected at least 100"),
        (4, "dirichlet", {}, "needs a label column, got none; the data has: text, label, domain"),
        (4, "dirichlet", {"label": "lable"}, "did you mean 'label'"),
        (4, "dirichlet", {"label": "label", "alpha": 0.0}, "expected a number above 0"),
        (190, "dirichlet", {"label": "label", "alpha": 0.01}, "none would do .* raise alpha"),
        (2, "pathological", {"label": "label"}, "classes_per_client from 3 to 5"),
        (2, "pathological", {"label": "label", "classes_per_client": 6}, "classes_per_client from 3 to 5"),
        (150, "pathological", {"label": "label"}, "none would do"),
        (3, "by-field", {"field": "domain"}, "4 values .* got 3 clients: set count = 4"),
        (3, "by-field", {}, "needs a field column"),
        (3, "by-length", {}, "needs a text column"),
    ],
)
def test_what_cannot_be_dealt_is_told(
    ds: Dataset, count: int, scheme: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        partition(ds, count, scheme, seed=0, **options)


def test_save_load_digest(ds: Dataset, tmp_path: Path) -> None:
    parts = partition(ds, 5, "iid", seed=0)
    save(parts, tmp_path / "partition.json")
    assert load_partition(tmp_path / "partition.json") == parts
    assert [x.name for x in tmp_path.iterdir()] == ["partition.json"]
    turned = dict(reversed(parts.items()))
    assert digest(parts) == digest(turned) != digest(partition(ds, 5, "iid", seed=1))
    for text in ("{", "[1]", '{"a": 3}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(DataError, match="no readable partition"):
            load_partition(tmp_path / "bad.json")
    with pytest.raises(DataError, match="no readable partition"):
        load_partition(tmp_path / "none.json")


def test_nothing_is_printed(ds: Dataset, capfd: pytest.CaptureFixture[str]) -> None:
    for scheme in SCHEMES:
        partition(ds, **arguments(scheme))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("iid", "afde2630f572"),
        ("dirichlet", "165928d52205"),
        ("pathological", "99b2a7360e69"),
        ("by-field", "c3e8f0d93beb"),
        ("by-length", "7a999a3bafde"),
    ],
)
def test_a_seed_means_the_same_partition_for_ever(ds: Dataset, scheme: str, expected: str) -> None:
    """As flwr-datasets 0.6 dealt them: a run that began with those can be resumed."""
    assert digest(partition(ds, **arguments(scheme))).startswith(expected)


@pytest.mark.parametrize("scheme", ["iid", "dirichlet", "pathological"])
def test_a_hundred_thousand_clients(scheme: str) -> None:
    rows = Dataset.from_dict({"label": np.random.default_rng(0).integers(0, 10, 1_000_000)})
    start = process_time()
    parts = partition(rows, 100_000, scheme, seed=0, alpha=100.0, label="label")
    assert process_time() - start < 5  # about one; a call for each client took a minute
    assert sum(map(len, parts.values())) == 1_000_000
