"""Scores of a model on held-out rows: the global model, a client's own, or a saved adapter."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from fedloom.core import Method, State, Work
from fedloom.data import metrics
from fedloom.data.batches import Encoded
from fedloom.runs.assemble import Parts

NEEDS_TEXT = frozenset({"exact_match", "rouge_l"})
"""Metrics of a causal LM that compare the answer it writes."""


def global_work(parts: Parts, state: State) -> Work:
    """The server's model, as work that trains nothing."""
    method, server = parts.method, parts.evaluator
    return method.prepare(method.broadcast(state, server, 0), parts.head, parts.sites, server, 0)


def client_work(parts: Parts, state: State, own: State, client: str) -> Work:
    """The model of one client: what the server has, with what the client keeps."""
    method = parts.method
    asked = next(c for c in parts.clients if c.id == client)
    return method.prepare(method.broadcast(state, asked, 0), own, parts.sites, asked, 0)


def score(parts: Parts, method: Method, work: Work, rows: Encoded) -> dict[str, float]:
    """Metric name -> value of the model that `work` describes; `loss` always among them."""
    result = parts.trainer.evaluate(method, work, rows)
    values = {"loss": result.loss}
    names = [name for name in parts.tables.metrics if name not in ("loss", "perplexity")]
    if "perplexity" in parts.tables.metrics:
        values["perplexity"] = math.exp(min(result.loss, 700.0))
    texts = [name for name in names if name in NEEDS_TEXT]
    if texts:
        values |= metrics.compute(texts, *_answers(parts, method, work, rows))
    rest = [name for name in names if name not in NEEDS_TEXT]
    if rest and result.predictions is not None and rows.targets is not None:
        values |= metrics.compute(rest, result.predictions.numpy(), rows.targets)
    return values


def _answers(parts: Parts, method: Method, work: Work, rows: Encoded) -> tuple[list[str], list[str]]:
    """What the model writes after each prompt, and what it should have written."""
    made = parts.trainer.generate(method, work, rows, parts.config.task.max_new_tokens)
    decode = parts.base.tokenizer.decode
    references = parts.tables.eval[parts.config.task.response]
    return [str(decode(tokens, skip_special_tokens=True)).strip() for tokens in made], [
        str(x).strip() for x in references
    ]


def mean(scores: Iterable[dict[str, float]], weights: Iterable[int]) -> dict[str, float]:
    """Mean of each metric, weighted."""
    every, w = list(scores), np.asarray(list(weights), np.float64)
    return {name: float(np.average([s[name] for s in every], weights=w)) for name in every[0]}
