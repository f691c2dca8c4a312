"""DoRA's split of a factor into magnitude and direction, F = M D, along one axis.

The split is that of DoRA (Liu et al., arXiv 2402.09353, eq. 2): unit vectors and their lengths. Over which axis
FedLoRA-Optimizer takes the norm is not known, so all four conventions are here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-12
"""A shorter vector is dead: it has no direction."""

AXES = {"col": (0, 0), "row": (1, 1), "rank": (1, 0), "feature": (0, 1)}
"""Convention -> the dimension that the norm is taken over, for A (r, in) and for B (out, r).

`col`: columns of both (DoRA's text); `row`: rows of both (DoRA's code); `rank`: one vector per rank component, rows of A
and columns of B; `feature`: columns of A and rows of B.
"""


class Split(NamedTuple):
    """Lengths with size 1 along the axis; unit vectors, zero where dead; which are dead, shaped as the lengths."""

    magnitude: Tensor
    direction: Tensor
    dead: Tensor


def unit(F: Tensor, dim: int) -> Tensor:
    """The vectors of F along `dim` at length one; dead ones are zero. Differentiable."""
    length = norm(F, dim)
    return torch.where(length < EPS, torch.zeros_like(F), F / length.clamp_min(EPS))


def norm(F: Tensor, dim: int) -> Tensor:
    """Lengths along `dim`, kept as a dimension of size 1; in float32 at least."""
    wide = F if F.dtype in (torch.float32, torch.float64) else F.float()
    length: Tensor = torch.linalg.vector_norm(wide, dim=dim, keepdim=True)
    return length.to(F.dtype)


def split(F: Tensor, dim: int) -> Split:
    """Magnitudes and directions of the vectors of F that run along `dim`.

    >>> s = split(torch.tensor([[3.0, 0.0], [4.0, 0.0]]), dim=0)
    >>> s.magnitude.tolist(), s.direction.tolist(), s.dead.tolist()
    ([[5.0, 0.0]], [[0.6000000238418579, 0.0], [0.800000011920929, 0.0]], [[False, True]])
    """
    length = norm(F, dim)
    dead = length < EPS
    return Split(torch.where(dead, torch.zeros_like(length), length), unit(F, dim), dead)
