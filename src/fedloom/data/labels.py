"""Labels of a task: the order of classes, their numbers, and the targets of a regression."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedloom.errors import DataError, nearest
from fedloom.text import shortened, shown

if TYPE_CHECKING:
    from datasets import Dataset


def labels_of(train: Dataset, label: str) -> list[str]:
    """Class names in the order of their numbers: sorted, numbers by value; a ClassLabel keeps its declared order.

    Raises DataError if there is only one class, or a label is missing.
    """
    feature = train.features[label]
    names = getattr(feature, "names", None)
    found = set(_label_names(train, label))
    # A declared order is the sorted order of the stored integers, and metrics of one class (F1 of MRPC) rest on it.
    labels = list(names) if names is not None else sorted(found, key=_label_order(found))
    if len(found) < 2:
        raise DataError(
            f"column {label!r} has one class only ({shown(min(found))}), expected at least two: choose another label column"
        )
    return labels


def _label_order(found: set[str]) -> Any:
    try:
        order = {name: (float(name), name) for name in found}
    except ValueError:
        return str
    # A NaN has no place among numbers: the order would be that of the set, another one in every process.
    return order.__getitem__ if all(math.isfinite(value) for value, _ in order.values()) else str


def _label_names(ds: Dataset, label: str) -> list[str]:
    """Every row's class name; integral floats lose their `.0`, so that 1 and 1.0 are one class."""
    names = getattr(ds.features[label], "names", None)
    result = []
    for row, value in enumerate(ds[label][:]):
        if (
            value is None
            or (isinstance(value, float) and math.isnan(value))
            or (names is not None and not 0 <= value < len(names))
        ):
            raise DataError(
                f"row {row + 1} has no label in column {label!r} (got {value!r}): remove the row or label it"
            )
        if names is not None:
            result.append(names[value])
        elif isinstance(value, float) and value.is_integer():
            result.append(str(int(value)))
        else:
            result.append(str(value))
    return result


def classes(ds: Dataset, label: str, labels: Sequence[str]) -> NDArray[np.int64]:
    """(n,) class numbers of the rows. Raises DataError for a label outside `labels`, naming its first row."""
    index = {name: i for i, name in enumerate(labels)}
    found = _label_names(ds, label)
    unseen = {name: row for row, name in reversed(list(enumerate(found))) if name not in index}
    if unseen:
        name, row = next(iter(sorted(unseen.items(), key=lambda item: item[1])))
        raise DataError(
            f"label {shown(name)} (row {row + 1}, column {label!r}) does not occur in the training data, expected one of: "
            f"{shortened(', '.join(labels), 300)}{nearest(name, labels)}. Remove such rows, or train on some that have it"
        )
    return np.fromiter((index[name] for name in found), np.int64, len(found))


def values(ds: Dataset, label: str) -> NDArray[np.float32]:
    """(n,) targets of a regression. Raises DataError for a value that is no finite number, naming its row."""
    result = np.empty(len(ds), np.float32)
    for row, value in enumerate(ds[label][:]):
        try:
            with np.errstate(over="ignore"):  # beyond float32 is infinite, and told below
                result[row] = float(value)
        except (TypeError, ValueError):
            result[row] = np.nan
        if not np.isfinite(result[row]):
            raise DataError(
                f"row {row + 1} has {shown(value)} in column {label!r}, expected a number: regression needs finite numbers"
            )
    return result
