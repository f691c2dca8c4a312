"""The GLUE tasks as the LoRA papers use them: fields, own metric, official validation split for evaluation.

Wang, Singh, Michael, Hill, Levy, Bowman: GLUE, arXiv 1804.07461, table 1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from fedloom.errors import DataError, nearest

HUB = "nyu-mll/glue"


@dataclass(frozen=True)
class _Task:
    text: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    kind: Literal["classification", "regression"] = "classification"
    validation: str = "validation"


_TASKS = {
    "cola": _Task(("sentence",), ("matthews",)),
    "sst2": _Task(("sentence",)),
    "mrpc": _Task(("sentence1", "sentence2"), ("f1", "accuracy")),
    "qqp": _Task(("question1", "question2"), ("f1", "accuracy")),
    "stsb": _Task(("sentence1", "sentence2"), ("pearson", "spearman"), "regression"),
    "mnli": _Task(("premise", "hypothesis"), validation="validation_matched"),
    "qnli": _Task(("question", "sentence")),
    "rte": _Task(("sentence1", "sentence2")),
    "wnli": _Task(("sentence1", "sentence2")),
}


def is_glue(source: str) -> bool:
    """Whether a data source is named as a GLUE task, such as `glue/cola`."""
    return source.startswith("glue/")


def glue_fields(name: str) -> tuple[list[str], str, list[str], Literal["classification", "regression"]]:
    """Text columns, label column, metrics, kind of `glue/TASK`, of any revision and split. Raises DataError for another task.

    >>> glue_fields("glue/cola")
    (['sentence'], 'label', ['matthews'], 'classification')
    """
    task = _task(name)
    return list(task.text), "label", list(task.metrics), task.kind


def glue_split(name: str, split: str | None) -> str:
    """The split's name on the hub: train by default; `validation` and `eval` mean the official one (for MNLI, matched)."""
    task = _task(name)
    return task.validation if split in ("validation", "eval") else split or "train"


def _task(name: str) -> _Task:
    task = re.split("[@#]", name.removeprefix("glue/"))[0]
    if task not in _TASKS:
        raise DataError(f"GLUE has no task {task!r}, expected one of {', '.join(_TASKS)}{nearest(task, _TASKS)}")
    return _TASKS[task]
