"""The specification of an upload: roles, sites, shapes and dtypes, where a size may be one that the client chooses.

What is rejected is dropped with its reason, and the round goes on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom.state import State, is_finite


@dataclass(frozen=True)
class Dim:
    """A size that the client chooses, from `low` to `high`. Sizes of one name agree within an upload."""

    name: str
    high: int
    low: int = 1


@dataclass(frozen=True)
class Leaf:
    """One tensor's shape and dtype."""

    shape: tuple[int | Dim, ...]
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"({', '.join(f'{d.name} {d.low} to {d.high}' if isinstance(d, Dim) else str(d) for d in self.shape)})"


Spec = dict[str, dict[str, Leaf]]
"""Role -> site -> leaf. Holds no tensor."""


def like(state: State, *roles: str) -> Spec:
    """The specification of the roles named, or of all that are floating-point (seeds and indices do not come back)."""
    return {
        role: {site: Leaf(tuple(x.shape), x.dtype) for site, x in group.items()}
        for role, group in state.items()
        if (role in roles if roles else all(x.is_floating_point() for x in group.values()))
    }


def zeros(spec: Spec) -> State:
    """The smallest upload that the specification allows, all zero."""

    def zero(leaf: Leaf) -> Tensor:
        return torch.zeros([d.low if isinstance(d, Dim) else d for d in leaf.shape], dtype=leaf.dtype)

    return {role: {site: zero(leaf) for site, leaf in group.items()} for role, group in spec.items()}


def reject_reason(spec: Spec, state: State, max_norm: float | None = None) -> str | None:
    """Why an upload must not be used, or None. `max_norm` bounds the Euclidean norm of all its floating-point numbers."""
    if missing := spec.keys() - state.keys():
        return f"missing role {', '.join(sorted(missing))}"
    if extra := state.keys() - spec.keys():
        return f"unexpected role {min(extra)}" + (f" ({len(extra)} unexpected)" if len(extra) > 1 else "")
    chosen: dict[str, int] = {}
    square = 0.0
    for role, leaves in spec.items():
        if gone := leaves.keys() - state[role].keys():
            return f"missing tensor {role}/{min(gone)} ({len(gone)} missing)"
        if more := state[role].keys() - leaves.keys():
            return f"unexpected tensor {role}/{min(more)}"
        for site, leaf in leaves.items():
            x = state[role][site]
            if why := _misfit(leaf, x, chosen):
                return f"{role}/{site} {why}"
            if not is_finite(x):
                return f"{role}/{site} has a NaN or an infinite number"
            if max_norm is not None and x.is_floating_point():
                square += float(x.double().square().sum())
    if max_norm is not None and square > max_norm**2:
        return f"norm {square**0.5:.4g} is above max_norm {max_norm:.4g}"
    return None


def _misfit(leaf: Leaf, x: Tensor, chosen: dict[str, int]) -> str | None:
    """Why a tensor is not of the leaf's shape and dtype, or None; `chosen` gathers the sizes that the client chose."""
    if x.dtype != leaf.dtype:
        return f"has dtype {x.dtype}, expected {leaf.dtype}"
    wrong = f"has shape {tuple(x.shape)}, expected {leaf}"
    if len(x.shape) != len(leaf.shape):
        return wrong
    for got, want in zip(x.shape, leaf.shape, strict=True):
        if not isinstance(want, Dim):
            if got != want:
                return wrong
        elif not want.low <= got <= want.high:
            return wrong
        elif chosen.setdefault(want.name, got) != got:
            return f"has {want.name} {got}, other tensors of this upload have {want.name} {chosen[want.name]}"
    return None


def secret_sum_obstacle(spec: Spec) -> str | None:
    """Why uploads of this specification cannot be summed in secret, or None: the server must know every size."""
    for role, group in spec.items():
        for site, leaf in group.items():
            if not leaf.dtype.is_floating_point:
                return f"{role}/{site} holds integers"
            if any(isinstance(d, Dim) for d in leaf.shape):
                return f"{role}/{site} has a size that the client chooses"
    return None
