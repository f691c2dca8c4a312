"""Which method does best on my data, at the same budget and with seeds that vary? A table with mean and spread.

python examples/compare_methods.py [--rounds 3] [--seeds 3] [--methods fedit,fslora,fedex_lora]
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import fedloom


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", default="fedit,fslora,fedex_lora")
    asked = parser.parse_args()
    for name in asked.methods.split(","):
        scores, sent = [], 0
        for seed in range(asked.seeds):
            config = {
                "seed": seed,
                "model": {"name": "minilm"},
                "task": {"data": "trec", "limit": 800, "eval_limit": 400},
                "lora": {"targets": ["query", "key", "value"]},
                "method": {"name": name},
                "train": {"rounds": asked.rounds, "lr": 6e-3},
            }
            with tempfile.TemporaryDirectory() as folder:
                result = fedloom.run(config, Path(folder) / "run")
            scores.append(result.eval["accuracy"])
            sent = sum(sum(record["bytes_up"].values()) for record in result.rounds)
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        print(f"{name:18} accuracy {statistics.mean(scores):.3f} +- {spread:.3f}, {sent / 1e6:.2f} MB up")


if __name__ == "__main__":
    main()
