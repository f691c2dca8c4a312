"""10, 1,000 and 100,000 clients, ten of them in a round: what grows with all clients, and what with those of a round.

    OMP_NUM_THREADS=1 python benchmarks/clients.py [--rows 1000000] [--counts 10,1000,100000] [--methods fedit] [--rounds 20]
    OMP_NUM_THREADS=1 python benchmarks/clients.py --partitions
    OMP_NUM_THREADS=1 python benchmarks/clients.py --scored

A random BERT of two layers of 16 numbers, so that training costs little: ten rows a client, or `--rows` altogether; one step of
four rows. Each run is a process of its own. `--partitions` deals 10^6 rows to 10^5 clients; `--scored` scores the clients of a
personal method.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe

WORDS = [f"w{i}" for i in range(200)]
SAMPLED = 10
ROWS = 10


def model(path: Path) -> None:
    """A random BERT with a tokenizer of whole words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special.values(), *WORDS])}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    BertModel(BertConfig(vocab_size=len(WORDS) + 4, max_position_embeddings=64, **sizes)).save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(path)


def rows(count: int) -> Any:
    """A table of short texts with one of three labels and a field of which each value has ten rows."""
    from datasets import Dataset

    rng = np.random.default_rng(0)
    words = np.asarray(WORDS)[rng.integers(0, len(WORDS), (count, 6))]
    texts = [" ".join(x) for x in words]
    fields = [f"site-{i // ROWS:06d}" for i in range(count)]
    return Dataset.from_dict({"text": texts, "label": [f"c{i % 3}" for i in range(count)], "site": fields})


def train(method: str, clients: int, total: int, rounds: int, more: dict[str, Any]) -> None:
    """One run in this process; what it took, as JSON."""
    import fedloom
    from fedloom import checkpoint
    from fedloom.data import partition
    from fedloom.runs.run import Observer

    spent: dict[str, list[float]] = {}

    def timed(module: Any, name: str, function: Any) -> None:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            result = function(*args, **kwargs)
            spent.setdefault(name, []).append(time.process_time() - start)
            return result

        setattr(module, name, call)

    timed(checkpoint, "save", checkpoint.save)
    timed(partition, "partition", partition.partition)
    with tempfile.TemporaryDirectory() as folder:
        model(Path(folder) / "model")
        table = rows(total)
        began: list[float] = []

        class Seen(Observer):
            def assembled(self, experiment: Any) -> None:
                began.append(time.process_time())

        start = time.process_time()
        config = {
            "model": {"name": str(Path(folder) / "model"), "dtype": "float32"},
            "task": {"eval_limit": 50},
            "clients": {"count": clients, "fraction": min(1.0, SAMPLED / clients), **more},
            "lora": {"rank": 4},
            "method": {"name": method},
            "train": {"rounds": rounds, "local_steps": 1, "batch_size": 4, "evaluate_every": 0},
        }
        result = fedloom.run(config, Path(folder) / "run", Seen(), data=table)
        ended = time.process_time()
        trained = [r for r in result.rounds if r["stage"] == "clients"]
        lines = (result.path / "rounds.jsonl").read_bytes().splitlines()
        sizes = {name: (result.path / name).stat().st_size for name in ("manifest.json", "partition.json")}
        outside = [1e3 * (r["seconds"]["total"] - r["seconds"]["train"] - r["seconds"]["evaluate"]) for r in trained]
        print(
            json.dumps(
                {
                    "start_s": began[0] - start,
                    "partition_s": spent["partition"][0],
                    "first_round_ms": 1e3 * trained[0]["seconds"]["total"],
                    "outside_ms": float(np.median(outside[1:])),
                    "checkpoint_ms": 1e3 * float(np.median(spent["save"][2:-1])),
                    "line_bytes": float(np.median([len(x) for x in lines[2:-1]])),
                    "start_bytes": sum(sizes.values()),
                    "evaluate_s": result.rounds[-1]["seconds"]["evaluate"],
                    "total_s": ended - start,
                    "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                }
            )
        )


def child(*arguments: str) -> dict[str, float]:
    """What a process of its own prints."""
    done = subprocess.run([sys.executable, __file__, "--child", *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def counts(asked: argparse.Namespace) -> None:
    print("| method | clients | start | of it partition | round 1 | a round outside training | checkpoint | a line | "
          "manifest, partition | peak |")  # fmt: skip
    print("|---|" + "---|" * 9)
    for method in asked.methods.split(","):
        for clients in map(int, asked.counts.split(",")):
            x = child(method, str(clients), str(asked.rows or clients * ROWS), str(asked.rounds), "{}")
            print(
                f"| `{method}` | {clients:,} | {x['start_s']:.1f} s | {x['partition_s']:.2f} s | {x['first_round_ms']:.0f} ms "
                f"| {x['outside_ms']:.1f} ms | {x['checkpoint_ms']:.1f} ms | {x['line_bytes'] / 1e3:.1f} kB "
                f"| {x['start_bytes'] / 1e6:.3f} MB | {x['peak_mib']:.0f} MiB |",
                flush=True,
            )


def partitions() -> None:
    from fedloom.data.partition import partition

    table = rows(10**6)
    schemes: dict[str, dict[str, Any]] = {
        "iid": {},
        "by-length": {"text": "text"},
        "by-field": {"field": "site"},
        "dirichlet": {"label": "label", "alpha": 100.0, "min_rows": 0},
        "pathological": {"label": "label"},
    }
    for scheme, more in schemes.items():
        start = time.process_time()
        count = len(partition(table, 10**5, scheme, seed=0, **more))
        print(f"| {scheme} | {count:,} | {time.process_time() - start:.2f} s |", flush=True)


def scored() -> None:
    for name, more in (
        ("all, on the same 50 rows", {"scored": 1000}),
        ("100 of them, on the same 50 rows", {}),
        ("all, each on 2 rows of its own", {"scored": 1000, "holdout": 0.2}),
    ):
        x = child("fedsa_lora", "1000", "10000", "3", json.dumps({**more, "fraction": 1.0}))
        print(f"| {name} | {x['evaluate_s']:.2f} s |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", default="10,1000,100000")
    parser.add_argument("--methods", default="fedit,fedsa_lora")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--partitions", action="store_true")
    parser.add_argument("--scored", action="store_true")
    parser.add_argument("--child", nargs=5, metavar=("METHOD", "CLIENTS", "ROWS", "ROUNDS", "MORE"))
    asked = parser.parse_args()
    if asked.child:
        method, *numbers, more = asked.child
        train(method, *map(int, numbers), json.loads(more))
        return
    print(describe())
    if asked.partitions:
        partitions()
    elif asked.scored:
        scored()
    else:
        counts(asked)


if __name__ == "__main__":
    main()
