"""A run in one process and the same over two Ray workers: the same bytes, and milliseconds a round outside training.

python benchmarks/ray_rounds.py [--clients 8 --rounds 4]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import fedloom
from fedloom.runs.run import Observer


class Starts(Observer):
    """When the first round began."""

    at = 0.0

    def round(self, record: dict[str, Any]) -> None:
        self.at = self.at or time.perf_counter() - record["seconds"]["total"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    weights = []
    print("| engine | start | a round | of it training | outside training and evaluation |\n|---|---|---|---|---|")
    for name in ("inprocess", "ray"):
        config = {
            "model": {"name": "minilm"},
            "task": {"data": "trec", "limit": 400, "eval_limit": 100},
            "clients": {"count": args.clients},
            "method": {"name": "fedit"},
            "train": {"rounds": args.rounds, "lr": 6e-3, "evaluate_every": 0},
            "engine": {"name": name, "cohort": 1, "threads": 1},
        }
        with tempfile.TemporaryDirectory() as folder:
            observer, start = Starts(), time.perf_counter()
            result = fedloom.run(config, Path(folder) / "run", observer)
            weights.append((result.adapter_dir / "adapter_model.safetensors").read_bytes())
        seconds = [record["seconds"] for record in result.rounds if record["round"] > 0]
        total, train = (statistics.median(x[key] for x in seconds) for key in ("total", "train"))
        outside = statistics.median(x["total"] - x["train"] - x["evaluate"] for x in seconds)
        began = observer.at - start
        print(f"| {name} | {began:.1f} s | {total:.2f} s | {train:.2f} s | {1000 * outside:.0f} ms |", flush=True)
    print("the same adapter, byte for byte" if weights[0] == weights[1] else "ADAPTERS DIFFER")


if __name__ == "__main__":
    main()
