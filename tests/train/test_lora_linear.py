"""The adapted layers, as they are defined, against the dense formula and against PEFT's own."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedloom.errors import ModelError
from fedloom.train.lora_linear import (
    Adapter,
    Dropout,
    HookedLayers,
    Offset,
    find_heads,
    find_layers,
    full,
    lora,
    shape_of,
)


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


def adapted(
    layer: nn.Module,
    adapters: Mapping[str, Adapter],
    offsets: Mapping[str, Offset] | None = None,
    dropout: Dropout | None = None,
) -> HookedLayers:
    hooked = HookedLayers({"x": layer})
    hooked.attach(offsets or {})
    hooked.put(adapters, dropout)
    return hooked


def assert_same_with_gradients(made: Tensor, wanted: Tensor, leaves: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(made, wanted, rtol=0, atol=1e-12)
    probe = torch.randn_like(wanted)
    ours = torch.autograd.grad((made * probe).sum(), leaves)
    torch.testing.assert_close(ours, torch.autograd.grad((wanted * probe).sum(), leaves), rtol=0, atol=1e-12)


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("shared", ["none", "factors", "dense"])
def test_equals_the_dense_formula_per_client(index: int, shared: str) -> None:
    base = layers()[index]
    out, n = shape_of(base)
    A, B = torch.randn(3, 2, n).double().requires_grad_(), torch.randn(3, out, 2).double().requires_grad_()
    scale = torch.tensor([1.0, 2.0, 0.5]).double().view(3, 1, 1)
    left, right = torch.randn(out, 4).double(), torch.randn(4, n).double()
    x = torch.randn(6, 4, n).double().requires_grad_()
    weight = dense(base)
    offsets: dict[str, Offset] = {}
    if shared != "none":
        weight = weight + left @ right
        offsets["x"] = (left, right) if shared == "factors" else (left @ right, None)
    bias = getattr(base, "bias", None)
    wanted = torch.cat(
        [nn.functional.linear(x[2 * k : 2 * k + 2], weight + scale[k] * B[k] @ A[k], bias) for k in range(3)]
    )
    hooked = adapted(base, {"x": Adapter(A, B, scale)}, offsets)
    assert_same_with_gradients(base(x), wanted, (x, A, B))
    hooked.detach()
    assert torch.equal(base(x), nn.functional.linear(x, dense(base), bias)) or isinstance(base, Conv1D)
    assert not base._forward_hooks


def test_only_the_adapter_sees_what_dropout_leaves() -> None:
    base = layers()[0]
    A, B = torch.randn(3, 2, 7).double().requires_grad_(), torch.randn(3, 5, 2).double().requires_grad_()
    x = torch.randn(6, 4, 7).double().requires_grad_()
    kept = (torch.rand(6, 4, 7) > 0.4).double() / 0.6
    plain = nn.functional.linear(x, base.get_parameter("weight"), base.get_parameter("bias"))
    wanted = plain + torch.cat([(x * kept)[i : i + 1] @ (B[i // 2] @ A[i // 2]).T for i in range(6)])
    adapted(base, {"x": Adapter(A, B, torch.ones(3, 1, 1).double())}, dropout=lambda site, given: kept)
    assert_same_with_gradients(base(x), wanted, (x, A, B))


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("shape", [(6, 4), (6,)])
def test_a_gate_weighs_equal_parts_of_the_ranks_for_each_input(parts: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    A, B = torch.randn(3, 4, 7).double().requires_grad_(), torch.randn(3, 5, 4).double().requires_grad_()
    gate = torch.randn(3, parts, 7).double().requires_grad_()
    scale = torch.tensor([1.0, 2.0, 0.5]).double().view(3, 1, 1)
    x = torch.randn(*shape, 7).double().requires_grad_()

    def one(k: int, x: Tensor) -> Tensor:
        weights = torch.exp(gate[k] @ x) / torch.exp(gate[k] @ x).sum()
        each = [
            weights[p]
            * B[k][:, p * (4 // parts) : (p + 1) * (4 // parts)]
            @ A[k][p * (4 // parts) : (p + 1) * (4 // parts)]
            @ x
            for p in range(parts)
        ]
        return scale[k, 0, 0] * torch.stack(each).sum(0)

    inputs = x.reshape(3, -1, 7)
    wanted = torch.stack([one(k, inputs[k, i]) for k in range(3) for i in range(inputs.shape[1])]).view(*shape, 5)
    assert_same_with_gradients(lora(x, Adapter(A, B, scale, gate)), wanted, (x, A, B, gate))
    if parts == 1:
        torch.testing.assert_close(lora(x, Adapter(A, B, scale, gate)), lora(x, Adapter(A, B, scale)))


def test_an_adapter_of_no_ranks_adds_nothing() -> None:
    A, B = torch.zeros(3, 0, 7, requires_grad=True), torch.zeros(3, 5, 0, requires_grad=True)
    made = lora(torch.randn(6, 4, 7), Adapter(A, B, torch.ones(3, 1, 1)))
    assert made.shape == (6, 4, 5) and not made.any()
    assert [x.shape for x in torch.autograd.grad(made.sum(), (A, B))] == [A.shape, B.shape]


@pytest.mark.parametrize("index", [0, 1, 2])
def test_equals_peft_layer_with_its_gradients(index: int) -> None:
    base, copy = layers()[index], layers()[index]
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["0"], fan_in_fan_out=isinstance(base, Conv1D))
    theirs = get_peft_model(nn.Sequential(copy), config).double()
    module = theirs.get_submodule("base_model.model.0")
    A, B = (module.get_parameter(f"lora_{f}.default.weight") for f in "AB")
    nn.init.normal_(B)
    a, b = (p.detach().clone().unsqueeze(0).requires_grad_() for p in (A, B))
    x = torch.randn(4, 3, shape_of(base)[1]).double()
    adapted(base, {"x": Adapter(a, b, torch.full((1, 1, 1), 2.0).double())})
    ours, reference = base(x), theirs(x)
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-12)
    made = torch.autograd.grad(ours.square().sum(), (a, b))
    wanted = torch.autograd.grad(reference.square().sum(), (A, B))
    torch.testing.assert_close(made, tuple(g.unsqueeze(0) for g in wanted), rtol=0, atol=1e-10)


def test_a_head_is_one_full_layer_per_client() -> None:
    weight, bias = torch.randn(3, 2, 7).double(), torch.randn(3, 2).double()
    x = torch.randn(6, 4, 7).double()
    for b in (bias, None):
        made = full(x, weight, b)
        for k in range(3):
            wanted = nn.functional.linear(x[2 * k : 2 * k + 2], weight[k], None if b is None else b[k])
            torch.testing.assert_close(made[2 * k : 2 * k + 2], wanted, rtol=0, atol=1e-12)


def test_unknown_and_wrong_layers_are_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)))
    with pytest.raises(ModelError, match=r"no layer '0\.query'"):
        find_layers(model, ["0", "0.query"])
    with pytest.raises(ModelError, match="ReLU"):
        find_layers(model, ["1"])
    with pytest.raises(ModelError, match="no linear head '1'"):
        find_heads(model, ["1"])
    assert {name: shape_of(layer) for name, layer in find_layers(model, ["0"]).items()} == {"0": (4, 4)}
    assert list(find_heads(model, ["2"])) == ["2.0", "2.2"]
