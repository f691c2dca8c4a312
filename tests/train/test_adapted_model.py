"""The readable path takes any model: other layers, other architectures, quantised weights, recomputed activations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from fedloom import lora
from fedloom.core import Client, State, Work
from fedloom.data.batches import Encoded
from fedloom.models.huggingface import find_sites, head_modules
from fedloom.rng import generator
from fedloom.train.optim import Settings
from fedloom.train.trainer import Trainer


def distilbert() -> nn.Module:
    small = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
    return DistilBertForSequenceClassification(DistilBertConfig(vocab_size=40, num_labels=3, **small))


def falcon() -> nn.Module:
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return FalconForCausalLM(FalconConfig(vocab_size=40, **small))


def opt() -> nn.Module:
    small = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "ffn_dim": 24,
        "word_embed_proj_dim": 16,
    }
    return OPTForCausalLM(OPTConfig(vocab_size=40, dropout=0.5, max_position_embeddings=32, **small))


def gemma2() -> nn.Module:
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return Gemma2ForCausalLM(Gemma2Config(vocab_size=40, num_key_value_heads=1, head_dim=8, **small))


def clients_of(model: nn.Module, target: str, ranks: tuple[int, ...] = (2, 4, 3)) -> list[tuple[Client, Work]]:
    made = []
    for k, rank in enumerate(ranks):
        rng = generator(0, k, "work")
        sites = find_sites(model, [target])
        state: State = lora.init(sites, rank, rng)
        state["B"] = {site: torch.randn(m, rank, generator=rng) * 0.1 for site, (m, _) in sites.items()}
        names = [f"{layer}.{leaf}" for layer in head_modules(model) for leaf in ("weight", "bias")]
        if names:
            state["head"] = {n: model.get_parameter(n).detach().clone() for n in names}
        made.append((Client(f"client-{k}", 10, rank), Work(train=state, scale=1.5)))
    return made


def assert_close(one: State, two: State, atol: float) -> None:
    for role, group in two.items():
        for site, x in group.items():
            torch.testing.assert_close(one[role][site], x, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("make", "target"), [(distilbert, "q_lin"), (falcon, "query_key_value"), (opt, "fc1"), (gemma2, "q_proj")]
)
def test_any_architecture_trains_and_batches_clients(make: Callable[[], nn.Module], target: str, rows: Any) -> None:
    torch.manual_seed(0)
    model = make()
    kind = "classification" if head_modules(model) else "causal-lm"
    given, data = clients_of(model, target), [rows(n, kind, n) for n in (4, 11, 7)]
    settings = Settings(lr=0.01, batch_size=4)
    with Trainer(model, find_sites(model, [target]), head_modules(model), settings=settings) as trainer:
        together = trainer.fit(given, data, 1)
        for (client, work), encoded, done in zip(given, data, together, strict=True):
            (alone,) = trainer.fit([(client, work)], [encoded], 1)
            assert_close(done.state, alone.state, 1e-5)
            assert not torch.equal(
                done.state["A"][next(iter(done.state["A"]))], work.train["A"][next(iter(work.train["A"]))]
            )
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Int8Linear(nn.Linear):
    """A linear layer whose weight is kept in eight bits, as those of bitsandbytes are."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        self.bias = layer.bias
        self.step = float(layer.weight.detach().abs().max()) / 127
        whole = (layer.weight.detach() / self.step).round().to(torch.int8)
        self.weight = nn.Parameter(whole, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.step, self.bias)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_quantised_layers_train_as_their_dequantised_weights(name: str, build: Any, rows: Any, works: Any) -> None:
    family = build(name)
    plain = copy.deepcopy(family.model)
    for site in family.sites:
        layer = Int8Linear(family.model.get_submodule(site))
        parent, _, child = site.rpartition(".")
        setattr(family.model.get_submodule(parent), child, layer)
        plain.get_submodule(site).weight.data = layer.weight.float() * layer.step
    clients = works(family, dtype=torch.float32)
    data = [rows(n, family.kind, n) for n in (4, 11, 7)]
    results = []
    for model in (family.model, plain):
        with Trainer(model, family.sites, family.heads, settings=Settings(lr=0.01)) as trainer:
            results.append(trainer.fit(clients, data, 1))
    for one, two in zip(*results, strict=True):
        assert_close(one.state, two.state, 1e-5)
    assert all(family.model.get_submodule(site).weight.dtype == torch.int8 for site in family.sites)


def test_recomputing_activations_does_not_switch_on_a_models_dropout(rows: Any) -> None:
    torch.manual_seed(0)
    model = opt()
    given, data = clients_of(model, "q_proj"), [rows(n, "causal-lm", n) for n in (4, 11, 7)]
    results = []
    for checkpointing in (False, True, True):
        settings = Settings(lr=0.01, checkpointing=checkpointing)
        with Trainer(model, find_sites(model, ["q_proj"]), settings=settings) as trainer:
            results.append(trainer.fit(given, data, 1))
    for usual, one, two in zip(*results, strict=True):
        assert_close(one.state, usual.state, 1e-6)
        assert_close(two.state, one.state, 0)


def long_rows(n: int, length: int) -> Encoded:
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 40, (n * length,), generator=rng).int().numpy()
    offsets = torch.arange(0, n * length + 1, length).numpy()
    return Encoded(tokens, offsets, pad_id=0, kind="causal-lm", starts=torch.full((n,), length // 2).numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_without_fused_attention_takes_long_rows(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = gemma2()
    ((client, work),) = clients_of(model, "q_proj", ranks=(2,))
    train = {role: {site: x.to(dtype) for site, x in group.items()} for role, group in work.train.items()}
    with Trainer(model, find_sites(model, ["q_proj"]), settings=Settings(lr=0.05, batch_size=2)) as trainer:
        (done,) = trainer.fit([(client, Work(train=train, scale=1.5))], [long_rows(4, 120)], 1)
    assert done.steps == 2 and done.loss > 0 and all(x.isfinite().all() for x in done.state["A"].values())
