"""How do I add a method? One class: here FedAvg with a server learning rate, run by its name "own_method:Damped".

cd examples && python own_method.py

A run file says `method.name = "own_method:Damped"`, and `fedloom run` finds the module where it is installed or in the current
folder. It runs that module's code: read a run file of others, and the module that it names, as you would read a script.
"""

from dataclasses import dataclass
from typing import ClassVar

import fedloom
from fedloom.core import Mean, Round, State
from fedloom.methods.base import LoRA
from fedloom.state import only


@dataclass(frozen=True, kw_only=True)
class Damped(LoRA):
    """x <- x + server_lr (mean of the clients' x - x), for A, B and the head."""

    server_lr: float = 0.7

    name: ClassVar[str] = "damped"
    paper: ClassVar[str] = "an example"

    async def server(self, state: State, round: Round) -> State:
        mean = await Mean(send=lambda client: only(state, "A", "B", "head"))
        return state | {
            role: {site: state[role][site].lerp(x, self.server_lr) for site, x in group.items()}
            for role, group in mean.state.items()
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
