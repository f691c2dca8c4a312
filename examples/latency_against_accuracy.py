"""What does a tighter latency limit cost in accuracy on the quickstart? Plan, train with the plan, read both.

python examples/latency_against_accuracy.py [--seeds 3] [--limits 0.6,0.4,0.3,0.25]

For each limit: the keep rate of every device (the optimum of the bound) and the one rate that all could keep instead, the
held-out accuracy of FedLoDrop trained at each, and the seconds that the planned rounds would have taken on that network,
computed from the bytes that really crossed.
"""

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import fedloom
from fedloom.errors import ConfigError
from fedloom.wireless import Allocation, allocate, read_fleet
from fedloom.wireless.allocate import describe
from fedloom.wireless.solvers.baselines import baseline

HERE = Path(__file__).parent


def train(plan: Allocation, seed: int, rounds: int) -> tuple[float, float]:
    """Held-out accuracy, and the longest round on the network of fleet.toml in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        plan.to_json(Path(folder) / "allocation.json")
        result = fedloom.run(
            {
                "seed": seed,
                "model": {"name": "minilm"},
                "task": {"data": "trec", "limit": 800, "eval_limit": 400, "holdout": 0.2},
                "lora": {"targets": ["query", "key", "value"]},
                "clients": {"count": 4, "keep": f"{folder}/allocation.json"},
                "method": {"name": "fedlodrop"},
                "network": {"fleet": str(HERE / "fleet.toml")},
                "train": {"rounds": rounds, "lr": 6e-3, "evaluate_every": 0},
            },
            f"{folder}/run",
        )
    return result.eval["accuracy"], max(r["network"]["seconds"] for r in result.rounds if "network" in r)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limits", default="0.6,0.4,0.3,0.25")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    fleet = read_fleet(HERE / "fleet.toml").problem()
    for limit in map(float, asked.limits.split(",")):
        problem = replace(fleet, latency_limit_s=limit)
        try:
            plan = allocate(problem)
        except ConfigError as error:
            print(f"{limit:5.2f} s: {error}")
            continue
        choices = {"planned": plan}
        same, rate = baseline(problem, "uniform")
        if rate is not None:
            choices["one rate"] = describe(problem, same, "uniform", rate)
        for name, choice in choices.items():
            scores, seconds = zip(*(train(choice, seed, asked.rounds) for seed in range(asked.seeds)), strict=True)
            spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
            print(
                f"{limit:5.2f} s a round, {name:8}: keep {' '.join(f'{x:.2f}' for x in choice.keep.values())}, "
                f"bound {choice.objective:.3f}, accuracy {statistics.mean(scores):.3f} +- {spread:.3f}, "
                f"rounds took {max(seconds):.2f} s at most",
                flush=True,
            )


if __name__ == "__main__":
    main()
