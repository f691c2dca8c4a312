"""Frozen bases that the server and every client make from one seed: 8 bytes on the wire."""

from __future__ import annotations

import torch

from fedloom.errors import ConfigError
from fedloom.rng import generator
from fedloom.state import Group, Sites


def check_sides(name: str, rank: int, sites: Sites) -> None:
    """Raise ConfigError if a layer has a side below the rank: it has no `rank` orthonormal directions."""
    for site, sides in sites.items():
        if min(sides) < rank:
            raise ConfigError(
                f"{name} needs rank directions on both sides of a layer, got rank {rank} for {site} of {sides[0]} x "
                f"{sides[1]}: set rank in [lora] to {min(sides)} or less, or leave this layer out of the target modules"
            )


def rows(seed: int, sites: Sites, rank: int, dtype: torch.dtype = torch.float32) -> Group:
    """A (rank, in) per site with orthonormal rows, uniformly random."""
    return {site: _orthonormal(n, rank, generator(seed, "A", site), dtype).T for site, (_, n) in sites.items()}


def columns(seed: int, sites: Sites, rank: int, dtype: torch.dtype = torch.float32) -> Group:
    """B (out, rank) per site with orthonormal columns, uniformly random."""
    return {site: _orthonormal(m, rank, generator(seed, "B", site), dtype) for site, (m, _) in sites.items()}


def _orthonormal(n: int, rank: int, rng: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    # The generator is the site's own: a client may name its layers in another order.
    Q: torch.Tensor = torch.linalg.qr(torch.randn(n, rank, generator=rng))[0]
    return Q.to(dtype)
