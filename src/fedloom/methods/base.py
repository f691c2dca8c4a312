"""What all methods on the factors A and B share. Hu et al., "LoRA: Low-Rank Adaptation", arXiv 2106.09685."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt

from fedloom import lora
from fedloom.core import Client, Method, Visit, Work
from fedloom.fields import check_fields
from fedloom.state import Sites, State


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """A (rank, in) uniform and B (out, rank) zero per site at first; clients train them at scale alpha / rank."""

    rank: Annotated[int, Ge(1)] = 8
    """Rank of the server's adapter."""
    alpha: Annotated[float, Gt(0)] = 16.0
    """LoRA scale: B @ A is multiplied by alpha / rank (alpha / sqrt(rank) with `rslora`)."""
    rslora: bool = False
    """Rank-stabilised scale (Kalajdzievski, arXiv 2312.03732)."""

    def __post_init__(self) -> None:
        check_fields(self, self.name)

    @property
    def scale(self) -> float:
        """Multiplies B @ A."""
        return lora.scale(self.alpha, self.rank, self.rslora)

    def scale_of(self, client: Client) -> float:
        """The scale at the client's own rank, of a method whose clients train with it."""
        return lora.scale(self.alpha, client.rank, self.rslora)

    def init(self, sites: Sites, rng: torch.Generator) -> State:
        return lora.init(sites, self.rank, rng)

    def model(self, received: State, own: State, visit: Visit) -> Work:
        return Work(train=received, scale=self.scale)
