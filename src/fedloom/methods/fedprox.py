"""FedProx: a proximal term keeps local training near the state it started from.

Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, arXiv 1812.06127: client k minimises
F_k(x) + mu/2 ||x - x_t||^2. The paper has no factors: x is either what is trained, or the product that it adds to the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from fedloom import lora
from fedloom.core import Client, Factors, Visit, Work
from fedloom.errors import ConfigError
from fedloom.flows import Over, rehearse, relay_works
from fedloom.state import State, only


@dataclass(frozen=True, kw_only=True)
class FedProx(Over):
    """mu/2 times a squared distance from the start is added to the loss of every work."""

    mu: Annotated[float, Ge(0)] = 0.01
    """Weight of the proximal term; 0 is the method under it."""
    of: Literal["factors", "product"] = "factors"
    """`factors`: ||x - start||^2 of all that is trained, which depends on how B A is factored; `product`: the change of
    the model itself, ||s (B A - B0 A0)||_F^2 of every layer, and the head's ||x - start||^2. For `product` be outermost."""

    name: ClassVar[str] = "fedprox"
    paper: ClassVar[str] = "Li et al., Federated Optimization in Heterogeneous Networks, arXiv 1812.06127"
    group: ClassVar[str] = "local training"
    adds: ClassVar[tuple[str, ...]] = ("prox_",)

    def __post_init__(self) -> None:
        super().__post_init__()
        seen = rehearse(self.over, Client("rehearsal", 1, self.over.rank), 1) if self.of == "product" else None
        if seen and seen.work and seen.work.adapter(seen.work.train, seen.work.fixed).gate is not None:
            raise ConfigError(
                f'fedprox: of is "product", but what {self.over.name} adds depends on the input; expected "factors"'
            )

    async def client(self, received: State, own: State, visit: Visit) -> tuple[State, State]:
        def near(work: Work) -> Work:
            start = {f"prox_{role}": group for role, group in work.train.items()}
            distance = _of_factors if self.of == "factors" else _of_product(work.adapter, work.scale)

            def penalty(train: State, fixed: State) -> Tensor:
                return self.mu / 2 * distance(train, {role: fixed[f"prox_{role}"] for role in train}, fixed)

            return replace(work, fixed=work.fixed | start, penalties=(*work.penalties, penalty))

        return await relay_works(self.over.client(received, own, visit), near if self.mu else lambda work: work)


def _of_factors(train: State, start: State, fixed: State) -> Tensor:
    """||x - start||^2 over all tensors."""
    squares = [(x - start[role][site]).square().sum() for role, group in train.items() for site, x in group.items()]
    return torch.stack(squares).sum()


def _of_product(adapter: Callable[[State, State], Factors], scale: float) -> Callable[[State, State, State], Tensor]:
    def distance(train: State, start: State, fixed: State) -> Tensor:
        now, then = adapter(train, fixed), adapter(start, fixed)
        squares = [_of_factors(only(train, "head"), only(start, "head"), fixed)] if "head" in train else []
        for site, A in now.A.items():
            # B A - B0 A0 = (B - B0) A + B0 (A - A0): small near the start, where a difference of norms would cancel.
            left = torch.cat([now.B[site] - then.B[site], then.B[site]], dim=1)
            squares.append(scale**2 * lora.product_square(left, torch.cat([A, A - then.A[site]])))
        return torch.stack(squares).sum()

    return distance
