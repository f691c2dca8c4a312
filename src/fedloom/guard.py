"""Is an upload fit to be averaged? Roles, sites, shapes, dtypes, seeds, finite numbers, and optionally its norm.

What is refused is dropped with its reason, and the round goes on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom.core import State


@dataclass(frozen=True)
class Expected:
    """What an upload must look like: shapes and dtypes, and the very values of what is not a float (seeds, indices)."""

    shapes: dict[str, dict[str, tuple[torch.Size, torch.dtype]]]
    exact: State
    shrinks: bool = False
    """A, B may come at a smaller rank."""

    @staticmethod
    def like(state: State, shrinks: bool = False) -> Expected:
        """The expectation that `state`, as `Method.expected` gives it, stands for. Holds no float tensor."""
        return Expected(
            {role: {site: (x.shape, x.dtype) for site, x in group.items()} for role, group in state.items()},
            {
                role: {site: x for site, x in group.items() if not x.is_floating_point()}
                for role, group in state.items()
            },
            shrinks,
        )

    def fault(self, state: State, max_norm: float | None = None) -> str | None:
        """Why the state must not be averaged, or None."""
        if missing := self.shapes.keys() - state.keys():
            return f"missing role {', '.join(sorted(missing))}"
        if extra := state.keys() - self.shapes.keys():
            return f"unexpected role {', '.join(sorted(extra))}"
        square = 0.0
        for role, sites in self.shapes.items():
            if missing := sites.keys() - state[role].keys():
                return f"missing tensor {role}/{min(missing)} ({len(missing)} missing)"
            if extra := state[role].keys() - sites.keys():
                return f"unexpected tensor {role}/{min(extra)}"
            for site, (shape, dtype) in sites.items():
                x = state[role][site]
                if x.dtype != dtype:
                    return f"{role}/{site} has dtype {x.dtype}, expected {dtype}"
                if not self._fits(role, x.shape, shape):
                    return f"{role}/{site} has shape {tuple(x.shape)}, expected {tuple(shape)}"
                if site in self.exact[role]:
                    if not torch.equal(x, self.exact[role][site]):
                        return f"{role}/{site} is not what was sent"
                elif not _finite(x):
                    return f"{role}/{site} has a NaN or an infinite number"
                elif max_norm is not None:
                    square += float(x.double().square().sum())
        if self.shrinks and (fault := _ranks_differ(state)):
            return fault
        if max_norm is not None and square > max_norm**2:
            return f"norm {square**0.5:.4g} is above max_norm {max_norm:.4g}"
        return None

    def _fits(self, role: str, got: torch.Size, want: torch.Size) -> bool:
        if got == want or not (self.shrinks and len(got) == len(want) == 2):
            return got == want
        rank, other = (0, 1) if role == "A" else (1, 0)
        return role in ("A", "B") and got[other] == want[other] and 1 <= got[rank] <= want[rank]


def _finite(x: Tensor) -> bool:
    # A sum is finite only if all terms are, bar overflow: one pass without a boolean tensor, then the exact test.
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())


def _ranks_differ(state: State) -> str | None:
    ranks = {x.shape[0] for x in state["A"].values()} | {x.shape[1] for x in state["B"].values()}
    return f"ranks differ between tensors: {sorted(ranks)}" if len(ranks) > 1 else None
