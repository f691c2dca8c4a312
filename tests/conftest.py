"""Test session: one torch thread (tiny models are slower with more), no hub; tiny models and data as a user has them."""

import json
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
# Other packages import Ray when they find it, and it reads these when it is imported.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

import hypothesis
import numpy as np
import pytest
import torch

from fedloom.data import packaged

torch.set_num_threads(1)

# `HYPOTHESIS_PROFILE=long pytest -m fuzz` looks longer, and elsewhere each time.
hypothesis.settings.register_profile("ci", max_examples=100, deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("long", max_examples=20_000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="the one seed of a simulated federation to repeat")
    parser.addoption("--seeds", type=int, default=200, help="how many simulated federations to play")
    parser.addoption("--every-fault", action="store_true", help="every fault at every write of a run, not two")


@pytest.fixture
def need() -> Callable[[str], None]:
    """Skip where a packaged model or data set is not installed; in CI, fail."""

    def check(name: str) -> None:
        if packaged.locate(name) is None:
            if os.environ.get("CI") == "true":
                pytest.fail(packaged.absent(name))
            pytest.skip(packaged.absent(name))

    return check


@pytest.fixture(scope="session", autouse=True)
def model_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Converted models go to a directory of this session, unless FEDLOOM_CACHE names one to keep."""
    with pytest.MonkeyPatch.context() as patch:
        if "FEDLOOM_CACHE" not in os.environ:
            patch.setenv("FEDLOOM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


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
    return _bert(tmp_path_factory.mktemp("models") / "encoder", layers=2)


@pytest.fixture(scope="session")
def deep_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of twelve layers: layer.10 comes before layer.2 in the alphabet, and key before query."""
    return _bert(tmp_path_factory.mktemp("models") / "deep", layers=12)


def _bert(path: Path, layers: int) -> Path:
    from transformers import BertConfig, BertModel

    tokenizer = _tokenizer(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = dict(hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=24)
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
