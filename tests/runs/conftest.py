"""Tiny models and data on disk, as a user has them: a directory that transformers loads, a CSV, a JSONL."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

WORDS = [
    "how",
    "many",
    "who",
    "is",
    "what",
    "where",
    "did",
    "the",
    "of",
    "in",
    "city",
    "king",
    "year",
    "far",
    "high",
    "old",
]


def _tokenizer(**special: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*special.values(), *WORDS, "yes", "no", ":", "Question", "Answer"])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer BERT with its tokenizer."""
    from transformers import BertConfig, BertModel

    path = tmp_path_factory.mktemp("models") / "encoder"
    tokenizer = _tokenizer(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
        model = BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("models") / "decoder"
    tokenizer = _tokenizer(pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24)
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=64, **sizes)
        )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of 60 rows, three classes that a word gives away, and a column of two sites."""
    path = tmp_path_factory.mktemp("data") / "questions.csv"
    rng = np.random.default_rng(0)
    lines = ["text,label,site"]
    for i in range(60):
        first, label = [("who is", "person"), ("where is", "place"), ("how many", "number")][i % 3]
        rest = " ".join(rng.choice(WORDS, size=int(rng.integers(2, 8))))
        lines.append(f"{first} {rest},{label},{'north' if i % 2 else 'south'}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL of 40 prompts with an answer of one word."""
    path = tmp_path_factory.mktemp("data") / "dialogues.jsonl"
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for i in range(40):
            prompt = " ".join(rng.choice(WORDS, size=int(rng.integers(2, 6))))
            file.write(json.dumps({"prompt": prompt, "response": "yes" if i % 2 else "no"}) + "\n")
    return path


@pytest.fixture
def settings(encoder: Path, questions: Path) -> Callable[..., dict[str, Any]]:
    """A run's configuration on the tiny encoder; sections given as keyword arguments are merged in."""

    def make(**sections: dict[str, Any]) -> dict[str, Any]:
        values: dict[str, dict[str, Any]] = {
            "model": {"name": str(encoder), "dtype": "float32"},
            "task": {"data": str(questions), "holdout": 0.2},
            "lora": {"rank": 4, "alpha": 8.0},
            "clients": {"count": 3},
            "method": {"name": "fslora"},
            "train": {"rounds": 3, "batch_size": 4, "lr": 1e-2, "evaluate_every": 1},
        }
        for name, section in sections.items():
            values[name] = values.get(name, {}) | section
        return values

    return make
