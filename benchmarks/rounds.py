"""(c) The share of a round that is not training: the coroutines of server and clients, checks, means and checkpoint.

    python benchmarks/rounds.py [--clients 16] [--rows 128] [--rounds 3] [--methods fedit,fslora,...]

MiniLM on TREC questions, LoRA rank 8 on query and value plus the head, batch 8, one local epoch. Evaluation is not counted.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from machine import describe

from fedloom import checkpoint, methods
from fedloom.checkpoint import ClientStates
from fedloom.loop import one_round
from fedloom.runs.config import parse
from fedloom.runs.experiment import experiment
from fedloom.simulation import Simulation


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", default=",".join(methods.names()))
    asked = parser.parse_args()
    print(describe())
    print(f"{asked.clients} clients x {asked.rows} rows; median of {asked.rounds} rounds after a first one")
    for name in asked.methods.split(","):
        budgets = methods.get(name).budgets
        values = {
            "model": {"name": "minilm"},
            "task": {"data": "trec", "limit": asked.clients * asked.rows},
            "clients": {
                "count": asked.clients,
                **({"ranks": [2, 4, 8, 8]} if "rank" in budgets and "keep" not in budgets else {}),
                **({"keep": [0.5, 0.75, 1.0]} if "keep" in budgets else {}),
            },
            "method": {"name": name},
            "train": {"batch_size": 8, "lr": 1e-3},
        }
        e = experiment(parse(values, "benchmark"))
        with tempfile.TemporaryDirectory() as folder:
            states = ClientStates(Path(folder) / "kept")
            engine = Simulation(
                e.trainer, e.sites, e.rows_of, client_states=states, fresh=e.head, cohort=e.cohort, proxy=e.server
            )
            state, shares, totals = e.initial_state(), [], []
            for t in range(1, asked.rounds + 2):
                start = time.perf_counter()
                state, _ = one_round(e.method, engine, state, e.clients, t)
                checkpoint.save(Path(folder), t, state, states, keep=2)
                total = time.perf_counter() - start
                train_s = engine.stats()["train_s"]
                if t > 1:
                    totals.append(total)
                    shares.append((total - train_s) / total)
        middle = sorted(shares)[len(shares) // 2]
        print(f"{name:18} {sorted(totals)[len(totals) // 2]:6.2f} s a round, {100 * middle:.2f} % outside training")


if __name__ == "__main__":
    main()
