"""The adapter layers against the dense formula and against PEFT's own."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedloom.errors import ModelError
from fedloom.train.adapter import Delta, HeadLinear, LoRALinear, inject, sites_of


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
    layer.dropout = lambda site, given: kept
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
