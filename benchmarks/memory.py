"""(d) Peak memory with 10 and with 1,000 clients on the same rows.

    python benchmarks/memory.py [--methods fedit,fslora,fedsa_lora]

Each run is a process of its own (peak resident set, as the kernel counts it): MiniLM on TREC, one step of 4 rows a client and
round, two rounds, every client in every round. Clients that keep something keep it on disk.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import describe


def train(method: str, clients: int) -> None:
    """One run in this process."""
    import fedloom

    with tempfile.TemporaryDirectory() as folder:
        fedloom.run(
            {
                "model": {"name": "minilm"},
                "task": {"data": "trec", "limit": 4000, "eval_limit": 10},
                "clients": {"count": clients},
                "method": {"name": method},
                "train": {"rounds": 2, "local_steps": 1, "batch_size": 4, "evaluate_every": 0},
                "engine": {"cohort": 10},
            },
            Path(folder) / "run",
        )
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--methods", default="fedit,fslora,fedsa_lora")
    parser.add_argument("--child", nargs=2, metavar=("METHOD", "CLIENTS"))
    asked = parser.parse_args()
    if asked.child:
        train(asked.child[0], int(asked.child[1]))
        return
    print(describe())
    for method in asked.methods.split(","):
        peak = {}
        for clients in (10, 1000):
            command = [sys.executable, __file__, "--child", method, str(clients)]
            shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            peak[clients] = int(shown.split()[-1]) / 1024
        print(
            f"{method:12} peak {peak[10]:.0f} MiB with 10 clients, {peak[1000]:.0f} MiB with 1,000: "
            f"{peak[1000] / peak[10]:.2f} times"
        )


if __name__ == "__main__":
    main()
