"""Fused layers against the readable ones, layer by layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from fedloom.train.frozen_product import DenseProduct
from fedloom.train.kernels import lora_linear
from fedloom.train.kernels.lora_linear import FusedLayers
from fedloom.train.kernels.lora_matmul import Frozen, Segments, lora_matmul
from fedloom.train.lora_linear import Adapter, HookedLayers, Offset, shape_of


def layers() -> list[nn.Module]:
    torch.manual_seed(0)
    conv = Conv1D(5, 7)
    nn.init.normal_(conv.bias)
    made: list[nn.Module] = [nn.Linear(7, 5), nn.Linear(5, 7, bias=False), conv]
    return [layer.double().requires_grad_(False) for layer in made]


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("shared", ["none", "factors", "dense"])
def test_one_layer_equals_the_readable_one(index: int, shared: str, rank: int) -> None:
    base = layers()[index]
    out, n = shape_of(base)
    A, B = (torch.randn(3, *shape).double().requires_grad_() for shape in ((rank, n), (out, rank)))
    adapter = Adapter(A, B, torch.tensor([1.0, 2.0, 0.5]).double().view(3, 1, 1))
    left, right = torch.randn(out, 4).double(), torch.randn(4, n).double()
    offsets: dict[str, Offset] = {}
    if shared != "none":
        offsets["x"] = (left, right) if shared == "factors" else (left @ right, None)
    x = torch.randn(6, 4, n).double().requires_grad_()
    hooked = HookedLayers({"x": base})
    hooked.attach(offsets)
    hooked.put({"x": adapter}, None)
    wanted = base(x)
    hooked.detach()
    weight = base.get_parameter("weight")
    dense = weight.T if isinstance(base, Conv1D) else weight
    frozen = Frozen([DenseProduct(lambda _: dense, base.bias)], [out], [offsets.get("x")])  # type: ignore[arg-type]
    (made,) = lora_matmul(x, frozen, [adapter], None)
    torch.testing.assert_close(made, wanted, rtol=0, atol=1e-12)
    probe = torch.randn_like(wanted)
    ours = torch.autograd.grad((made * probe).sum(), (x, A, B))
    torch.testing.assert_close(ours, torch.autograd.grad((wanted * probe).sum(), (x, A, B)), rtol=0, atol=1e-12)


class Attention(nn.Module):
    """Query, key and value of one input; key and value have fewer heads."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.query = nn.Linear(7, 6, bias=bias)
        self.key = nn.Linear(7, 4, bias=bias)
        self.value = nn.Linear(7, 4, bias=bias)
        self.double().requires_grad_(False)
        self.config = PretrainedConfig()
        self.config.model_type = "bert"

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.query(x), self.key(x), self.value(x)], -1)


def fused(model: nn.Module, names: list[str]) -> FusedLayers:
    found = FusedLayers.of(model, {name: model.get_submodule(name) for name in names})
    assert found is not None
    return found


