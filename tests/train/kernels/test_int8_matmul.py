"""Products in int8 by oneDNN against their definition, and that against the dense product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedloom.train.int8_products import Int8Product
from fedloom.train.kernels import int8_matmul
from fedloom.train.kernels.int8_matmul import Int8Matmul

needs_vnni = pytest.mark.skipif(int8_matmul.missing() is not None, reason=str(int8_matmul.missing()))

SHAPES = [((3, 5, 160), 200, None), ((1, 1100, 128), 384, (128, 128, 128)), ((2, 0, 128), 128, None)]
"""x, out, and the layers that are joined; more rows than are coded at a time, and none."""


def drawn(shape: tuple[int, ...], out: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x with an outlier in each row, of rows of all sizes, some 0; a weight, a bias and a gradient."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=rng)
    x[..., 7] *= 30
    x *= 10.0 ** torch.randint(-12, 4, (*shape[:-1], 1), generator=rng)
    x[..., 0::4, :] = 0
    grad = 1e-6 * torch.randn((*shape[:-1], out), generator=rng)
    weight, bias = torch.randn(out, shape[-1], generator=rng), torch.randn(out, generator=rng)
    return x.to(dtype), weight.to(dtype), bias.to(dtype), grad.to(dtype)


@needs_vnni
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "out", "parts"), SHAPES)
def test_onednn_equals_the_definition(
    shape: tuple[int, ...], out: int, parts: tuple[int, ...] | None, dtype: torch.dtype
) -> None:
    x, weight, bias, grad = drawn(shape, out, dtype)
    if dtype == torch.float16:
        x, grad = x.clamp(-1000, 1000), grad * 1e3
    ours, wanted = Int8Matmul(weight, bias, parts), Int8Product(weight, bias, parts)
    close = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}[dtype]
    for made, right in ((ours(x), wanted(x)), (ours.back(grad), wanted.back(grad))):
        assert made.dtype == dtype and made.shape == right.shape
        # Sums of parts cancel, and are rounded after each.
        size = right.float().abs().amax(-1, keepdim=True) if right.numel() else right.float()
        assert bool(((made.float() - right.float()).abs() <= close * size).all())
    assert x.numel() == 0 or float(wanted(x).float().abs().max()) > 1.0


@needs_vnni
def test_weights_as_they_are_kept_and_turned() -> None:
    """A Conv1D's weight is a view of another order."""
    x, weight, bias, grad = drawn((40, 128), 256, torch.bfloat16)
    turned = weight.T.contiguous().T
    for made, same in (
        (Int8Matmul(turned, bias)(x), Int8Matmul(weight, bias)(x)),
        (Int8Matmul(turned, bias).back(grad), Int8Matmul(weight, bias).back(grad)),
    ):
        assert torch.equal(made, same)


@pytest.mark.parametrize("make", [Int8Product, pytest.param(Int8Matmul, marks=needs_vnni)])
def test_rounding_is_a_hundredth_and_a_row_is_its_own(make: type[Int8Product]) -> None:
    rng = torch.Generator().manual_seed(0)
    x, weight = torch.randn(300, 256, generator=rng), torch.randn(128, 256, generator=rng)
    grad, product = torch.randn(300, 128, generator=rng), make(weight, None)
    for made, right in ((product(x), x @ weight.T), (product.back(grad), grad @ weight)):
        assert 0.005 < float((made - right).norm() / right.norm()) < 0.015
    beside = x.clone()
    beside[150:] *= 1e6
    assert torch.equal(product(beside)[:150], product(x)[:150])
    assert torch.equal(product(x[:5]), product(x)[:5])
    assert torch.equal(product(x * 2.0**-20), product(x) * 2.0**-20)


@pytest.mark.parametrize("make", [Int8Product, pytest.param(Int8Matmul, marks=needs_vnni)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(make: type[Int8Product], dtype: torch.dtype, bad: float) -> None:
    x = torch.ones(2, 128, dtype=dtype)
    x[0, 3] = bad
    made = make(torch.ones(128, 128, dtype=dtype), None)(x)
    assert not made[0].isfinite().any() and bool(made[1].isfinite().all())


def test_integers_are_exact() -> None:
    """Rows that are integers up to 127 are their own codes."""
    rng = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-127, 128, (6, 128), generator=rng).float() for _ in range(2))
    x[:, 0] = weight[:, 0] = 127
    x[0], weight[0] = 127, -127  # the largest sum there is
    torch.testing.assert_close(Int8Product(weight, None)(x), x @ weight.T, rtol=1e-6, atol=0)
    if int8_matmul.missing() is None:
        torch.testing.assert_close(Int8Matmul(weight, None)(x), x @ weight.T, rtol=1e-6, atol=0)
