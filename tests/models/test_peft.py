from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedloom import lora
from fedloom.core import Group
from fedloom.errors import ModelError
from fedloom.models.huggingface import find_sites, head_group, is_conv1d
from fedloom.models.peft import WEIGHTS, merge, read_adapter, write_adapter

Tiny = Callable[[str], nn.Module]

CASES = [
    ("bert", "classification", ["query", "value", "intermediate.dense"]),
    ("roberta", "classification", ["query", "dense"]),  # `dense` is also the name of a layer of the head
    ("llama", "causal-lm", ["q_proj", "v_proj", "down_proj"]),
    ("llama-classifier", "regression", ["v_proj", "gate_proj"]),
    ("gpt2", "causal-lm", ["c_attn", "mlp.c_fc"]),
    ("gpt2-classifier", "classification", ["c_attn"]),
]


def factors(model: nn.Module, targets: list[str], rank: int, mixed: bool) -> tuple[Group, Group]:
    g = torch.Generator().manual_seed(3)
    A: Group = {}
    B: Group = {}
    for i, (site, (m, n)) in enumerate(find_sites(model, targets).items()):
        r = rank + (i % 3 if mixed else 0)
        A[site] = torch.randn(r, n, generator=g) * 0.1
        B[site] = torch.randn(m, r, generator=g) * 0.1
    return A, B


def random_head(model: nn.Module) -> Group:
    g = torch.Generator().manual_seed(4)
    return {name: torch.randn(x.shape, generator=g) * 0.3 for name, x in head_group(model).items()}


def by_hand(model: nn.Module, A: Group, B: Group, scale: float, head: Group) -> nn.Module:
    changed = copy.deepcopy(model)
    modules, parameters = dict(changed.named_modules()), dict(changed.named_parameters())
    for site in A:
        product = scale * B[site] @ A[site]
        parameters[f"{site}.weight"].add_(product.T if is_conv1d(modules[site]) else product)
    for name, x in head.items():
        parameters[name].copy_(x)
    return changed


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return result


@pytest.mark.parametrize(("family", "kind", "targets"), CASES)
@pytest.mark.parametrize(("rslora", "mixed"), [(False, False), (False, True), (True, True)])
def test_peft_computes_the_same_logits(
    tiny: Tiny, ids: torch.Tensor, tmp_path: Path, family: str, kind: Any, targets: list[str], rslora: bool, mixed: bool
) -> None:
    from peft import PeftModel

    model = tiny(family)
    A, B = factors(model, targets, 4, mixed)
    head = random_head(model)
    write_adapter(
        tmp_path,
        A=A,
        B=B,
        alpha=6.0,
        rank=4,
        rslora=rslora,
        targets=targets,
        base_name="base",
        kind=kind,
        head=head,
        fan_in_fan_out=family.startswith("gpt2"),
    )
    expected = logits(by_hand(model, A, B, lora.scale(6.0, 4, rslora), head), ids)
    assert (expected - logits(model, ids)).abs().max() > 0.01
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # PEFT asks transformers for it
        adapted = PeftModel.from_pretrained(model, str(tmp_path))
    assert adapted.peft_config["default"].base_model_name_or_path == "base"
    torch.testing.assert_close(logits(adapted, ids), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("family", "kind", "targets"), CASES)
def test_merged_model_loads_and_computes_the_same(
    tiny: Tiny, ids: torch.Tensor, tmp_path: Path, family: str, kind: Any, targets: list[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    model = tiny(family)
    before = copy.deepcopy(model.state_dict())
    A, B = factors(model, targets, 4, mixed=True)
    head = random_head(model)
    left = {site: torch.randn(B[site].shape[0], 2) * 0.1 for site in A}
    right = {site: torch.randn(2, A[site].shape[1]) * 0.1 for site in A}
    dense = next(iter(A))  # a site with `left` alone carries the whole matrix
    left[dense] = left[dense] @ right.pop(dense)
    merge(model, A, B, 0.7, {"left": left, "right": right}, head, tmp_path, labels=["a", "b", "c"])

    changed = by_hand(model, A, B, 0.7, head)
    offset_B = {site: left[site] for site in right}
    changed = by_hand(changed, right, offset_B, 1.0, {})
    changed = by_hand(changed, {dense: torch.eye(left[dense].shape[1])}, {dense: left[dense]}, 1.0, {})
    auto: Any = AutoModelForCausalLM if kind == "causal-lm" else AutoModelForSequenceClassification
    loaded = auto.from_pretrained(str(tmp_path)).eval()
    torch.testing.assert_close(logits(loaded, ids), logits(changed, ids), atol=1e-5, rtol=0)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert list(loaded.config.id2label.values()) == ["a", "b", "c"]


def test_same_tensors_same_bytes_and_read_back(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("bert")
    A, B = factors(model, ["query", "value"], 4, mixed=True)
    head = random_head(model)
    common: dict[str, Any] = {"alpha": 8, "rank": 4, "rslora": False, "base_name": "x", "kind": "classification"}
    write_adapter(tmp_path / "one", A=A, B=B, head=head, targets=["query", "value"], **common)
    turned = dict(reversed(A.items())), dict(reversed(B.items())), dict(reversed(head.items()))
    write_adapter(tmp_path / "two", A=turned[0], B=turned[1], head=turned[2], targets=["value", "query"], **common)
    for name in ("adapter_config.json", WEIGHTS):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    a, b, h, config = read_adapter(tmp_path / "one")
    for got, given in ((a, A), (b, B), (h, head)):
        assert got.keys() == given.keys()
        assert all(torch.equal(x, given[name]) for name, x in got.items())
    assert config["lora_alpha"] == 8 and config["modules_to_save"] == ["classifier"]


def test_peft_takes_every_key_of_the_config(tiny: Tiny, tmp_path: Path) -> None:
    from peft import LoraConfig

    A, B = factors(tiny("llama"), ["q_proj"], 4, mixed=False)
    write_adapter(
        tmp_path, A=A, B=B, alpha=8, rank=4, rslora=False, targets=["q_proj"], base_name="x", kind="causal-lm"
    )
    known = LoraConfig().to_dict()
    assert json.loads((tmp_path / "adapter_config.json").read_text()).keys() <= known.keys()


def test_errors_say_what_is_wrong(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    A, B = factors(model, ["q_proj"], 4, mixed=False)
    common: dict[str, Any] = {"alpha": 8, "rank": 4, "rslora": False, "base_name": "x", "kind": "causal-lm"}
    with pytest.raises(ModelError, match=r"expected \(r, in\) and \(out, r\)"):
        write_adapter(tmp_path, A=A, B={k: x[:, :2] for k, x in B.items()}, targets=["q_proj"], **common)
    with pytest.raises(ModelError, match="same sites"):
        write_adapter(tmp_path, A=A, B={}, targets=["q_proj"], **common)
    with pytest.raises(ModelError, match="no readable adapter"):
        read_adapter(tmp_path / "none")
    with pytest.raises(ModelError, match="was it made for it"):
        merge(model, {"x.y": A["model.layers.0.self_attn.q_proj"]}, {}, 1.0, {}, None, tmp_path)
    (tmp_path / "dora").mkdir()
    write_adapter(tmp_path / "dora", A=A, B=B, targets=["q_proj"], **common)
    config = tmp_path / "dora" / "adapter_config.json"
    config.write_text(config.read_text().replace('"use_dora": false', '"use_dora": true'))
    with pytest.raises(ModelError, match="plain LoRA"):
        read_adapter(tmp_path / "dora")
