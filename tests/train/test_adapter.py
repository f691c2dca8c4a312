"""The adapter layers against the dense formula and against PEFT's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from fedloom.errors import ModelError
from fedloom.train.adapter import Adapted, HeadLinear, LoRALinear, inject, sites_of
from fedloom.train.product import Delta, Segments


def layers() -> list[nn.Module]:
    torch.manual_seed(0)
    conv = Conv1D(5, 7)
    nn.init.normal_(conv.bias)
    made: list[nn.Module] = [nn.Linear(7, 5), nn.Linear(5, 7, bias=False), conv]
    return [layer.double().requires_grad_(False) for layer in made]


def dense(layer: nn.Module) -> Tensor:
    """(out, in)."""
    weight = layer.get_parameter("weight")
    return weight.T if isinstance(layer, Conv1D) else weight


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("shared", ["none", "factors", "dense"])
def test_equals_the_dense_formula_per_client(index: int, shared: str) -> None:
    base = layers()[index]
    layer = LoRALinear("x", base)
    out, n = layer.out_features, layer.in_features
    A, B = torch.randn(3, 2, n).double().requires_grad_(), torch.randn(3, out, 2).double().requires_grad_()
    scale = torch.tensor([1.0, 2.0, 0.5]).double().view(3, 1, 1)
    left, right = torch.randn(out, 4).double(), torch.randn(4, n).double()
    x = torch.randn(6, 4, n).double().requires_grad_()
    layer.delta = Delta(A, B, scale)
    weight = dense(base)
    if shared == "factors":
        layer.offset = (left, right)
    elif shared == "dense":
        layer.offset = (left @ right, None)
    if shared != "none":
        weight = weight + left @ right
    bias = getattr(base, "bias", None)
    expected = torch.cat(
        [nn.functional.linear(x[2 * k : 2 * k + 2], weight + scale[k] * B[k] @ A[k], bias) for k in range(3)]
    )
    made = layer(x)
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-12)
    probe = torch.randn_like(expected)
    ours = torch.autograd.grad((made * probe).sum(), (x, A, B))
    theirs = torch.autograd.grad((expected * probe).sum(), (x, A, B))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_only_the_adapter_sees_what_dropout_leaves() -> None:
    base = layers()[0]
    layer = LoRALinear("x", base)
    A, B = torch.randn(3, 2, 7).double().requires_grad_(), torch.randn(3, 5, 2).double().requires_grad_()
    x = torch.randn(6, 4, 7).double().requires_grad_()
    kept = (torch.rand(6, 4, 7) > 0.4).double() / 0.6
    layer.delta = Delta(A, B, torch.ones(3, 1, 1).double())
    layer.step.dropout = lambda site, given: kept
    expected = torch.cat([base(x[i]) + (x * kept)[i] @ (B[k] @ A[k]).T for k in range(3) for i in (2 * k, 2 * k + 1)])
    expected = expected.view(6, 4, 5)
    made = layer(x)
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-12)
    probe = torch.randn_like(expected)
    ours = torch.autograd.grad((made * probe).sum(), (x, A, B))
    theirs = torch.autograd.grad((expected * probe).sum(), (x, A, B))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_equals_peft_layer_with_its_gradients(index: int) -> None:
    base = layers()[index]
    layer = LoRALinear("x", base)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["0"], fan_in_fan_out=isinstance(base, Conv1D))
    theirs = get_peft_model(nn.Sequential(base), config).double()
    module = theirs.get_submodule("base_model.model.0")
    A, B = (module.get_parameter(f"lora_{f}.default.weight") for f in "AB")
    nn.init.normal_(B)
    a, b = (p.detach().clone().unsqueeze(0).requires_grad_() for p in (A, B))
    layer.delta = Delta(a, b, torch.full((1, 1, 1), 2.0).double())
    x = torch.randn(4, 3, layer.in_features).double()
    ours, reference = layer(x), theirs(x)
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-12)
    made = torch.autograd.grad(ours.square().sum(), (a, b))
    wanted = torch.autograd.grad(reference.square().sum(), (A, B))
    torch.testing.assert_close(made, tuple(g.unsqueeze(0) for g in wanted), rtol=0, atol=1e-10)


def test_without_adapter_the_layer_is_the_base() -> None:
    base = layers()[0]
    x = torch.randn(4, 7).double()
    assert torch.equal(LoRALinear("x", base)(x), base(x))
    head = nn.Linear(7, 2).double()
    assert torch.equal(HeadLinear("x", head)(x), head(x))


def test_head_is_one_full_layer_per_client() -> None:
    head = HeadLinear("x", nn.Linear(7, 2).double())
    weight, bias = torch.randn(3, 2, 7).double(), torch.randn(3, 2).double()
    x = torch.randn(6, 4, 7).double()
    for b in (bias, None):
        head.full = (weight, b)
        for k in range(3):
            wanted = nn.functional.linear(x[2 * k : 2 * k + 2], weight[k], None if b is None else b[k])
            torch.testing.assert_close(head(x)[2 * k : 2 * k + 2], wanted, rtol=0, atol=1e-12)


def test_eject_gives_the_original_modules_back() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    before = dict(model.named_modules())
    adapted = inject(model, ["0.0"], ["1"])
    assert isinstance(model.get_submodule("0.0"), LoRALinear)
    assert isinstance(model.get_submodule("1"), HeadLinear)
    adapted.eject()
    after = dict(model.named_modules())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)


def test_unknown_and_wrong_layers_are_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    before = dict(model.named_modules())
    with pytest.raises(ModelError, match=r"no layer '0\.query'"):
        inject(model, ["0", "0.query"])
    with pytest.raises(ModelError, match="ReLU"):
        inject(model, ["1"])
    with pytest.raises(ModelError, match="no linear head '1'"):
        inject(model, [], ["1"])
    assert dict(model.named_modules()) == before
    assert sites_of(model, ["0"]) == {"0": (4, 4)}


class Attention(nn.Module):
    """Query, key and value of one input; key and value have fewer heads."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.query = nn.Linear(7, 6, bias=bias)
        self.key = nn.Linear(7, 4, bias=bias)
        self.value = nn.Linear(7, 4, bias=bias)
        self.double().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.query(x), self.key(x), self.value(x)], -1)


