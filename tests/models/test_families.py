"""The facts of each model family, against transformers' own classes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from fedloom.models.families import FAMILIES, family_of, first_position
from fedloom.models.huggingface import find_sites

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "pad_token_id": 0,
}
OTHER_NAMES = {
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40},
    "distilbert": {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24, "vocab_size": 40},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_name_in_a_record_is_one_of_the_model(name: str) -> None:
    config = AutoConfig.for_model(name, **OTHER_NAMES.get(name, SMALL))
    family = FAMILIES[name]
    causal = "causal-lm" in family.packs or name in ("gemma", "gemma2", "phi")
    model = (AutoModelForCausalLM if causal else AutoModelForSequenceClassification).from_config(config)
    assert family_of(model) is family
    names = {path.rpartition(".")[2] for path, _ in model.named_modules()}
    assert set(find_sites(model, family.targets))
    assert {layer for group in family.siblings for layer in group} <= names
    assert not family.reader or family.reader in names


def test_positions_start_where_the_model_starts_them(tiny: Callable[[str], nn.Module]) -> None:
    assert first_position(tiny("bert")) == first_position(tiny("llama")) == first_position(nn.Linear(2, 2)) == 0
    assert first_position(tiny("roberta")) == 2  # its padding token is 1
    assert family_of(nn.Linear(2, 2)) is None
