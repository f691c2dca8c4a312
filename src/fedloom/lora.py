"""Pure arithmetic on LoRA factors: A is (r, in), B is (out, r), one pair per adapted layer.

Sums of products sum_k p_k B_k A_k are kept as stacked factors and re-factored through thin QR: no (out, in) product is formed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedloom.state import Group, Sites, State
from fedloom.state import only as only
from fedloom.state import without as without


def scale(alpha: float, rank: int, rslora: bool = False) -> float:
    """alpha / rank, or alpha / sqrt(rank) when rank-stabilised.

    >>> scale(16, 8), scale(16, 4, rslora=True)
    (2.0, 8.0)
    """
    return alpha / (math.sqrt(rank) if rslora else rank)


def init_A(sites: Sites, rank: int, rng: torch.Generator) -> Group:
    """A (rank, in) per site, uniform in +-1/sqrt(in): Kaiming uniform with a = sqrt(5), as PEFT does."""
    return {site: (torch.rand(rank, n, generator=rng) * 2 - 1) / math.sqrt(n) for site, (_, n) in sites.items()}


def init_B(sites: Sites, rank: int) -> Group:
    """B (out, rank) per site, zero."""
    return {site: torch.zeros(m, rank) for site, (m, _) in sites.items()}


def init(sites: Sites, rank: int, rng: torch.Generator) -> State:
    """A uniform, B zero: the adapter that changes nothing."""
    return {"A": init_A(sites, rank, rng), "B": init_B(sites, rank)}


def sites_of(state: State) -> Sites:
    """The (out, in) of every site of a state that holds full factors."""
    return {site: (state["B"][site].shape[0], A.shape[1]) for site, A in state["A"].items()}


class Mean:
    """A running weighted mean of states: one of them is held at a time.

    The form m += (w / W)(x - m) gives back a single state, or identical ones, bit for bit.
    """

    def __init__(self) -> None:
        self.value: State = {}
        self.weight = 0.0

    def add(self, state: State, weight: float) -> None:
        """Add one state. Weights are at least 0; only their ratios matter."""
        self.weight += weight
        share = weight / self.weight if self.weight else 0.0
        for role, group in state.items():
            if role not in self.value:
                self.value[role] = {site: x.clone() for site, x in group.items()}
                continue
            into = self.value[role]
            for site, x in group.items():
                into[site].lerp_(x, share)


def product_square(B: Tensor, A: Tensor) -> Tensor:
    """Squared Frobenius norm of B @ A from the Gram matrices, O((out + in) r^2); differentiable at zero too."""
    return ((B.T @ B) * (A @ A.T)).sum().clamp_min(0)


def product_norm(B: Tensor, A: Tensor) -> Tensor:
    """Frobenius norm of B @ A."""
    return product_square(B, A).sqrt()


def svd(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD (U, S, Vh) of B @ A, never forming the product.

    B is (out, R), A is (R, in); the result has min(out, in, R) triplets, the largest entry of each left vector positive.
    O((out + in) R^2 + R^3). Raises ValueError if the R differ.
    """
    if B.shape[1] != A.shape[0]:
        raise ValueError(f"B has {B.shape[1]} columns and A {A.shape[0]} rows, expected the same number")
    Qb, Rb = torch.linalg.qr(B)
    Qa, Ra = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.T, full_matrices=False)
    U, Vh = Qb @ U, Vh @ Qa.T
    # A triplet is determined up to its sign: fix it, so that clients see continuous factors from round to round.
    sign = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
    sign[sign == 0] = 1
    return U * sign, S, Vh * sign.T


def principal(W: Tensor, rank: int, rng: torch.Generator, passes: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """The first `rank` singular triplets (U, S, Vh) of a dense W (out, in), O(out in rank), by subspace iteration.

    Halko, Martinsson, Tropp, "Finding Structure with Randomness", arXiv 0909.4061, algorithm 4.4: exact to rounding if
    rank + 10 reaches min(out, in), else as good as the decay of the singular values beyond `rank` makes it.
    """
    q = min(rank + 10, *W.shape)
    Q = torch.linalg.qr(W @ torch.randn(W.shape[1], q, generator=rng).to(W.dtype))[0]
    for _ in range(passes):
        Q = torch.linalg.qr(W @ torch.linalg.qr(W.T @ Q)[0])[0]
    U, S, Vh = svd(Q, Q.T @ W)
    return U[:, :rank], S[:rank], Vh[:rank]


class Stack:
    """A sum of products in factored form: sum of w B A over what was added, as left (out, R) and right (R, in).

    Once R passes 2 min(out, in) the stack is re-factored to min(out, in), which loses nothing: its memory stays bounded
    for any number of clients.
    """

    def __init__(self) -> None:
        self._left: list[Tensor] = []
        self._right: list[Tensor] = []

    def add(self, B: Tensor, A: Tensor, weight: float = 1.0) -> None:
        """Add weight * B @ A."""
        self._left.append(B if weight == 1.0 else B * weight)
        self._right.append(A)
        full = min(B.shape[0], A.shape[1])
        if len(self._left) > 1 and sum(x.shape[1] for x in self._left) > 2 * full:
            U, S, Vh = svd(*self.factors())
            self._left, self._right = [U * S], [Vh]

    def factors(self) -> tuple[Tensor, Tensor]:
        """left (out, R), right (R, in)."""
        if len(self._left) == 1:
            return self._left[0], self._right[0]
        return torch.cat(self._left, dim=1), torch.cat(self._right, dim=0)


def offset(left: Tensor | None, right: Tensor | None, more: Stack) -> tuple[Tensor, Tensor | None]:
    """left @ right (left alone if `right` is None, nothing if both are) plus a stack, in whichever form is smaller.

    Factors left (out, q), right (q, in) while q (out + in) < out * in, else the dense (out, in) sum and None.
    """
    if left is not None and right is not None:
        more.add(left, right)
    L, R = more.factors()
    if left is not None and right is None:
        return left + L @ R, None
    if L.shape[1] * (L.shape[0] + R.shape[1]) < L.shape[0] * R.shape[1]:
        return L, R
    return L @ R, None