def adapt(model: Attention, ranks: dict[str, int]) -> tuple[Adapted, dict[str, Delta]]:
    adapted = inject(model, list(ranks))
    scale = torch.tensor([1.0, 2.0, 0.5]).double().view(3, 1, 1)
    deltas = {}
    for name, r in ranks.items():
        site = adapted.sites[name]
        A, B = (torch.randn(3, *shape).double().requires_grad_() for shape in ((r, 7), (site.out_features, r)))
        site.delta = deltas[name] = Delta(A, B, scale)
    return adapted, deltas


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
def test_layers_with_one_input_are_each_what_they_are_alone(bias: bool, ranks: dict[str, int], packed: bool) -> None:
    torch.manual_seed(0)
    model = Attention(bias)
    weights = {
        name: (layer.weight, layer.bias) for name, layer in model.named_children() if isinstance(layer, nn.Linear)
    }
    adapted, deltas = adapt(model, ranks)
    left = {name: torch.randn(len(weights[name][0]), 7).double() for name in ranks}
    for name in ranks:
        adapted.sites[name].offset = (left[name], None)
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
            A, B, scale = deltas[name]
            weight = weight + left[name] + scale[k] * B[k] @ A[k]
        return nn.functional.linear(rows[k], weight, bias)

    wanted = torch.cat([torch.cat([alone(name, k) for name in weights], -1) for k in range(3)]).view(*x.shape[:2], -1)
    made = model(x)
    torch.testing.assert_close(made, wanted, rtol=0, atol=1e-12)
    probe = torch.randn_like(wanted)
    leaves = [x, *(factor for A, B, _ in deltas.values() for factor in (A, B))]
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
    adapted = inject(model, ["value"])
    assert len({layer.weight.untyped_storage().data_ptr() for layer in layers}) == 1
    for layer in layers:
        for parameter in layer.parameters():
            parameter.data = parameter.data.float() * 2
    adapted.join()
    x = torch.randn(4, 7)
    wanted = torch.cat([layer(x) for layer in layers], -1)
    torch.testing.assert_close(model(x), wanted)
    adapted.eject()
    assert list(model.children()) == layers
    for layer, weight in zip(layers, before, strict=True):
        assert torch.equal(layer.weight, weight.float() * 2)
    assert len({layer.weight.untyped_storage().data_ptr() for layer in layers}) == 3
