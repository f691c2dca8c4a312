"""Training with frozen products in int8, on models of twelve blocks: which layers, when, and what becomes of a run."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.token_rows import VOCAB, token_rows
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import fedloom
from fedloom import lora
from fedloom.core import Client, State, Work
from fedloom.data.batches import Kind
from fedloom.errors import ModelError
from fedloom.models.blocks import sites_in
from fedloom.models.huggingface import find_sites, head_group, head_modules
from fedloom.privacy.example_level import Private
from fedloom.rng import generator
from fedloom.train import adapted_model
from fedloom.train.int8_products import wide
from fedloom.train.kernels import int8_matmul
from fedloom.train.optim import Settings
from fedloom.train.trainer import Trainer

pytestmark = pytest.mark.skipif(int8_matmul.missing() is not None, reason=str(int8_matmul.missing()))

TARGETS = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}
INT8 = Settings(optimizer="sgd", lr=1.0, clip=0.05, batch_size=4, local_steps=2, int8_products=True)


def deep(name: str) -> nn.Module:
    sizes: dict[str, Any] = dict(hidden_size=128, intermediate_size=160, num_hidden_layers=12, num_attention_heads=4)
    if name == "llama":
        sizes["num_key_value_heads"] = 2  # keys and values too narrow
    ids: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(name, **sizes, **ids, num_labels=3, initializer_range=0.1)
    auto: Any = AutoModelForSequenceClassification if name == "bert" else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = auto.from_config(config)
    return model.eval()


class Site:
    """Three clients with ranks of their own on one model."""

    def __init__(self, name: str, settings: Settings, blocks: Any = "all", **named: Any) -> None:
        self.model = deep(name)
        self.kind: Kind = "classification" if name == "bert" else "causal-lm"
        sites = sites_in(self.model, find_sites(self.model, TARGETS[name]), blocks)
        heads = head_modules(self.model)
        self.trainer = Trainer(self.model, list(sites), heads, settings=settings, **named)
        self.works = []
        for k, rank in enumerate((2, 4, 8)):
            state: State = lora.init(sites, rank, generator(0, k, "work"))
            if heads:
                state["head"] = head_group(self.model)
            self.works.append((Client(f"client-{k}", 12, rank), Work(train=state, scale=2.0)))
        self.data = [token_rows(self.kind, 12, k, 29) for k in range(3)]

    def trained(self) -> list[Tensor]:
        """What each client's training added, flat."""
        ends = self.trainer.fit(self.works, self.data, 1)
        return [
            torch.cat(
                [(end.state[role][x] - work.train[role][x]).flatten() for role in end.state for x in end.state[role]]
            )
            for (_, work), end in zip(self.works, ends, strict=True)
        ]


def apart(one: list[Tensor], two: list[Tensor]) -> float:
    return max(float((x - y).norm() / y.norm()) for x, y in zip(one, two, strict=True))


