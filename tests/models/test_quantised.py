"""Bases in 4 and 8 bits: the codes are bitsandbytes', and what is trained on them is what PEFT trains."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedloom import lora
from fedloom.core import Client, State, Work
from fedloom.data.batches import Encoded, Kind, collate
from fedloom.errors import ModelError
from fedloom.models import peft, quantised
from fedloom.models.huggingface import adopt, default_targets, find_sites, load_base
from fedloom.models.quantised import Quantization
from fedloom.rng import generator
from fedloom.train.optim import Settings
from fedloom.train.trainer import Trainer

pytest.importorskip("bitsandbytes")

HOW: list[Quantization] = ["nf4", "nf4-double", "int8"]
WORDS = 50


def tiny(family: str) -> Any:
    """A tiny random model; 96 is no multiple of a block of 64, so that blocks go over the ends of rows."""
    import transformers as tf

    small: dict[str, Any] = {"vocab_size": WORDS, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= {"initializer_range": 0.2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if family == "llama":
            return tf.LlamaForCausalLM(tf.LlamaConfig(**small, num_key_value_heads=2, intermediate_size=96))
        if family == "gpt2":
            return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=WORDS, n_positions=64, n_embd=64, n_layer=2, n_head=4))
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return tf.BertForSequenceClassification(
            tf.BertConfig(**small, **still, intermediate_size=96, num_labels=3, max_position_embeddings=64)
        )


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[str], str]:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    def save(family: str) -> str:
        path = tmp_path / family
        tiny(family).save_pretrained(str(path))
        core = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
        PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>").save_pretrained(str(path))
        return str(path)

    return save


def theirs(source: str, how: Quantization, kind: Kind, dtype: torch.dtype = torch.float32) -> Any:
    """What transformers and bitsandbytes make of a directory."""
    import transformers as tf

    four = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_use_double_quant": how == "nf4-double",
    }
    # By default it quantises BERT's classifier, too.
    keep = {"llm_int8_skip_modules": [kind == "causal-lm" and "lm_head" or "classifier"]}
    config = tf.BitsAndBytesConfig(**({"load_in_8bit": True} if how == "int8" else four), **keep)
    loader: Any = tf.AutoModelForCausalLM if kind == "causal-lm" else tf.AutoModelForSequenceClassification
    labels = {} if kind == "causal-lm" else {"num_labels": 3}
    return loader.from_pretrained(source, quantization_config=config, dtype=dtype, device_map={"": "cpu"}, **labels)


def rows(kind: Kind) -> Encoded:
    rng = np.random.default_rng(0)
    lengths = np.array([9, 5, 12])
    return Encoded(
        tokens=rng.integers(3, WORDS, lengths.sum()).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        pad_id=0,
        kind=kind,
        targets=rng.integers(0, 3, 3) if kind == "classification" else None,
        starts=np.array([3, 2, 5]) if kind == "causal-lm" else None,
    )


def gradient_in_peft(model: nn.Module, state: State, data: Encoded, targets: list[str]) -> State:
    """Of the mean loss, by PEFT and autograd, in training mode, in which bitsandbytes rounds no inputs."""
    from peft import LoraConfig, get_peft_model

    adapted: Any = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))  # type: ignore[arg-type]
    adapted.train()
    leaves: dict[tuple[str, str], nn.Parameter] = {}
    for role in ("A", "B"):
        for site, x in state[role].items():
            leaves[role, site] = adapted.get_parameter(f"base_model.model.{site}.lora_{role}.default.weight")
            leaves[role, site].data.copy_(x)
    batch = collate([(data, np.arange(3))])
    made = adapted(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    if data.kind == "classification":
        loss = nn.functional.cross_entropy(made, torch.from_numpy(data.targets))
    else:
        assert data.starts is not None
        where = [(i, j) for i in range(3) for j in range(data.starts[i], data.lengths[i])]
        row, column = torch.tensor(where).T
        loss = nn.functional.cross_entropy(made[row, column - 1], batch.input_ids[row, column])
    found = torch.autograd.grad(loss, list(leaves.values()))
    made_state: State = {"A": {}, "B": {}}
    for (role, site), x in zip(leaves, found, strict=True):
        made_state[role][site] = x
    return made_state


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_gradients_are_those_of_peft_on_the_same_base(
    saved: Callable[[str], str], family: str, how: Quantization
) -> None:
    kind: Kind = "causal-lm" if family == "llama" else "classification"
    source = saved(family)
    base = load_base(source, kind=kind, num_labels=3, quantization=how)
    reference = theirs(source, how, kind)
    targets = [*default_targets(base.model), "down_proj" if family == "llama" else "intermediate.dense"]
    sites = find_sites(base.model, targets)
    state = lora.init(sites, 4, generator(0, "quantised"))
    state["B"] = {s: torch.randn(x.shape, generator=generator(0, s)) * 0.1 for s, x in state["B"].items()}
    wanted = gradient_in_peft(reference, state, rows(kind), targets)
    head = {"head": base.head_weights} if base.head else {}
    settings = Settings(optimizer="sgd", lr=1.0, batch_size=3, local_steps=1, clip=None)
    for kernels in ("auto", "off"):
        with Trainer(base.model, sites, base.head, settings=settings, kernels=kernels) as trainer:
            work = Work(train=state | head, scale=2.0)
            trainer.evaluate(work, rows(kind))  # leaves the codes as they are
            (made,) = trainer.fit([(Client("a", 3, 4), work)], [rows(kind)], 1)
        for role in ("A", "B"):
            for site, x in wanted[role].items():
                step = state[role][site] - made.state[role][site]
                torch.testing.assert_close(step, x, rtol=0, atol=1e-5 * float(x.abs().max()))
