from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fedloom import lora
from fedloom.rng import generator, seed_of
from fedloom.state import State, finite, is_finite, only, without, zeros_like

SHAPES = [(9, 7, 3), (5, 8, 5), (4, 4, 6), (1, 6, 2), (6, 1, 2), (7, 7, 1)]
"""(out, in, rank), one with more ranks than rows."""


def factors(m: int, n: int, r: int, *key: int | str) -> tuple[Tensor, Tensor]:
    rng = generator(m, n, r, *key)
    return (
        torch.randn(m, r, generator=rng, dtype=torch.float64),
        torch.randn(r, n, generator=rng, dtype=torch.float64),
    )


def mean(*states: tuple[float, Tensor]) -> Tensor:
    """The weighted mean of one tensor."""
    running = lora.Mean()
    for weight, x in states:
        running.add({"A": {"s": x}}, weight)
    return running.value["A"]["s"]


@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_svd_is_that_of_the_dense_product(m: int, n: int, r: int) -> None:
    B, A = factors(m, n, r)
    U, S, Vh = lora.svd(B, A)
    q = min(m, n, r)
    assert (U.shape, S.shape, Vh.shape) == ((m, q), (q,), (q, n))
    torch.testing.assert_close(S, torch.linalg.svdvals(B @ A)[:q], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(U * S @ Vh, B @ A, rtol=1e-12, atol=1e-12)
    for basis in (U.T, Vh):
        torch.testing.assert_close(basis @ basis.T, torch.eye(q, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()


def test_svd_refuses_factors_that_do_not_meet() -> None:
    with pytest.raises(ValueError, match="B has 3 columns and A 2 rows"):
        lora.svd(torch.ones(4, 3), torch.ones(2, 5))


def test_svd_of_a_zero_product_is_finite() -> None:
    U, S, Vh = lora.svd(torch.zeros(5, 2), torch.ones(2, 4))
    assert torch.equal(S, torch.zeros(2))
    assert U.isfinite().all() and Vh.isfinite().all()
    torch.testing.assert_close(Vh @ Vh.T, torch.eye(2))


def test_svd_of_float32_is_as_good_as_float32() -> None:
    B, A = factors(96, 64, 20)
    U, S, Vh = lora.svd(B.float(), A.float())
    error = (U * S @ Vh - B @ A).norm() / (B @ A).norm()
    assert error < 1e-6


def test_svd_scales_to_a_wide_layer() -> None:
    """A 4096 x 4096 product of rank 160 would take minutes densely."""
    B, A = torch.randn(4096, 24, generator=generator(1)), torch.randn(24, 4096, generator=generator(2))
    _, S, _ = lora.svd(B, A)
    torch.testing.assert_close(S.square().sum().sqrt(), lora.product_norm(B, A), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_product_norm(m: int, n: int, r: int) -> None:
    B, A = factors(m, n, r)
    torch.testing.assert_close(lora.product_norm(B, A), (B @ A).norm(), rtol=1e-12, atol=1e-12)
    assert lora.product_norm(torch.zeros_like(B), A) == 0


@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
@pytest.mark.parametrize("clients", [1, 2, 30])
def test_stack_is_the_weighted_sum_of_products_in_bounded_memory(m: int, n: int, r: int, clients: int) -> None:
    stack, want = lora.Stack(), torch.zeros(m, n, dtype=torch.float64)
    for k in range(clients):
        B, A = factors(m, n, r, k)
        stack.add(B, A, 0.1 * (k + 1))
        want += 0.1 * (k + 1) * B @ A
        left, right = stack.factors()
        assert left.shape[1] == right.shape[0] <= max(2 * min(m, n), r)
    torch.testing.assert_close(left @ right, want, rtol=1e-11, atol=1e-11)


def test_stack_leaves_what_it_was_given_alone() -> None:
    B, A = factors(3, 2, 2)
    before = B.clone(), A.clone()
    stack = lora.Stack()
    for _ in range(5):
        stack.add(B, A, 0.5)
    assert torch.equal(B, before[0]) and torch.equal(A, before[1])


def test_gauge_does_not_matter_to_stack_svd_and_norm() -> None:
    """(B R, R^-1 A) is the same model."""
    plain, turned = lora.Stack(), lora.Stack()
    for k in range(3):
        B, A = factors(9, 7, 3, k)
        R = torch.randn(3, 3, generator=generator("R", k), dtype=torch.float64)
        plain.add(B, A)
        turned.add(B @ R, torch.linalg.inv(R) @ A)
        torch.testing.assert_close(
            lora.product_norm(B @ R, torch.linalg.inv(R) @ A), lora.product_norm(B, A), rtol=1e-9, atol=0
        )
    (U, S, Vh), (U2, S2, Vh2) = lora.svd(*plain.factors()), lora.svd(*turned.factors())
    torch.testing.assert_close(S2, S, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(U2 * S2 @ Vh2, U * S @ Vh, rtol=1e-9, atol=1e-9)


def test_covariance_identity() -> None:
    """sum p B A - mean(B) mean(A) = sum_{k<K} p_k (B_k - mean B)(A_k - A_K), of rank (K - 1) r at most."""
    p = [0.2, 0.5, 0.3]
    pairs = [factors(9, 8, 2, k) for k in range(3)]
    meanB = sum(w * B for w, (B, _) in zip(p, pairs, strict=True))
    meanA = sum(w * A for w, (_, A) in zip(p, pairs, strict=True))
    error = sum(w * B @ A for w, (B, A) in zip(p, pairs, strict=True)) - meanB @ meanA
    stack = lora.Stack()
    for w, (B, A) in list(zip(p, pairs, strict=True))[:-1]:
        stack.add(B - meanB, A - pairs[-1][1], w)
    left, right = stack.factors()
    torch.testing.assert_close(left @ right, error, rtol=1e-12, atol=1e-12)
    assert torch.linalg.matrix_rank(error) == 4 == left.shape[1]


@pytest.mark.parametrize("m, n", [(12, 20), (5, 4)])
def test_offset_in_all_its_forms_is_the_sum(m: int, n: int) -> None:
    def more() -> lora.Stack:
        stack = lora.Stack()
        stack.add(*factors(m, n, 1, "more"))
        return stack

    add = torch.matmul(*factors(m, n, 1, "more"))
    left, right = factors(m, n, 2, "old")
    dense = torch.randn(m, n, generator=generator("dense"), dtype=torch.float64)
    for old in ((None, None), (left, right), (dense, None)):
        L, R = lora.offset(old[0], old[1], more())
        got = L if R is None else L @ R
        want = add + (0 if old[0] is None else old[0] if old[1] is None else old[0] @ old[1])
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        if R is not None:
            assert L.numel() + R.numel() < m * n
        else:
            assert L.shape == (m, n)


def test_offset_turns_dense_where_factors_are_no_smaller() -> None:
    """q (out + in) < out in: 12 x 20 holds 240 numbers, 32 a rank: 7 ranks are factors, 8 are not."""
    for q in (7, 8):
        stack = lora.Stack()
        stack.add(*factors(12, 20, q))
        _, R = lora.offset(None, None, stack)
        assert (R is not None) == (q == 7)


def test_mean_by_hand() -> None:
    x, y = torch.tensor([[1.0, 2.0]]), torch.tensor([[5.0, 6.0]])
    running = lora.Mean()
    running.add({"A": {"s": x}, "head": {"s": y}}, 1)
    running.add({"A": {"s": y}, "head": {"s": y}}, 3)
    assert running.value.keys() == {"A", "head"} and running.weight == 4
    assert running.value["A"]["s"].tolist() == [[4.0, 5.0]] and running.value["head"]["s"].tolist() == [[5.0, 6.0]]
    assert mean((1, x), (1, y)).tolist() == [[3.0, 4.0]]


def test_mean_gives_back_one_state_or_many_alike_bit_for_bit() -> None:
    x = torch.randn(50, 7, generator=generator(0)) * torch.logspace(-30, 30, 7)
    for sizes in ([3], [3, 5, 7, 11, 1000003], [1] * 49):
        assert torch.equal(mean(*((n, x.clone()) for n in sizes)), x)


def test_mean_does_not_touch_or_alias_its_inputs() -> None:
    x, y = torch.ones(2), torch.zeros(2)
    got = mean((1, x), (1, y))
    got += 1
    assert x.tolist() == [1, 1] and y.tolist() == [0, 0]
    got = mean((1, x))
    got += 1
    assert x.tolist() == [1, 1]


def test_mean_is_close_to_the_sum_over_thousands() -> None:
    xs = torch.randn(2000, 3, generator=generator(5))
    w = torch.randint(1, 100, (2000,), generator=generator(6))
    got = mean(*((int(n), x) for x, n in zip(xs, w, strict=True)))
    want = (xs.double() * w[:, None]).sum(0) / w.sum()
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-7)


def test_mean_of_weights_zero_is_finite_and_mean_of_nothing_is_empty() -> None:
    assert mean((0, torch.ones(2)), (0, torch.zeros(2))).isfinite().all()
    assert mean((0, torch.ones(2)), (2, torch.zeros(2))).tolist() == [0, 0]
    assert lora.Mean().value == {} and lora.Mean().weight == 0


def test_init_is_uniform_and_changes_nothing() -> None:
    state = lora.init({"s": (300, 400)}, 8, generator(0))
    A, B = state["A"]["s"], state["B"]["s"]
    assert (A.shape, B.shape) == ((8, 400), (300, 8))
    assert (B == 0).all()
    bound = 1 / math.sqrt(400)
    assert A.abs().max() <= bound and A.abs().max() > 0.99 * bound
    assert abs(float(A.mean())) < 0.05 * bound
    # The variance of a uniform law on +-b is b^2 / 3.
    assert abs(float(A.var()) / (bound**2 / 3) - 1) < 0.1
    again: State = lora.init({"s": (300, 400)}, 8, generator(0))
    assert torch.equal(again["A"]["s"], A)
    assert lora.sites_of(state) == {"s": (300, 400)}


def test_seeds_are_63_bits_and_tell_their_keys_apart() -> None:
    keys = [(s, t, k) for s in range(5) for t in range(20) for k in ("a", "b", "ab")]
    keys += [(1, 23, "x"), (12, 3, "x"), (1, "23", "x"), (1, 2, "3x")]
    seeds = [seed_of(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds) and max(seeds) > 2**62
    # Fixed for ever: a run made today resumes with a later version.
    assert seed_of(0, 1, "a") == 3637448947316666225


def test_roles_are_picked_and_left_out() -> None:
    state: State = {"A": {}, "B": {}, "head": {}}
    assert list(only(state, "head", "x")) == ["head"]
    assert list(without(state, "head", "x")) == ["A", "B"]


def test_zeros_of_a_state_keep_shapes_and_dtypes() -> None:
    state: State = {"A": {"s": torch.ones(2, 3).double()}, "seed": {"s": torch.tensor(3)}}
    zero = zeros_like(state)
    assert zero["A"]["s"].dtype == torch.float64 and zero["A"]["s"].tolist() == [[0.0] * 3] * 2
    assert zero["seed"]["s"].dtype == torch.int64 and zero["seed"]["s"].item() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_seen(bad: float) -> None:
    x = torch.ones(4)
    assert finite({"A": {"s": x}, "B": {"s": torch.tensor([2**62])}})
    x[2] = bad
    assert not finite({"B": {"t": torch.ones(1)}, "A": {"s": x}}) and not is_finite(x)
    assert not is_finite(torch.tensor([math.inf, -math.inf]))
    assert is_finite(torch.full((4,), 3e38)), "a sum that overflows is no fault"
