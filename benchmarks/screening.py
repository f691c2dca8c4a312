"""Honest clients under the default bound on updates: how far each moves the model against the median, for every method.

    python benchmarks/screening.py [--rounds 8] [--limit 200] [--steps 4] [--methods fedit,...]

The quickstart's model and data, four clients of unequal size (Dirichlet 0.5), ranks 2, 4, 8, 8 where a method follows them and
keep rates 0.5, 0.75, 1, 1 where it follows those. Printed: the largest ratio that is named as suspicious (above 3), and how many
updates were refused (the bound is clients.max_ratio = 10).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from machine import describe

import fedloom
from fedloom import methods
from fedloom.errors import FedloomError

QUICKSTART = Path(fedloom.__file__).parent / "quickstart.toml"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--methods", default=",".join(methods.names()))
    asked = parser.parse_args()
    print(describe(), flush=True)
    for name in asked.methods.split(","):
        budgets = methods.get(name).budgets
        chosen = [
            f"method.name={name}",
            f"task.limit={asked.limit}",
            "task.eval_limit=50",
            "clients.partition=dirichlet",
            f"clients.ranks={'[2, 4, 8, 8]' if 'rank' in budgets else 8}",
            f"clients.keep={'[0.5, 0.75, 1.0, 1.0]' if 'keep' in budgets else 1.0}",
            f"train.rounds={asked.rounds}",
            "train.evaluate_every=0",
        ]
        try:
            config = fedloom.load_config(QUICKSTART, chosen)
            train = config.train.model_copy(update={"local_epochs": None, "local_steps": asked.steps})
            with tempfile.TemporaryDirectory() as folder:
                rounds = fedloom.run(config.model_copy(update={"train": train}), Path(folder) / "run").rounds
        except FedloomError as error:
            print(f"{name:22} {error}", flush=True)
            continue
        largest = max((x for r in rounds for x in r["suspicious"].values()), default=0.0)
        refused = sum(len(r["dropped"]) for r in rounds)
        print(f"{name:22} largest ratio named {largest:5.2f}, refused {refused}", flush=True)


if __name__ == "__main__":
    main()
