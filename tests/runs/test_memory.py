"""How much memory training takes, and cohorts that follow from it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

import fedloom
from fedloom.errors import RoundError
from fedloom.runs import memory
from fedloom.runs.memory import Memory
from fedloom.train.trainer import Trainer

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

QWEN = {
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}


def test_a_true_shape_is_estimated_as_it_was_measured() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **QWEN))
    tokens = 4 * 256
    need = memory.memory(model, torch.bfloat16, tokens=tokens, answers=tokens // 4, trained=540_000)
    assert need.base == pytest.approx(0.99e9, rel=0.02)
    assert need.total(4) - need.base == pytest.approx(6.2e9, rel=0.4)  # measured at four clients of 4 x 256
    kept = memory.memory(model, torch.bfloat16, tokens=tokens, answers=0, trained=0, checkpointing=True)
    coded = memory.memory(model, torch.bfloat16, tokens=tokens, answers=0, trained=0, int8_products=True)
    # Query, out, gate, up and down of 24 blocks, and keys and values of 128 features; by rows and by columns.
    assert coded.once == 2 * 24 * (2 * 896 * 896 + 2 * 128 * 896 + 3 * 896 * 4864)
    assert kept.client < 0.15 * memory.memory(model, torch.bfloat16, tokens=tokens, answers=0, trained=0).client


@pytest.mark.parametrize(
    ("parameters", "tokens", "device", "free", "expected"),
    [
        (22_000_000, 200, CPU, None, 20),
        (22_000_000, 10, CPU, None, 32),
        (22_000_000, 9000, CPU, None, 1),
        (22_000_000, 200, CPU, 10_000, 5),  # a half of it, at 1,000 a client
        (22_000_000, 200, CPU, 0, 1),
        (500_000_000, 200, CPU, None, 1),
        (500_000_000, 200, CUDA, 1 << 40, 20),
    ],
)
def test_cohorts(parameters: int, tokens: float, device: torch.device, free: int | None, expected: int) -> None:
    assert memory.cohort(Memory(0, 1000), parameters, tokens, device, free) == expected


def test_free_memory_of_this_machine() -> None:
    found = memory.free(CPU)
    assert found is None or 0 < found < 1 << 50


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: x")]
)
def test_a_cohort_without_memory_is_halved(
    settings: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    config = settings(clients={"count": 5}, method={"name": "fedit"}, engine={"cohort": 5}, train={"rounds": 2})
    whole = fedloom.run(config, tmp_path / "whole")
    fit = Trainer.fit
    asked: list[int] = []

    def small(self: Trainer, works: Any, data: Any, t: int, part: int = 0) -> Any:
        asked.append(len(works))
        if len(works) > 2:
            raise error
        return fit(self, works, data, t, part)

    monkeypatch.setattr(Trainer, "fit", small)
    halved = fedloom.run(config, tmp_path / "halved")
    assert asked == [5, 3, 2, 1, 2, 2, 2, 1]  # the second round begins with what went well
    assert halved.rounds[1]["engine"] == {"out_of_memory": 2, "cohort": 2} and "engine" not in halved.rounds[2]
    assert halved.eval["loss"] == pytest.approx(whole.eval["loss"], abs=1e-5)

    monkeypatch.setattr(Trainer, "fit", lambda *a, **k: (_ for _ in ()).throw(error))
    with pytest.raises(RoundError, match="no memory to train even one client"):
        fedloom.run(config, tmp_path / "none")


def test_a_cohort_that_really_has_no_memory_is_halved(
    settings: Callable[..., dict[str, Any]], encoder: Path, tmp_path: Path
) -> None:
    """In a process that may take 400 MiB more: an inner layer takes 128 of them for one client, or for 32 rows to be scored."""
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=4096)
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)).save_pretrained(
        tmp_path / "m"
    )
    tokenizer.save_pretrained(tmp_path / "m")
    rows = [f"{'who is ' * 30},{'ab'[i % 2]}" for i in range(600)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *rows]))
    config = settings(
        model={"name": str(tmp_path / "m")},
        task={"data": str(tmp_path / "rows.csv"), "holdout": 0.4},
        clients={"count": 8},
        method={"name": "fedit"},
        engine={"cohort": 8},
        train={"rounds": 1, "local_steps": 1, "batch_size": 32},
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    program = Path(__file__).parent / "little_memory.py"
    child = [sys.executable, str(program), str(tmp_path / "config.json"), str(tmp_path / "little"), str(400 << 20)]
    subprocess.run(child, check=True)
    found = [json.loads(line) for line in (tmp_path / "little" / "rounds.jsonl").read_text().splitlines()][1]
    whole = fedloom.run(config, tmp_path / "whole").rounds[1]
    assert found["engine"]["out_of_memory"] > 0 and found["engine"]["cohort"] < 8 and "engine" not in whole
    assert found["clients"] == whole["clients"] and len(found["clients"]) == 8 and not found["dropped"]
    assert found["eval"]["loss"] == pytest.approx(whole["eval"]["loss"], abs=1e-5)
    assert json.loads((tmp_path / "little" / "manifest.json").read_text())["scored_at_once"] < 8 * 32
