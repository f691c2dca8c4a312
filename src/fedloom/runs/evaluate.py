"""Scores of a model on held-out rows: the global model, a client's own, or a saved adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedloom.core import Work
from fedloom.data import choices, metrics
from fedloom.data.chat import last_answer
from fedloom.data.choices import Choices
from fedloom.data.tokenize import Encoded, first_token
from fedloom.runs.experiment import Experiment
from fedloom.train.trainer import Evaluation, Scorer

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class HeldOut:
    """Rows that a model is scored on, as tokens and as they were."""

    rows: Encoded
    table: Dataset
    choices: Choices | None = None
    answers: Encoded | None = None
    """A row for each of the choices."""


def common(e: Experiment) -> HeldOut:
    """The rows that all models are scored on."""
    found = e.tables.choices
    return HeldOut(e.rows.eval, e.tables.eval, found, None if found is None else e.rows.common_answers)


def own(e: Experiment, client: str) -> HeldOut:
    """The rows that one client is scored on: its own where clients hold rows out."""
    if not e.held_out:
        return common(e)
    rows, task = e.held_out[client], e.config.task
    table = e.tables.train.select(rows)
    found = None if task.choices is None else choices.flat(table, task.response, task.choices)
    answers = None if found is None else e.rows.answers(table, found)
    return HeldOut(e.rows.train.select(rows), table, found, answers)


def score(e: Experiment, work: Work, held: HeldOut | None = None) -> dict[str, float]:
    """Metric name -> value of the model that `work` describes, on the common rows by default; `loss` always among them."""
    held = common(e) if held is None else held
    return _metrics(e, work, held, _scorer(e).evaluate_together([work], [held.rows])[0])


def scores(e: Experiment, works: Sequence[tuple[str, Work]]) -> list[dict[str, float]]:
    """What `score` says of each client's model on its own rows, those of many clients in one pass where it pays."""
    held = [own(e, client) for client, _ in works]
    found = _scorer(e).evaluate_together([work for _, work in works], [x.rows for x in held])
    return [_metrics(e, work, x, result) for (_, work), x, result in zip(works, held, found, strict=True)]


def _metrics(e: Experiment, work: Work, held: HeldOut, result: Evaluation) -> dict[str, float]:
    rows = held.rows
    values = {"loss": result.loss}
    names = [name for name in e.tables.metrics if name not in ("loss", "perplexity")]
    if "perplexity" in e.tables.metrics:
        values["perplexity"] = math.exp(min(result.loss, 700.0))
    texts = [name for name in names if name in metrics.NEEDS_TEXT]
    given = e.given.metrics
    if e.config.task.kind == "causal-lm":
        answers = _answers(e, work, held) if texts or given else ([], [])
        values |= metrics.compute(texts, *answers) if texts else {}
        values |= {name: float(function(*answers)) for name, function in given.items()}
    values |= _choices(e, work, held, [name for name in names if name in choices.METRICS])
    rest = [name for name in names if name not in metrics.NEEDS_TEXT]
    if rest and result.predictions is not None and rows.targets is not None:
        values |= metrics.compute(rest, result.predictions.numpy(), rows.targets)
    if given and result.predictions is not None and rows.targets is not None:
        values |= {name: float(function(result.predictions.numpy(), rows.targets)) for name, function in given.items()}
    return values


def _scorer(e: Experiment) -> Scorer:
    return e.trainer if e.elsewhere is None else e.elsewhere.scorer


def _choices(e: Experiment, work: Work, held: HeldOut, names: list[str]) -> dict[str, float]:
    """Shares of the held-out rows whose right answer the model finds likeliest."""
    found, rows = held.choices, held.answers
    if not names or found is None or rows is None:
        return {}
    assert rows.starts is not None, "rows of a causal LM have a start"
    likelihoods = _scorer(e).log_likelihoods(work, rows)
    unprompted = None
    if "choice_mutual" in names:
        unprompted = _scorer(e).log_likelihoods(work, choices.alone(rows, first_token(e.base.tokenizer)))
    tokens = (rows.lengths - rows.starts).astype(float)
    return {name: choices.score(name, found, likelihoods, tokens, unprompted) for name in names}


def _answers(e: Experiment, work: Work, held: HeldOut) -> tuple[list[str], list[str]]:
    """What the model writes after each prompt, and what it should have written."""
    made = _scorer(e).generate(work, held.rows, e.config.task.max_new_tokens)
    decode = e.base.tokenizer.decode
    if e.tables.chats:
        references = [last_answer(turns) for turns in held.table[e.tables.text[0]][:]]
    else:
        references = held.table[e.config.task.response][:]
    return [str(decode(tokens, skip_special_tokens=True)).strip() for tokens in made], [
        str(x).strip() for x in references
    ]


def summary(
    examples: Mapping[str, int], scores: Mapping[str, Mapping[str, float]]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """(metric -> mean over the clients, weighted by the rows that they train on; `std`, `min` and `max` -> of each metric)."""
    if not examples:
        return {}, {}
    names = list(scores[next(iter(examples))])
    table = np.asarray([[scores[client][name] for name in names] for client in examples])
    weights = np.asarray(list(examples.values()), np.float64)
    spread = {"std": table.std(0), "min": table.min(0), "max": table.max(0)}

    def told(values: NDArray[np.float64]) -> dict[str, float]:
        return dict(zip(names, values.tolist(), strict=True))

    return told(np.average(table, axis=0, weights=weights)), {word: told(values) for word, values in spread.items()}
