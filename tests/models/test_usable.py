"""Models that load but cannot be trained on are refused, and the hash is of what is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fedloom
from fedloom.errors import ConfigError, ModelError
from fedloom.models.huggingface import load_base
from fedloom.models.usable import positions, row_length

from ..conftest import _tokenizer

Settings = Callable[..., dict[str, Any]]


@pytest.fixture
def model(encoder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny encoder that may be spoilt."""
    return Path(shutil.copytree(encoder, tmp_path / "model"))


def load(path: Path) -> Any:
    return load_base(str(path), kind="classification", num_labels=3)


def test_positions_by_family(tiny: Callable[[str], nn.Module]) -> None:
    found = {family: positions(tiny(family)) for family in ("bert", "roberta", "llama", "gpt2")}
    assert found == {"bert": 512, "roberta": 510, "llama": 2048, "gpt2": 64}
    ids = torch.full((1, 510), 5)
    assert tiny("roberta")(input_ids=ids).logits.isfinite().all()
    with pytest.raises((IndexError, RuntimeError)):
        tiny("roberta")(input_ids=torch.full((1, 511), 5))


def test_a_row_is_no_longer_than_the_model(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"task\.max_length is 1024, but .* 64 tokens: set .* at most 64"):
        fedloom.run(settings(task={"max_length": 1024}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    long = tmp_path / "long.csv"
    long.write_text("text,label\n" + "".join(f"{'who is ' * 50},{'ab'[i % 2]}\n" for i in range(20)))
    config = settings(task={"data": str(long)}, train={"rounds": 1})
    assert len(fedloom.run(config, tmp_path / "cut").rounds) == 2


def test_an_answer_needs_room_too(tiny: Callable[[str], nn.Module]) -> None:
    assert row_length(128, False, 20, tiny("gpt2")) == 44
    assert row_length(44, True, 20, tiny("gpt2")) == 44
    with pytest.raises(ConfigError, match=r"max_length is 45 and task\.max_new_tokens 20, but .* 64 tokens"):
        row_length(45, True, 20, tiny("gpt2"))
    with pytest.raises(ConfigError, match=r"lower task\.max_new_tokens"):
        row_length(128, False, 63, tiny("gpt2"))


def test_no_tokenizer_files(model: Path) -> None:
    for file in model.glob("*token*"):
        file.unlink()
    with pytest.raises(ModelError, match=r"knows no word|cannot be loaded"):
        load(model)


def test_more_words_than_embeddings(model: Path) -> None:
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = _tokenizer(**special)
    tokenizer.add_tokens(["one", "two", "three"])
    tokenizer.save_pretrained(model)
    with pytest.raises(ModelError, match=r"has tokens up to number .* embeddings"):
        load(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(model: Path, value: float) -> None:
    weights = load_file(model / "model.safetensors")
    key = next(key for key in weights if key.endswith("query.weight"))
    weights[key][0, 0] = value
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"query\.weight has a NaN or an infinite number"):
        load(model)


def as_bin(model: Path) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def test_a_stray_file_beside_the_weights_is_not_in_the_hash(model: Path) -> None:
    as_bin(model)
    save_file({"x": torch.zeros(1)}, model / "stray.safetensors")
    before = load(model).sha256
    (model / "stray.safetensors").unlink()
    assert load(model).sha256 == before
    weights = torch.load(model / "pytorch_model.bin")
    weights[next(iter(weights))] += 1
    torch.save(weights, model / "pytorch_model.bin")
    assert load(model).sha256 != before


def test_the_files_of_an_index_are_in_the_hash_and_in_the_directory(model: Path, tmp_path: Path) -> None:
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    index = model / "model.safetensors.index.json"

    def write(name: str) -> None:
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, name)}))

    save_file(weights, model / "part.safetensors", metadata={"format": "pt"})
    save_file(weights, tmp_path / "outside.safetensors", metadata={"format": "pt"})
    write("part.safetensors")
    before = load(model).sha256
    save_file({key: x + 1 for key, x in weights.items()}, model / "part.safetensors", metadata={"format": "pt"})
    assert load(model).sha256 != before
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "absent.safetensors"):
        write(name)
        with pytest.raises(ModelError, match="expected a file of the same directory"):
            load(model)
    for text in ("[]", "{}", '{"weight_map": {"a": 1}}', "[" * 10**5):
        index.write_text(text)
        with pytest.raises(ModelError, match=r"index\.json"):
            load(model)


def test_an_adapter_beside_the_model_is_refused(model: Path) -> None:
    (model / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds an adapter beside its model"):
        load(model)
