"""Tiny random models of each family, token rows and works for clients of different budgets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

from fedloom import lora
from fedloom.core import Client, State, Work
from fedloom.data.batches import Encoded, Kind
from fedloom.rng import generator
from fedloom.train.lora_linear import find_layers, shape_of

VOCABULARY = 40


@dataclass(frozen=True)
class Tiny:
    """A tiny model, what is adapted in it and what it is for."""

    model: nn.Module
    sites: list[str]
    heads: list[str]
    kind: Kind


def _build(name: str, layers: int = 2) -> Tiny:
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 24}
    gpt2 = {
        "vocab_size": VOCABULARY,
        "n_embd": 16,
        "n_layer": layers,
        "n_head": 2,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    model: Any
    if name == "bert":
        model, ends, heads = (
            BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, num_labels=3, **small)),
            ("query", "value", "output.dense"),
            ["classifier"],
        )
    elif name in ("roberta", "xlm-roberta"):
        configure: Any = RobertaConfig if name == "roberta" else XLMRobertaConfig
        config = configure(vocab_size=VOCABULARY, num_labels=1, pad_token_id=0, max_position_embeddings=130, **small)
        make: Any = RobertaForSequenceClassification if name == "roberta" else XLMRobertaForSequenceClassification
        model, ends, heads = make(config), ("query", "value"), ["classifier"]
    elif name == "llama":
        config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=1, pad_token_id=0, eos_token_id=1, **small)
        model, ends, heads = LlamaForCausalLM(config), ("q_proj", "v_proj", "down_proj"), []
    elif name == "qwen2":
        qwen2 = Qwen2Config(vocab_size=VOCABULARY, num_key_value_heads=1, pad_token_id=0, eos_token_id=1, **small)
        model, ends, heads = Qwen2ForCausalLM(qwen2), ("q_proj", "k_proj", "v_proj", "up_proj"), []
    elif name == "gpt2":
        model, ends, heads = GPT2LMHeadModel(GPT2Config(**gpt2)), ("c_attn", "mlp.c_fc"), []
    else:
        config = GPT2Config(**gpt2, num_labels=3, pad_token_id=0)
        model, ends, heads = GPT2ForSequenceClassification(config), ("c_attn",), ["score"]
    kinds: dict[str, Kind] = {
        "bert": "classification",
        "roberta": "regression",
        "xlm-roberta": "regression",
        "gpt2-classifier": "classification",
    }
    sites = [
        n
        for n, _ in model.named_modules()
        if (n.endswith(ends) and ".layer" in f".{n}") or n.endswith(("c_attn", "c_fc"))
    ]
    return Tiny(model, sites, heads, kinds.get(name, "causal-lm"))


@pytest.fixture
def build() -> Callable[..., Tiny]:
    """(name, layers = 2) -> a new tiny model: bert, roberta, xlm-roberta, llama, qwen2, gpt2, gpt2-classifier."""
    return _build


@pytest.fixture
def rows() -> Callable[..., Encoded]:
    """(n, kind, seed) -> random token rows of 4 to 11 tokens."""

    def make(n: int, kind: Kind, seed: int = 0) -> Encoded:
        rng = np.random.default_rng(seed)
        lengths = rng.integers(4, 12, n)
        targets: Any = None
        if kind == "classification":
            targets = rng.integers(0, 3, n)
        elif kind == "regression":
            targets = rng.normal(size=n).astype(np.float32)
        return Encoded(
            tokens=rng.integers(3, VOCABULARY, lengths.sum()).astype(np.int32),
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            pad_id=0,
            kind=kind,
            targets=targets,
            starts=rng.integers(1, lengths) if kind == "causal-lm" else None,
        )

    return make


@pytest.fixture
def works() -> Callable[..., list[tuple[Client, Work]]]:
    """(family, ranks, dtype) -> one client per rank with random A, B and the model's own head."""

    def make(
        family: Tiny, ranks: Sequence[int] = (2, 4, 8), dtype: torch.dtype = torch.float64
    ) -> list[tuple[Client, Work]]:
        sites = {site: shape_of(layer) for site, layer in find_layers(family.model, family.sites).items()}
        made = []
        for k, rank in enumerate(ranks):
            rng = generator(0, k, "work")
            state: State = lora.init(sites, rank, rng)
            state["B"] = {site: torch.randn(m, rank, generator=rng) * 0.1 for site, (m, _) in sites.items()}
            if family.heads:
                names = [n for n, _ in family.model.named_parameters() if n.startswith(tuple(family.heads))]
                state["head"] = {n: family.model.get_parameter(n).detach().clone() for n in names}
            state = {role: {site: x.to(dtype) for site, x in group.items()} for role, group in state.items()}
            made.append((Client(f"client-{k}", 10 * (k + 1), rank), Work(train=state, scale=1.5 - 0.25 * k)))
        return made

    return make
