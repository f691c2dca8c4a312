"""FFA-LoRA: A is frozen at a random start that all share, B is trained and averaged.

Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024, arXiv 2403.12313.
The average is exact, sum_k p_k B_k A = (sum_k p_k B_k) A. A travels as a seed: 8 bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedloom import lora, slices
from fedloom.core import Client, Group, Method, Sites, State, Upload, Work
from fedloom.methods import choice


@dataclass(frozen=True, kw_only=True)
class FFALoRA(Method):
    """B <- sum_k p_k B_k, A never changes.

    A client of smaller rank uses the first rows of A and trains the first columns of B; padding B with zeros is then
    the exact average.
    """

    a_init: str = "kaiming"
    """`kaiming`: uniform, as PEFT does; `orthonormal`: orthonormal rows, about 1.7 times as long, which acts on B like
    a three times larger learning rate."""

    name: ClassVar[str] = "ffa_lora"
    paper: ClassVar[str] = "Sun et al., Improving LoRA in Privacy-preserving Federated Learning, arXiv 2403.12313"
    budgets: ClassVar[frozenset[str]] = frozenset({"rank"})
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        choice(self.name, "a_init", self.a_init, "kaiming", "orthonormal")

    def _A(self, seed: int, sites: Sites) -> Group:
        # A generator for each site: a client may name its layers in another order.
        A: Group = {}
        for site, shape in sites.items():
            A |= lora.init_A({site: shape}, self.rank, lora.generator(seed, site))
        if self.a_init == "orthonormal":
            A = {site: torch.linalg.qr(x.T)[0].T.contiguous() for site, x in A.items()}
        return A

    def init(self, sites: Sites, rng: torch.Generator) -> State:
        seed = torch.randint(2**62, (1,), generator=rng)
        return {"A": self._A(int(seed), sites), "B": lora.init_B(sites, self.rank), "frozen": {"seed": seed}}

    def broadcast(self, state: State, client: Client, t: int) -> State:
        B = slices.take(state, slices.prefix(state, client.rank))["B"]
        return lora.only(state, "frozen", "head") | {"B": B}

    def expected(self, received: State, t: int) -> State:
        return lora.without(received, "frozen")

    def prepare(self, received: State, kept: State, sites: Sites, client: Client, t: int) -> Work:
        A = {site: x[: client.rank] for site, x in self._A(int(received["frozen"]["seed"]), sites).items()}
        # One scale for all ranks (reading): the model of a client is the leading part of the global one.
        return Work(
            train=lora.without(received, "frozen"),
            fixed={"A": A},
            scale=lora.scale(self.alpha, self.rank, self.rslora),
        )

    def aggregate(self, state: State, uploads: Iterable[Upload]) -> State:
        result = lora.Mean()
        for upload in uploads:
            B = {site: torch.nn.functional.pad(x, (0, self.rank - x.shape[1])) for site, x in upload.state["B"].items()}
            result.add(upload.state | {"B": B}, upload.client.examples)
        return state | result.value
