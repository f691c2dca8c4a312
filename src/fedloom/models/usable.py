"""Whether a loaded model can be trained on text: words that it knows, finite weights, and how long a row may be."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fedloom.errors import ConfigError, ModelError
from fedloom.models.quantised import is_coded, not_finite

_AT_ONCE = 1 << 22
"""Weights that are looked at together: as float32, which a processor sums them in, they would take twice the file's memory."""


def check_usable(name: str, model: Any, tokenizer: Any) -> None:
    """Raise ModelError for a tokenizer without words, or with more than there are embeddings, and for weights not finite."""
    vocabulary = tokenizer.get_vocab()
    marks = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab(), "▁", ""}
    if vocabulary.keys() <= marks:
        raise ModelError(
            f"the tokenizer of {name!r} knows no word, only {len(vocabulary)} special tokens: its files are missing, "
            "expected those that the model was trained with (tokenizer.json) beside config.json"
        )
    embeddings = model.get_input_embeddings()
    last = max(vocabulary.values())
    if isinstance(embeddings, nn.Embedding) and last >= embeddings.num_embeddings:
        raise ModelError(
            f"the tokenizer of {name!r} has tokens up to number {last}, and the model {embeddings.num_embeddings} "
            "embeddings: expected the tokenizer that the model was trained with"
        )
    if (key := not_finite(model)) is not None:
        raise _damaged(name, key)
    for key, x in model.named_parameters():
        if is_coded(x):
            x = x.dequantize()
        if x.is_floating_point() and not all(_finite(part) for part in x.detach().reshape(-1).split(_AT_ONCE)):
            raise _damaged(name, key)


def _finite(x: torch.Tensor) -> bool:
    """A sum is finite only if all are: the exact look is for those few whose sum is not."""
    return bool(torch.isfinite(x.sum(dtype=torch.float32))) or bool(torch.isfinite(x).all())


def _damaged(name: str, key: str) -> ModelError:
    return ModelError(
        f"the weights of {name!r} are not finite ({key} has a NaN or an infinite number): get the files again"
    )


def positions(model: Any) -> int | None:
    """Tokens that a row may have, or None where the architecture does not say. RoBERTa counts from behind its padding token."""
    most = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(most, int) or most < 1:
        return None
    for key, module in model.named_modules():
        if key.rpartition(".")[2] == "position_embeddings" and getattr(module, "padding_idx", None) is not None:
            return most - int(module.padding_idx) - 1
    return most


def row_length(max_length: int, asked: bool, answer: int, model: Any) -> int:
    """Tokens that a row is cut to: `max_length`, or what the model has positions for where that was not `asked` for.

    `answer`: tokens that are written after a row's prompt. Raises ConfigError for more than the model has.
    """
    most = positions(model)
    if most is None or max_length + answer <= most:
        return max_length
    room = most - answer
    if asked or room < 2:
        raise ConfigError(
            f"task.max_length is {max_length}"
            + (f" and task.max_new_tokens {answer}" if answer else "")
            + f", but the model has positions for {most} tokens: "
            + (f"set task.max_length to at most {room}" if room >= 2 else "lower task.max_new_tokens")
        )
    return room
