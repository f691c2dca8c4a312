"""Scores of a model on held-out rows: the global model, a client's own, or a saved adapter."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from fedloom.core import Work
from fedloom.data import choices, metrics
from fedloom.data.chat import last_answer
from fedloom.data.tokenize import Encoded, first_token
from fedloom.runs.experiment import Experiment
from fedloom.train.trainer import Scorer


def score(e: Experiment, work: Work, rows: Encoded | None = None) -> dict[str, float]:
    """Metric name -> value of the model that `work` describes, on the held-out rows by default; `loss` always among them."""
    rows = e.rows.eval if rows is None else rows
    result = _scorer(e).evaluate(work, rows)
    values = {"loss": result.loss}
    names = [name for name in e.tables.metrics if name not in ("loss", "perplexity")]
    if "perplexity" in e.tables.metrics:
        values["perplexity"] = math.exp(min(result.loss, 700.0))
    texts = [name for name in names if name in metrics.NEEDS_TEXT]
    own = e.given.metrics
    if e.config.task.kind == "causal-lm":
        answers = _answers(e, work, rows) if texts or own else ([], [])
        values |= metrics.compute(texts, *answers) if texts else {}
        values |= {name: float(function(*answers)) for name, function in own.items()}
    values |= _choices(e, work, [name for name in names if name in choices.METRICS])
    rest = [name for name in names if name not in metrics.NEEDS_TEXT]
    if rest and result.predictions is not None and rows.targets is not None:
        values |= metrics.compute(rest, result.predictions.numpy(), rows.targets)
    if own and result.predictions is not None and rows.targets is not None:
        values |= {name: float(function(result.predictions.numpy(), rows.targets)) for name, function in own.items()}
    return values


def _scorer(e: Experiment) -> Scorer:
    return e.trainer if e.elsewhere is None else e.elsewhere.scorer


def _choices(e: Experiment, work: Work, names: list[str]) -> dict[str, float]:
    """Shares of the held-out rows whose right answer the model finds likeliest."""
    if not names or e.tables.choices is None:
        return {}
    rows = e.rows.choices
    assert rows.starts is not None, "rows of a causal LM have a start"
    likelihoods = _scorer(e).log_likelihoods(work, rows)
    unprompted = None
    if "choice_mutual" in names:
        unprompted = _scorer(e).log_likelihoods(work, choices.alone(rows, first_token(e.base.tokenizer)))
    tokens = (rows.lengths - rows.starts).astype(float)
    return {name: choices.score(name, e.tables.choices, likelihoods, tokens, unprompted) for name in names}


def _answers(e: Experiment, work: Work, rows: Encoded) -> tuple[list[str], list[str]]:
    """What the model writes after each prompt, and what it should have written."""
    made = _scorer(e).generate(work, rows, e.config.task.max_new_tokens)
    decode = e.base.tokenizer.decode
    if e.tables.chats:
        references = [last_answer(turns) for turns in e.tables.eval[e.tables.text[0]]]
    else:
        references = e.tables.eval[e.config.task.response]
    return [str(decode(tokens, skip_special_tokens=True)).strip() for tokens in made], [
        str(x).strip() for x in references
    ]


def mean(scores: Iterable[dict[str, float]], weights: Iterable[int]) -> dict[str, float]:
    """Mean of each metric, weighted."""
    every, w = list(scores), np.asarray(list(weights), np.float64)
    return {name: float(np.average([s[name] for s in every], weights=w)) for name in every[0]}
