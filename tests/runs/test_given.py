"""Own objects in Python: rows, a model, metrics and a sampler in place of names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, DatasetDict
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

import fedloom
from fedloom.errors import ConfigError, DataError, FedloomError, ModelError

Settings = Callable[..., dict[str, Any]]


@pytest.fixture
def rows(questions: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pd.read_csv(questions)[["text", "label"]].to_dict("records")
    return found


def config(settings: Settings) -> dict[str, Any]:
    values = settings(method={"name": "fedit"}, train={"rounds": 2})
    del values["task"], values["clients"]
    return values


def test_each_kind_of_rows_trains_the_same(settings: Settings, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    forms = (rows, Dataset.from_list(rows), pd.DataFrame(rows))
    results = [fedloom.run(config(settings), tmp_path / str(i), data=x, eval_data=x) for i, x in enumerate(forms)]
    adapters = {(r.adapter_dir / "adapter_model.safetensors").read_bytes() for r in results}
    assert len(adapters) == 1 and results[0].eval["loss"] > 0


def test_rows_by_client_model_metrics_and_sampler(
    settings: Settings, rows: list[dict[str, Any]], encoder: Path, tmp_path: Path
) -> None:
    values = config(settings)
    del values["model"]
    values["model"] = {"dtype": "float32"}
    asked: list[int] = []

    def first(clients: list[Any], t: int) -> list[Any]:
        asked.append(t)
        return clients[:1]

    def never(predictions: Any, references: Any) -> float:
        assert predictions.shape == references.shape
        return float(np.mean(predictions != references))

    labels = len({row["label"] for row in rows})
    given: dict[str, Any] = {
        "data": {"north": rows[:20], "south": rows[20:50]},
        "eval_data": rows[50:],
        "tokenizer": AutoTokenizer.from_pretrained(encoder),
        "metrics": {"error": never},
        "sampler": first,
    }
    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=labels)
    result = fedloom.run(values, tmp_path / "run", model=model, **given)
    manifest = json.loads((result.path / "manifest.json").read_text())
    assert set(manifest["clients"]) == {"north", "south"} and manifest["rows"]["train"] == 50
    assert [record["clients"] for record in result.rounds] == [[], ["north"], ["north"]] and asked == [1, 2]
    assert result.eval["error"] == pytest.approx(1 - result.eval["accuracy"])
    base = json.loads((result.adapter_dir / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(encoder)

    shorter = fedloom.run(values | {"train": values["train"] | {"rounds": 1}}, tmp_path / "two", model=model, **given)
    config_file = shorter.path / "run.toml"
    config_file.write_text(config_file.read_text().replace("rounds = 1", "rounds = 2"))
    with pytest.raises(FedloomError, match=r"given in Python: give"):
        fedloom.resume(shorter.path, accept_changes=True, back_to=0)
    again = fedloom.resume(shorter.path, accept_changes=True, back_to=0, model=model, **given)
    ours, theirs = (r.adapter_dir / "adapter_model.safetensors" for r in (again, result))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_held_out_part_leaves_every_client_some_rows(
    settings: Settings, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    values = config(settings) | {"task": {"holdout": 0.2}}
    result = fedloom.run(values, tmp_path / "run", data={"a": rows[:2], "b": rows[2:40], "c": rows[40:]})
    assert set(json.loads((result.path / "manifest.json").read_text())["clients"]) == {"a", "b", "c"}


def test_conversations(settings: Settings, decoder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'Question' if m['role'] == 'user' else 'Answer' }} : {{ m['content'] }} "
        "{% endfor %}{% if add_generation_prompt %}Answer : {% endif %}"
    )
    chats = [
        [
            {"role": "user", "content": "who is the king"},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": "where is the city"},
            {"role": "assistant", "content": "far high"},
        ]
    ] * 8
    values = config(settings) | {"model": {"name": str(decoder), "dtype": "float32"}}
    values["task"] = {"kind": "causal-lm", "metrics": ["loss", "exact_match"], "max_new_tokens": 3}
    from transformers import AutoModelForCausalLM

    seen: list[Any] = []

    def note(written: Any, wanted: Any) -> float:
        seen.extend(wanted)
        return float(len(written))

    result = fedloom.run(
        values,
        tmp_path / "run",
        model=AutoModelForCausalLM.from_pretrained(decoder),
        tokenizer=tokenizer,
        data=[{"messages": chat} for chat in chats],
        eval_data=[{"messages": chats[0]}],
        metrics={"answers": note},
    )
    assert result.eval["answers"] == 1.0 and set(seen) == {"far high"}
    assert result.rounds[-1]["train_loss"] < result.rounds[1]["train_loss"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "data is a list, expected a datasets.Dataset"),
        (["a"], "data is a list"),
        ({"a": 3}, r"data\['a'\] is a int"),
        (DatasetDict(train=Dataset.from_dict({"text": ["a"]})), r"one of its splits \(train\)"),
        ({"a": [{"text": "x", "label": "y"}], "b": [{"text": 1, "label": "y"}]}, "different types"),
    ],
)
def test_what_is_no_rows(settings: Settings, data: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        fedloom.run(config(settings), tmp_path / "run", data=data)
    assert not (tmp_path / "run").exists()


def test_what_is_left_aside(settings: Settings, rows: list[dict[str, Any]], encoder: Path, tmp_path: Path) -> None:
    tokens = AutoModelForTokenClassification.from_pretrained(encoder)
    with pytest.raises(ModelError, match=r"got a BertForTokenClassification .* token classification .* left aside"):
        fedloom.run(config(settings), tmp_path / "run", model=tokens, tokenizer=3, data=rows)
    with pytest.raises(ConfigError, match="token-classification is left aside"):
        fedloom.run(config(settings) | {"task": {"kind": "token-classification"}}, tmp_path / "run", data=rows)
    two = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=7)
    with pytest.raises(ModelError, match="num_labels = 7"):
        fedloom.run(config(settings), tmp_path / "run", model=two, tokenizer=3, data=rows)
    with pytest.raises(ModelError, match="without its tokenizer"):
        fedloom.run(config(settings), tmp_path / "run", model=two, data=rows)
    with pytest.raises(ConfigError, match="cannot reach other processes"):
        fedloom.run(config(settings) | {"engine": {"name": "flower"}}, tmp_path / "run", data=rows)
    with pytest.raises(ConfigError, match="cannot reach the workers"):
        fedloom.run(config(settings) | {"engine": {"name": "ray"}}, tmp_path / "run", model=two, tokenizer=3, data=rows)
