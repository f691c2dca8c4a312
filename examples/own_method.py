"""How do I add a method? One class: here FedAvg with a server learning rate, run by its name "own_method:Damped".

cd examples && python own_method.py
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import fedloom
from fedloom import lora
from fedloom.core import Client, Method, Sites, State, Upload, Work


@dataclass(frozen=True, kw_only=True)
class Damped(Method):
    """x <- x + server_lr (mean of the clients' x - x), for A, B and the head."""

    server_lr: float = 0.7

    name: ClassVar[str] = "damped"
    paper: ClassVar[str] = "an example"

    def prepare(self, received: State, kept: State, sites: Sites, client: Client, t: int) -> Work:
        return Work(train=received, scale=lora.scale(self.alpha, self.rank, self.rslora))

    def aggregate(self, state: State, uploads: Iterable[Upload]) -> State:
        mean = lora.mean(uploads, "A", "B", "head")
        return state | {
            role: {site: state[role][site].lerp(x, self.server_lr) for site, x in group.items()}
            for role, group in mean.items()
        }


if __name__ == "__main__":
    result = fedloom.run(
        {
            "model": {"name": "minilm"},
            "task": {"data": "trec", "limit": 400, "eval_limit": 200},
            "method": {"name": "own_method:Damped", "server_lr": 0.9},
            "train": {"rounds": 2, "lr": 6e-3},
        }
    )
    for record in result.rounds:
        print(record["round"], record["eval"])
