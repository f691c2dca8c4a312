"""Multiple choice: right answers as data sets write them, and scores against the model's own log-probabilities."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

import fedloom
from fedloom.data import choices
from fedloom.errors import ConfigError, DataError

QUESTIONS = [
    ("w1 w2", ["w3", "w4 w5 w6", "yes"], "w4 w5 w6"),
    ("w7", ["no", "w8 w9"], "B"),
    ("w10 w11 w12", ["w13 w14", "w15", "w1 w2 w3 w4"], "C"),
    ("w2", ["w3 w3", "w4"], "A"),
]


@pytest.mark.parametrize(("right", "index"), [(1, 1), ("no", 1), ("B", 1), ("b", 1), ("yes", 0), ("A", 0)])
def test_right_answers_are_indices_texts_or_letters(right: Any, index: int) -> None:
    rows = Dataset.from_dict(
        {"a": [right], "c": [["yes", "no"]], "arc": [{"text": ["yes", "no"], "label": ["A", "B"]}]}
    )
    for column in ("c", "arc", ["yes", "no"]):
        assert choices.resolve(rows, "a", column) == ([["yes", "no"]], [index])
        assert choices.with_answers(rows, "a", column)["a"][:] == [["yes", "no"][index]]


@pytest.mark.parametrize("right", [2, -1, "C", "maybe", 0.5])
def test_other_answers_are_told(right: Any) -> None:
    with pytest.raises(DataError, match=r"row 1: the right answer is .*, expected one of its choices"):
        choices.resolve(Dataset.from_dict({"a": [right]}), "a", ["yes", "no"])


def test_rows_without_choices_are_told() -> None:
    with pytest.raises(DataError, match=r"row 2 has .*expected a list of two choices"):
        choices.answers_of(Dataset.from_dict({"c": [["yes", "no"], ["yes"]]}), "c")
    with pytest.raises(DataError, match="no column 'd' of choices, the data has: c"):
        choices.answers_of(Dataset.from_dict({"c": [["yes", "no"]]}), "d")


@pytest.fixture
def run_values(decoder: Path, tmp_path: Path) -> dict[str, Any]:
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps({"q": q, "c": c, "a": a}) + "\n" for q, c, a in QUESTIONS))
    return {
        "model": {"name": str(decoder), "dtype": "float32"},
        "task": {
            "kind": "causal-lm",
            "data": str(file),
            "eval_data": str(file),
            "template": "Question: {q} Answer:{response}{end}",
            "response": "a",
            "choices": "c",
            "metrics": ["loss", *choices.METRICS],
        },
        "clients": {"count": 1},
        "method": {"name": "fedit"},
        "train": {"rounds": 0},
    }


def test_scores_are_of_the_models_own_probabilities(run_values: dict[str, Any], decoder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    scored = fedloom.run(run_values, tmp_path / "run").eval
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    model = AutoModelForCausalLM.from_pretrained(decoder)

    def likelihood(prompt: list[int], answer: list[int]) -> float:
        with torch.no_grad():
            told = model(torch.tensor([[1, *prompt, *answer]])).logits[0].log_softmax(-1)
        return sum(float(told[len(prompt) + i, token]) for i, token in enumerate(answer))

    right = dict.fromkeys(choices.METRICS, 0)
    for question, answers, gold in QUESTIONS:
        prompt = tokenizer(f"Question: {question} Answer:", add_special_tokens=False)["input_ids"]
        tokens = [tokenizer(x, add_special_tokens=False)["input_ids"] for x in answers]
        told = [likelihood(prompt, x) for x in tokens]
        wanted = answers.index(gold) if gold in answers else "ABC".index(gold)
        by_name = {
            "choice": told,
            "choice_per_char": [x / len(text) for x, text in zip(told, answers, strict=True)],
            "choice_per_token": [x / len(row) for x, row in zip(told, tokens, strict=True)],
            "choice_mutual": [x - likelihood([], row) for x, row in zip(told, tokens, strict=True)],
        }
        for name, scores in by_name.items():
            right[name] += scores.index(max(scores)) == wanted
    assert {name: scored[name] * len(QUESTIONS) for name in right} == right
    assert len(set(right.values())) > 1, "the questions tell the metrics apart"


def test_choices_and_their_metrics_come_together(run_values: dict[str, Any], tmp_path: Path) -> None:
    del run_values["task"]["choices"]
    with pytest.raises(ConfigError, match=r"metrics has choice, .*but task.choices is not set"):
        fedloom.run(run_values, tmp_path / "run")
