"""What does a tighter latency limit cost in accuracy on the quickstart? Plan, train with the plan, read both.

python examples/latency_against_accuracy.py [--seeds 3] [--limits 0.6,0.4,0.3,0.25]

For each limit: the keep rate of every device (the optimum of the bound), held-out accuracy of FedLoDrop trained at those
rates, and the seconds that its rounds would have taken on that network, computed from the bytes that really crossed.
"""

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import fedloom
from fedloom.errors import ConfigError
from fedloom.wireless import allocate, read_fleet

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limits", default="0.6,0.4,0.3,0.25")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    problem = read_fleet(HERE / "fleet.toml").problem()
    for limit in map(float, asked.limits.split(",")):
        try:
            plan = allocate(replace(problem, latency_limit_s=limit), solver="bnb")
        except ConfigError as error:
            print(f"{limit:5.2f} s: {error}")
            continue
        scores, simulated = [], []
        for seed in range(asked.seeds):
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
                        "train": {"rounds": asked.rounds, "lr": 6e-3, "evaluate_every": 0},
                    },
                    f"{folder}/run",
                )
            scores.append(result.eval["accuracy"])
            simulated += [r["network"]["seconds"] for r in result.rounds if "network" in r]
        keep = " ".join(f"{rate:.2f}" for rate in plan.keep.values())
        print(
            f"{limit:5.2f} s a round: keep {keep}, bound {plan.upper:.3f}, accuracy "
            f"{statistics.mean(scores):.3f} +- {statistics.stdev(scores) if len(scores) > 1 else 0:.3f}, "
            f"rounds took {max(simulated):.2f} s at most",
            flush=True,
        )


if __name__ == "__main__":
    main()
