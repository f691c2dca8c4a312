"""The quickstart with every method: the same data, rounds and seeds, three of them; accuracy with its spread, bytes, seconds.

    python benchmarks/methods.py [--seeds 3] [--methods fedit,fslora,...] [--set train.rounds=6]

Rank budgets 2, 4, 8, 8 where a method follows them, keep budgets 0.5, 0.75, 1, 1 for FedLoDrop, rank 8 for the others. Two
lines need no federation: the commonest class, and tf-idf with logistic regression on all training rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from machine import describe

import fedloom
from fedloom import methods
from fedloom.runs.tables import tables

QUICKSTART = Path(fedloom.__file__).parent / "quickstart.toml"


def without_federation(seed: int, overrides: list[str]) -> tuple[float, float]:
    """Held-out accuracy of the commonest class, and of tf-idf + logistic regression."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    rows = tables(fedloom.load_config(QUICKSTART, [f"seed={seed}", *overrides]))
    text, label = rows.text[0], "label"
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10, max_iter=1000)
    )
    model.fit(rows.train[text], rows.train[label])
    common = statistics.mode(rows.train[label])
    return (
        statistics.mean(float(y == common) for y in rows.eval[label]),
        float(model.score(rows.eval[text], rows.eval[label])),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", default=",".join(methods.names()))
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--json", type=Path, help="also write every score to this file")
    asked = parser.parse_args()
    print(describe(), flush=True)
    plain = [without_federation(seed, asked.set) for seed in range(asked.seeds)]
    for name, scores in zip(("commonest class", "tf-idf + logistic regression"), zip(*plain, strict=True), strict=True):
        print(f"{name:28} accuracy {statistics.mean(scores):.3f} +- {spread(scores):.3f}", flush=True)
    every = {}
    for name in asked.methods.split(","):
        budgets = methods.get(name).budgets
        ranks = "[2, 4, 8, 8]" if "rank" in budgets and "keep" not in budgets else "8"
        keep = "[0.5, 0.75, 1.0, 1.0]" if "keep" in budgets else "1.0"
        scores, untuned, seconds, up, down = [], [], [], 0, 0
        for seed in range(asked.seeds):
            chosen = [f"seed={seed}", f"method.name={name}", f"clients.ranks={ranks}", f"clients.keep={keep}"]
            config = fedloom.load_config(QUICKSTART, [*chosen, "train.evaluate_every=0", *asked.set])
            with tempfile.TemporaryDirectory() as folder:
                result = fedloom.run(config, Path(folder) / "run")
            rounds = [r for r in result.rounds if r["stage"] != "personal"]
            untuned.append(rounds[0]["eval"]["accuracy"])
            scores.append(result.eval["accuracy"])
            seconds.append(sum(r["seconds"]["train"] for r in result.rounds))
            up, down = (sum(sum(r[key].values()) for r in rounds) for key in ("bytes_up", "bytes_down"))
        every[name] = scores
        print(
            f"{name:28} accuracy {statistics.mean(scores):.3f} +- {spread(scores):.3f} "
            f"({', '.join(f'{x:.3f}' for x in scores)}), untuned {statistics.mean(untuned):.3f}, "
            f"up {up / 1e6:.2f} MB, down {down / 1e6:.2f} MB, training {statistics.median(seconds):.0f} s",
            flush=True,
        )
    if asked.json:
        asked.json.write_text(json.dumps(every, indent=1))


def spread(scores: list[float] | tuple[float, ...]) -> float:
    """Sample standard deviation; 0 for one score."""
    return statistics.stdev(scores) if len(scores) > 1 else 0.0


if __name__ == "__main__":
    main()
