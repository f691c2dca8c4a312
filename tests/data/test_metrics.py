from __future__ import annotations

import math

import numpy as np
import pytest

from fedloom.data.metrics import compute, default_metrics
from fedloom.errors import DataError


def test_classes_by_hand() -> None:
    predictions, references = [1, 1, 0, 0, 1], [1, 0, 0, 1, 1]
    got = compute(["accuracy", "f1", "macro_f1", "matthews"], predictions, references)
    # tp 2, fp 1, fn 1, tn 1
    assert got["accuracy"] == pytest.approx(3 / 5)
    assert got["f1"] == pytest.approx(4 / 6)
    assert got["macro_f1"] == pytest.approx((4 / 6 + 2 / 4) / 2)
    assert got["matthews"] == pytest.approx((2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2))


def test_numbers_by_hand() -> None:
    got = compute(["pearson", "spearman"], np.array([1.0, 2.0, 4.0], np.float32), [1.0, 3.0, 2.0])
    assert got["pearson"] == pytest.approx(1 / math.sqrt(14 / 3 * 2))
    assert got["spearman"] == pytest.approx(0.5)


def test_texts() -> None:
    got = compute(["exact_match", "rouge_l"], [" Paris\n", "the cat sat"], ["Paris", "the cat sat down"])
    assert got == {"exact_match": 0.5, "rouge_l": pytest.approx((1 + 2 * 0.75 / 1.75) / 2)}
    assert compute(["rouge_l"], [""], ["a"]) == {"rouge_l": 0.0}


def test_loss_is_weighted() -> None:
    got = compute(["loss", "perplexity"], [1.0, 3.0], [3, 1])
    assert got == {"loss": 1.5, "perplexity": pytest.approx(math.exp(1.5))}
    assert compute(["perplexity"], [1e4], None) == {"perplexity": math.inf}


@pytest.mark.parametrize("metric", ["matthews", "pearson", "spearman"])
@pytest.mark.parametrize("value", [0, 3, 0.1])
def test_a_constant_has_no_correlation(metric: str, value: float) -> None:
    constant, varied = np.full(7, value), np.arange(7)
    for pair in ((constant, varied), (varied, constant), (constant, constant)):
        if metric == "matthews":
            pair = (pair[0].astype(int), pair[1].astype(int))
        assert compute([metric], *pair) == {metric: 0.0}


def test_what_has_no_f1_is_zero_or_an_error() -> None:
    assert compute(["f1", "macro_f1"], [0, 0], [0, 0]) == {"f1": 0.0, "macro_f1": 1.0}
    with pytest.raises(DataError, match="use macro_f1"):
        compute(["f1"], [0, 2], [0, 1])


def test_numbers_that_are_none_give_no_correlation() -> None:
    assert compute(["pearson", "spearman"], [float("nan"), 1.0], [1.0, 2.0])["pearson"] == 0.0


def test_wrong_input_is_told() -> None:
    with pytest.raises(DataError, match="did you mean 'accuracy'"):
        compute(["acuracy"], [1], [1])
    with pytest.raises(DataError, match="2 predictions for 1 references"):
        compute(["accuracy"], [1, 2], [1])
    with pytest.raises(DataError, match="no predictions"):
        compute(["accuracy"], [], [])


def test_defaults() -> None:
    assert default_metrics("classification", "trec") == ["accuracy", "macro_f1"]
    assert default_metrics("regression", "glue/stsb") == ["pearson", "spearman"]
    assert default_metrics("classification", "glue/mrpc") == ["f1", "accuracy"]
    assert default_metrics("causal-lm") == ["loss", "perplexity"]
    with pytest.raises(DataError, match="did you mean 'classification'"):
        default_metrics("clasification")