def adapt(
    model: Attention, ranks: dict[str, int], offsets: dict[str, Offset] | None = None
) -> tuple[FusedLayers, dict[str, Adapter]]:
    adapted = fused(model, list(ranks))
    scale = torch.tensor([1.0, 2.0, 0.5]).double().view(3, 1, 1)
    adapters = {}
    for name, r in ranks.items():
        out, n = shape_of(model.get_submodule(name))
        A, B = (torch.randn(3, *shape).double().requires_grad_() for shape in ((r, n), (out, r)))
        adapters[name] = Adapter(A, B, scale)
    adapted.attach(offsets or {})
    adapted.put(adapters, None)
    return adapted, adapters


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "ranks",
    [
        {"query": 2, "value": 2},
        {"query": 2, "key": 3, "value": 3},
        {"key": 2, "value": 2},
        {"key": 1, "value": 2},
        {"value": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("most", [98, 97], ids=["joined", "apart"])
def test_layers_with_one_input_are_each_what_they_are_alone(
    bias: bool, ranks: dict[str, int], packed: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(lora_linear, "_MOST_JOINED", most)
    model = Attention(bias)  # of 98 weights
    children = {name: layer for name, layer in model.named_children() if isinstance(layer, nn.Linear)}
    weights = {name: (layer.weight.clone(), layer.bias) for name, layer in children.items()}
    left = {name: torch.randn(len(weights[name][0]), 7).double() for name in ranks}
    adapted, adapters = adapt(model, ranks, {name: (left[name], None) for name in ranks})
    places = {layer.weight.untyped_storage().data_ptr() for layer in children.values()}
    assert len(places) == (1 if most == 98 else 3)
    lengths = [3, 5, 4]
    x = torch.randn(1, 12, 7).double() if packed else torch.randn(6, 2, 7).double()
    x.requires_grad_()
    rows = x[0].split(lengths) if packed else [part.flatten(0, 1) for part in x.split(2)]
    if packed:
        there = torch.arange(5) < torch.tensor(lengths).unsqueeze(1)
        spread = torch.zeros(15, dtype=torch.int64)
        spread[there.flatten()] = torch.arange(12)
        adapted.step.segments = Segments(
            spread, torch.nonzero(~there.flatten())[:, 0], torch.nonzero(there.flatten())[:, 0]
        )

    def alone(name: str, k: int) -> Tensor:
        weight, bias = weights[name]
        if name in ranks:
            A, B, scale, _ = adapters[name]
            weight = weight + left[name] + scale[k] * B[k] @ A[k]
        return nn.functional.linear(rows[k], weight, bias)

    wanted = torch.cat([torch.cat([alone(name, k) for name in weights], -1) for k in range(3)]).view(*x.shape[:2], -1)
    made = model(x)
    torch.testing.assert_close(made, wanted, rtol=0, atol=1e-12)
    probe = torch.randn_like(wanted)
    leaves = [x, *(factor for A, B, *_ in adapters.values() for factor in (A, B))]
    ours = torch.autograd.grad((made * probe).sum(), leaves)
    torch.testing.assert_close(ours, torch.autograd.grad((wanted * probe).sum(), leaves), rtol=0, atol=1e-12)
    # Of an input that needs no gradient, what has no adapter needs none either.
    for name in weights:
        assert model.get_submodule(name)(x.detach()).requires_grad == (name in ranks)


def test_layers_with_one_input_are_computed_once() -> None:
    torch.manual_seed(0)
    model = Attention(bias=True)
    adapt(model, {"query": 2})
    calls = []
    x, other = torch.randn(2, 3, 4, 7).double()
    with torch.no_grad(), Calls(calls):
        query, key = model.query(x), model.key(x)
        elsewhere = model.value(other)
    assert calls.count("linear") == 2, "one for x, one for the other input"
    for module, given, made in ((model.query, x, query), (model.key, x, key), (model.value, other, elsewhere)):
        torch.testing.assert_close(module(given.clone()), made, rtol=0, atol=1e-12)


class Calls(TorchFunctionMode):
    """Names of the torch functions that were called."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_one_weight_follows_replaced_ones_and_is_parted_again() -> None:
    model = Attention(bias=True)
    layers = [layer for layer in model.children() if isinstance(layer, nn.Linear)]
    before = [layer.weight.detach().clone() for layer in layers]
    adapted = fused(model, ["value"])
    adapted.attach({})
    assert len({layer.weight.untyped_storage().data_ptr() for layer in layers}) == 1
    x = torch.randn(4, 7)
    first = model(x.double())
    adapted.detach()
    for layer in layers:
        for parameter in layer.parameters():
            parameter.data = parameter.data.float() * 2
    wanted = torch.cat([layer(x) for layer in layers], -1)
    adapted.attach({})
    torch.testing.assert_close(model(x), wanted)
    torch.testing.assert_close(wanted.double() / 2, first, rtol=1e-5, atol=1e-5)
    adapted.detach()
    adapted.part()
    for layer, weight in zip(layers, before, strict=True):
        assert torch.equal(layer.weight, weight.float() * 2) and "forward" not in vars(layer)
    assert len({layer.weight.untyped_storage().data_ptr() for layer in layers}) == 3


def test_a_family_without_a_record_has_no_fused_layers() -> None:
    model = Attention(bias=True)
    model.config.model_type = "unheard-of"
    assert FusedLayers.of(model, {"query": model.query}) is None
