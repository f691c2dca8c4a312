"""Tiny random models of each family, with layers that are not square."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

VOCAB = 60


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, num_labels=3
    )
    return BertForSequenceClassification(config)


def _roberta() -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        num_labels=3,
        pad_token_id=1,
    )
    return RobertaForSequenceClassification(config)


def _llama_config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        num_labels=3,
        pad_token_id=0,
        tie_word_embeddings=True,
    )


def _llama() -> nn.Module:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(_llama_config())


def _llama_classifier() -> nn.Module:
    from transformers import LlamaForSequenceClassification

    return LlamaForSequenceClassification(_llama_config())


def _gpt2_config() -> Any:
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4, num_labels=3, pad_token_id=0, eos_token_id=0
    )


def _gpt2() -> nn.Module:
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel(_gpt2_config())


def _gpt2_classifier() -> nn.Module:
    from transformers import GPT2ForSequenceClassification

    return GPT2ForSequenceClassification(_gpt2_config())


_MAKERS: dict[str, Callable[[], nn.Module]] = {
    "bert": _bert,
    "roberta": _roberta,
    "llama": _llama,
    "llama-classifier": _llama_classifier,
    "gpt2": _gpt2,
    "gpt2-classifier": _gpt2_classifier,
}


@pytest.fixture
def tiny() -> Callable[[str], nn.Module]:
    """Family -> a frozen tiny model of it, the same weights at every call."""

    def make(family: str) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _MAKERS[family]().requires_grad_(False).eval()

    return make


@pytest.fixture
def ids() -> torch.Tensor:
    """(3, 7) token ids without padding."""
    return torch.randint(2, VOCAB, (3, 7), generator=torch.Generator().manual_seed(1))
