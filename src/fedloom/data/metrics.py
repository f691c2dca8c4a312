"""Scores of predictions against references, by scikit-learn, SciPy and rouge-score."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fedloom.data import choices, glue
from fedloom.errors import ConfigError, DataError, nearest
from fedloom.text import shown

Values = Any
"""Class indices (n,), numbers (n,) or texts (n), by metric; an array or a sequence."""


NEEDS_TEXT = frozenset({"exact_match", "rouge_l"})
"""Metrics of a causal LM that compare the answer it writes."""

_OF_KIND = {
    "classification": ("loss", "accuracy", "macro_f1", "f1", "matthews"),
    "regression": ("loss", "pearson", "spearman"),
    "causal-lm": ("loss", "perplexity", "exact_match", "rouge_l", *choices.METRICS),
}


def check(names: Sequence[str], kind: str, classes: int | None = None) -> None:
    """Raise ConfigError for a metric that there is not, that scores another kind of task, or another number of classes."""
    for name in names:
        if name not in _METRICS and name not in choices.METRICS:
            raise ConfigError(f"task.metrics: {_unknown(name)}")
        if name not in _OF_KIND[kind]:
            others = [other for other, scores in _OF_KIND.items() if name in scores]
            raise ConfigError(
                f"task.metrics: {name} scores a {' or '.join(others)}, and task.kind is {kind!r}: "
                f"expected some of {', '.join(_OF_KIND[kind])}"
            )
        if name == "f1" and classes is not None and classes != 2:
            raise ConfigError(f"task.metrics: f1 is for two classes, and the data has {classes}: use macro_f1")


def _unknown(name: str) -> str:
    known = [*_METRICS, *choices.METRICS]
    return f"there is no metric {shown(name)}, expected one of {', '.join(known)}{nearest(name, known)}"


def compute(names: Sequence[str], predictions: Values, references: Values) -> dict[str, float]:
    """Each metric named, over predictions and references of one length.

    `accuracy`, `f1` (of class 1), `macro_f1`, `matthews`: class indices. `pearson`, `spearman`: numbers. `exact_match`,
    `rouge_l`: texts. `loss`, `perplexity`: predictions are the losses per row, references their weights (such as numbers
    of tokens) or None. Where a score is undefined, such as the correlation of a constant, it is 0. Raises DataError for
    an unknown metric, no rows, or unequal numbers of them.

    >>> compute(["accuracy", "matthews"], [1, 1, 1, 1], [0, 1, 1, 1])
    {'accuracy': 0.75, 'matthews': 0.0}
    """
    for name in names:
        if name not in _METRICS:
            raise DataError(_unknown(name))
    if len(predictions) == 0:
        raise DataError("there are no predictions to score, expected at least one row")
    if references is not None and len(predictions) != len(references):
        raise DataError(f"got {len(predictions)} predictions for {len(references)} references, expected as many")
    return {name: float(_METRICS[name](predictions, references)) for name in names}


def default_metrics(kind: str, source: str = "") -> list[str]:
    """The metrics of a kind of task; a GLUE task (`glue/cola`) has its own. Scores of written answers are asked for."""
    if glue.is_glue(source) and kind != "causal-lm":
        return glue.glue_fields(source)[2]
    defaults = {
        "classification": ["accuracy", "macro_f1"],
        "regression": ["pearson", "spearman"],
        "causal-lm": ["loss", "perplexity"],
    }
    if kind not in defaults:
        raise DataError(
            f"there is no kind of task {kind!r}, expected one of {', '.join(defaults)}{nearest(kind, defaults)}"
        )
    return defaults[kind]


def _accuracy(predictions: Values, references: Values) -> float:
    return float(np.mean(np.asarray(predictions) == np.asarray(references)))


def _f1(predictions: Values, references: Values) -> float:
    from sklearn.metrics import f1_score

    classes = np.union1d(predictions, references)
    if not set(classes.tolist()) <= {0, 1}:
        raise DataError(f"f1 is for two classes, 0 and 1, got {classes.tolist()}: use macro_f1")
    return float(f1_score(references, predictions, pos_label=1, zero_division=0.0))


def _macro_f1(predictions: Values, references: Values) -> float:
    from sklearn.metrics import f1_score

    # Over the classes that occur in the references: one that is only predicted by mistake has no recall to speak of.
    present = np.unique(references)
    return float(f1_score(references, predictions, labels=present, average="macro", zero_division=0.0))


def _matthews(predictions: Values, references: Values) -> float:
    from sklearn.metrics import matthews_corrcoef

    if _constant(predictions) or _constant(references):
        return 0.0
    return float(matthews_corrcoef(references, predictions))


def _pearson(predictions: Values, references: Values) -> float:
    from scipy.stats import pearsonr

    x, y = np.asarray(predictions, np.float64), np.asarray(references, np.float64)
    return 0.0 if _constant(x) or _constant(y) else float(pearsonr(x, y).statistic)


def _spearman(predictions: Values, references: Values) -> float:
    from scipy.stats import rankdata

    return _pearson(rankdata(predictions), rankdata(references))


def _constant(values: Values) -> bool:
    """Whether the values are one, as far as float64 can tell (SciPy warns at this bound), or not all numbers."""
    x = np.asarray(values, np.float64)
    if not np.isfinite(x).all():
        return True
    return bool(np.linalg.norm(x - x.mean()) <= 1e-13 * abs(x.mean()))


def _exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    return float(np.mean([p.strip() == r.strip() for p, r in zip(predictions, references, strict=True)]))


def _rouge_l(predictions: Sequence[str], references: Sequence[str]) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(predictions, references, strict=True)
    return float(np.mean([scorer.score(reference, prediction)["rougeL"].fmeasure for prediction, reference in pairs]))


def _loss(losses: Values, weights: Values) -> float:
    return float(np.average(np.asarray(losses, np.float64), weights=weights))


def _perplexity(losses: Values, weights: Values) -> float:
    loss = _loss(losses, weights)
    return math.exp(loss) if loss < 700 else math.inf  # e**710 is past float64


_METRICS: dict[str, Callable[[Values, Values], float]] = {
    "accuracy": _accuracy,
    "macro_f1": _macro_f1,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
    "exact_match": _exact_match,
    "rouge_l": _rouge_l,
    "loss": _loss,
    "perplexity": _perplexity,
}