@pytest.fixture
def unrounded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Products that round nothing in place of those in int8; the (out, in) that were made once runs are over."""
    made: list[tuple[int, int]] = []

    class Exact:
        def __init__(self, weight: Tensor, bias: Tensor | None, parts: Sequence[int] | None = None) -> None:
            made.append((weight.shape[0], weight.shape[1]))
            self.weight, self.bias = weight, bias

        def __call__(self, x: Tensor) -> Tensor:
            return functional.linear(x, self.weight, self.bias)

        def back(self, grad: Tensor) -> Tensor:
            return grad @ self.weight

    monkeypatch.setattr(int8_matmul, "Int8Matmul", Exact)
    monkeypatch.setattr(adapted_model, "Int8Product", Exact)
    return made


JOINED = {
    "bert": [(384, 128), (128, 128), (160, 128), (128, 160)],  # query, key and value are one
    "llama": [(128, 128), (128, 128), (160, 128), (160, 128), (128, 160)],  # keys and values are too narrow
    "gpt2": [(384, 128), (128, 128), (512, 128), (128, 512)],
}
"""Of a block."""


@pytest.mark.parametrize("how", ["kernels", "plain", "checkpointing", "dropout", "private"])
@pytest.mark.parametrize("name", TARGETS)
def test_every_wide_layer_multiplies_so_and_once_coded(
    name: str, how: str, unrounded: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {
        "checkpointing": {"checkpointing": True},
        "dropout": {"dropout": 0.1},
        "private": {"private": Private(0.5, 0.1, bytes(32))},
    }.get(how, {})
    settings, kernels = replace(INT8, **changes), "off" if how == "plain" else "auto"
    site = Site(name, settings, kernels=kernels)
    ours = site.trained()
    wanted = Site(name, replace(settings, int8_products=False), kernels=kernels).trained()
    assert apart(ours, wanted) < 1e-4 and float(ours[0].norm()) > 0
    if how in ("kernels", "checkpointing", "private"):
        assert sorted(unrounded) == sorted(12 * JOINED[name] + ([(128, 128)] if name == "bert" else []))  # and a pooler
    coded = len(unrounded)
    site.trained()
    assert len(unrounded) == coded
    assert not any("forward" in vars(layer) for layer in site.model.modules())


@pytest.mark.parametrize("kernels", ["auto", "off"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TARGETS)
def test_training_is_off_by_some_hundredths(name: str, dtype: torch.dtype, kernels: Any) -> None:
    """Over twelve blocks, clipped. To which integer a number is rounded may hang on its last bit: the two paths differ by as
    much; `kernels/test_int8_matmul.py` compares them product by product."""
    ours = Site(name, INT8, dtype=dtype, kernels=kernels)
    dense = Site(name, replace(INT8, int8_products=False), dtype=dtype)
    first = ours.trained()
    assert 0.01 < apart(first, dense.trained()) < 0.2
    again = ours.trained()
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_scores_are_not_rounded() -> None:
    ours, dense = (Site("bert", replace(INT8, int8_products=x), dtype=torch.bfloat16) for x in (True, False))
    ours.trained()
    (_, work), held_out = ours.works[0], token_rows("classification", 12, 9, 29)
    said, right = (x.trainer.evaluate(work, held_out) for x in (ours, dense))
    assert said.logits is not None and right.logits is not None and torch.equal(said.logits, right.logits)


def test_blocks_that_are_computed_once_are_not_rounded(unrounded: list[tuple[int, int]]) -> None:
    site = Site("bert", INT8, "upper half", dtype=torch.bfloat16)
    site.trained()
    assert sorted(unrounded) == sorted([*(6 * JOINED["bert"]), (128, 128)])
    unrounded.clear()
    Site("bert", INT8, "upper half", dtype=torch.bfloat16, kernels="off").trained()
    assert len(unrounded) == 12 * 6 + 1  # no prefix there


def test_float64_is_computed_as_defined() -> None:
    """What oneDNN lacks."""
    site = Site("bert", INT8)
    site.works = [
        (client, replace(work, train={r: {n: x.double() for n, x in g.items()} for r, g in work.train.items()}))
        for client, work in site.works
    ]
    assert all(x.dtype == torch.float64 and bool(x.isfinite().all()) for x in site.trained())


def test_which_layers() -> None:
    bert = deep("bert")
    found = wide(bert, {bert.get_submodule("classifier")})
    assert len(found) == 12 * 6 + 1 and "classifier" not in found
    llama = deep("llama")
    assert {name.rpartition(".")[2] for name in wide(llama)} == {
        "q_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }


def test_what_cannot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", hidden_size=64, intermediate_size=96, num_hidden_layers=1, vocab_size=VOCAB)
    )
    with pytest.raises(ModelError, match="LlamaForCausalLM has no dense linear layer of at least 128 features"):
        Trainer(narrow, ["model.layers.0.self_attn.q_proj"], settings=INT8)
    Trainer(narrow, ["model.layers.0.self_attn.q_proj"], settings=replace(INT8, int8_products=False))
    monkeypatch.setattr(int8_matmul, "missing", lambda: "this processor has no VNNI instructions")
    with pytest.raises(ModelError, match=r"no VNNI instructions; set train\.int8_products = false"):
        Site("bert", INT8)
    Site("bert", INT8, kernels="off")
    model = Site("bert", replace(INT8, int8_products=False)).trainer._model
    model.device = torch.device("cuda")
    with pytest.raises(ModelError, match="the model is on cuda, and they are for a CPU"):
        model.require_int8()


def test_a_real_encoder_learns_and_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "model": {"name": "minilm"},
        "task": {"data": "trec", "limit": 400, "eval_limit": 100, "holdout": 0.2},
        "lora": {"targets": ["query", "key", "value"]},
        "clients": {"count": 3},
        "method": {"name": "fedit"},
        "train": {"rounds": 3, "lr": 6e-3, "int8_products": True},
        "run": {"keep_checkpoints": 4},
    }
    whole = fedloom.run(config, tmp_path / "whole")
    assert whole.eval["accuracy"] > 0.5  # 0.2 before it is trained
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    adapter = tmp_path / "part" / "adapter" / "adapter_model.safetensors"
    adapter.unlink()
    fedloom.resume(tmp_path / "part", back_to=2)
    assert adapter.read_bytes() == (tmp_path / "whole" / "adapter" / "adapter_model.safetensors").read_bytes()
