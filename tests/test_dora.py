from __future__ import annotations

import pytest
import torch

from fedloom import dora
from fedloom.dora import AXES
from fedloom.rng import generator

conventions = pytest.mark.parametrize("convention", AXES)


def factor(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(*shape), dtype=torch.float64).to(dtype)


@conventions
@pytest.mark.parametrize(("m", "n", "r"), [(7, 5, 3), (4, 9, 1), (6, 6, 6)])
def test_magnitude_times_direction_is_the_factor(convention: str, m: int, n: int, r: int) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        for shape, dim in zip(((r, n), (m, r)), AXES[convention], strict=True):
            F = factor(*shape, dtype=dtype)
            F[0], F[:, -1] = 0, 0
            s = dora.split(F, dim)
            torch.testing.assert_close(s.magnitude * s.direction, F, rtol=tolerance, atol=tolerance)
            assert (s.magnitude >= 0).all() and s.magnitude.shape == s.dead.shape
            assert s.magnitude.numel() == F.numel() // F.shape[dim]
            lengths = s.direction.norm(dim=dim, keepdim=True)
            torch.testing.assert_close(lengths, (~s.dead).to(dtype), rtol=0, atol=tolerance)
            assert torch.equal(s.dead, (F == 0).all(dim, keepdim=True))


def test_conventions_by_hand() -> None:
    """Which numbers are magnitudes: A is (1, 2), B is (2, 1)."""
    A, B = torch.tensor([[3.0, 4.0]]), torch.tensor([[5.0], [12.0]])
    want = {
        "col": ([[3, 4]], [[13]]),
        "row": ([[5]], [[5], [12]]),
        "rank": ([[5]], [[13]]),
        "feature": ([[3, 4]], [[5], [12]]),
    }
    for name, (dim_A, dim_B) in AXES.items():
        assert (dora.split(A, dim_A).magnitude.tolist(), dora.split(B, dim_B).magnitude.tolist()) == want[name]


@conventions
def test_split_undoes_a_product_of_parts(convention: str) -> None:
    for F, dim in zip((factor(3, 5), factor(6, 3)), AXES[convention], strict=True):
        D, M = dora.unit(F, dim), dora.norm(factor(9, 9)[: F.shape[0], : F.shape[1]], dim)
        s = dora.split(M * D, dim)
        torch.testing.assert_close(s.magnitude, M, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(s.direction, D, rtol=1e-12, atol=1e-12)


@conventions
def test_scaling_changes_lengths_alone(convention: str) -> None:
    F, dim = factor(3, 5), AXES[convention][0]
    s, bigger = dora.split(F, dim), dora.split(2.5 * F, dim)
    torch.testing.assert_close(bigger.magnitude, 2.5 * s.magnitude, rtol=1e-12, atol=0)
    torch.testing.assert_close(bigger.direction, s.direction, rtol=1e-12, atol=1e-15)


def test_turning_the_columns_leaves_their_lengths() -> None:
    A, Q = factor(4, 6), torch.linalg.qr(factor(4, 4))[0]
    s, turned = dora.split(A, 0), dora.split(Q @ A, 0)
    torch.testing.assert_close(turned.magnitude, s.magnitude, rtol=1e-12, atol=0)
    assert not torch.allclose(turned.direction, s.direction)


def test_a_dead_vector_has_no_direction_and_no_nan_in_its_gradient() -> None:
    s = dora.split(torch.zeros(3, 2), 0)
    assert s.dead.all() and (s.direction == 0).all() and (s.magnitude == 0).all()
    F = factor(3, 2)
    F[:, 0] = 0
    F.requires_grad_()
    dora.unit(F, 0).sum().backward()
    assert F.grad is not None and F.grad.isfinite().all()
    assert (F.grad[:, 0] == 0).all() and (F.grad[:, 1] != 0).any()


def test_just_above_and_below_the_limit_of_death() -> None:
    F = torch.tensor([[2e-12, 0.5e-12]], dtype=torch.float64)
    s = dora.split(F, 0)
    assert s.dead.tolist() == [[False, True]]
    assert s.direction.tolist() == [[1.0, 0.0]] and s.magnitude[0, 1] == 0


def test_gradient_of_unit_is_the_projection() -> None:
    """d(F/|F|) = (I - D D^T)/|F|, by finite differences."""
    F = factor(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: dora.unit(x, 0), (F,))
    assert torch.autograd.gradcheck(lambda x: dora.norm(x, 1), (F,))


def test_half_precision_norms_are_taken_in_float32() -> None:
    """300 numbers of 300: their squares add to 2.7e7, above the largest float16."""
    F = torch.full((300, 1), 300.0, dtype=torch.float16)
    s = dora.split(F, 0)
    assert s.magnitude.dtype == torch.float16 and s.magnitude.item() == pytest.approx(300 * 300**0.5, rel=1e-3)
    assert s.direction.isfinite().all()
