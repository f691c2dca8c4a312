"""10, 1,000 and 100,000 clients, ten of them in a round: what grows with all clients, and what with those of a round.

    OMP_NUM_THREADS=1 python benchmarks/clients.py [--rows 1000000] [--counts 10,1000,100000] [--methods fedit] [--rounds 20]
    OMP_NUM_THREADS=1 python benchmarks/clients.py --partitions
    OMP_NUM_THREADS=1 python benchmarks/clients.py --scored [tiny,minilm]

A random BERT of two layers of 16 numbers, so that training costs little: ten rows a client, or `--rows` altogether; one step of
four rows. Each run is a process of its own. `--partitions` deals 10^6 rows to 10^5 clients; `--scored` scores and writes the
clients of a personal method: 1,000 of the random BERT, 100 of All-MiniLM-L6-v2 on TREC in bfloat16.
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


def train(method: str, clients: int, total: int, rounds: int) -> None:
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
            "clients": {"count": clients, "fraction": min(1.0, SAMPLED / clients)},
            "lora": {"rank": 4},
            "method": {"name": method},
            "train": {"rounds": rounds, "local_steps": 1, "batch_size": 4, "evaluate_every": 0},
        }
        result = fedloom.run(config, Path(folder) / "run", Seen(), data=table)
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
                    "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                }
            )
        )


def child(*arguments: str) -> dict[str, Any]:
    """What a process of its own prints."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def counts(asked: argparse.Namespace) -> None:
    print("| method | clients | start | of it partition | round 1 | a round outside training | checkpoint | a line | "
          "manifest, partition | peak |")  # fmt: skip
    print("|---|" + "---|" * 9)
    for method in asked.methods.split(","):
        for clients in map(int, asked.counts.split(",")):
            x = child("--child", method, str(clients), str(asked.rows or clients * ROWS), str(asked.rounds))
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


def score(base: str, more: dict[str, Any], engine: dict[str, Any]) -> None:
    """One round of fedsa_lora in this process; (processor, wall) seconds of its last evaluation and its adapters, as JSON."""
    import fedloom
    from fedloom.simulation import Simulation

    spent: dict[str, tuple[float, float]] = {}

    def timed(name: str, function: Any) -> None:
        def call(*args: Any, **kwargs: Any) -> Any:
            start, wall = time.process_time(), time.perf_counter()
            result = function(*args, **kwargs)
            spent[name] = time.process_time() - start, time.perf_counter() - wall
            return result

        setattr(Simulation, name, call)

    timed("scores", Simulation.scores)
    timed("export", Simulation.export)
    with tempfile.TemporaryDirectory() as folder:
        config: dict[str, Any] = {
            "clients": {"count": 1000, **more},
            "method": {"name": "fedsa_lora"},
            "train": {"rounds": 1, "local_steps": 1, "batch_size": 4, "evaluate_every": 0},
            "engine": engine,
        }
        if base == "minilm":
            config["model"] = {"name": "minilm", "dtype": "bfloat16"}
            config["task"] = {"data": "trec", "limit": 2500, "holdout": 0.2, "eval_limit": 400}
            config["clients"]["count"], config["train"]["batch_size"] = 100, 8
            fedloom.run(config, Path(folder) / "run")
        else:
            model(Path(folder) / "model")
            config["model"] = {"name": str(Path(folder) / "model"), "dtype": "float32"}
            config |= {"task": {"eval_limit": 50}, "lora": {"rank": 4}}
            fedloom.run(config, Path(folder) / "run", data=rows(1000 * ROWS))
    print(json.dumps(spent))


def scored(bases: str) -> None:
    alone = {"cohort": 1}
    lines: dict[str, list[tuple[str, dict[str, Any], dict[str, Any]]]] = {
        "tiny": [
            ("1,000 on the same 50 rows", {"scored": 1000}, {}),
            ("100 of them, the default", {}, {}),
            ("1,000, each on 2 rows of its own", {"scored": 1000, "holdout": 0.2}, {}),
            ("the same one by one", {"scored": 1000, "holdout": 0.2}, alone),
        ],
        "minilm": [
            ("100 on the same 400 rows", {}, {}),
            ("20 of them", {"scored": 20}, {}),
            ("100, each on 4 or 5 rows of its own", {"holdout": 0.2}, {}),
            ("the same one by one", {"holdout": 0.2}, alone),
        ],
    }
    for base in bases.split(","):
        for name, more, engine in lines[base]:
            x = child("--score", base, json.dumps(more), json.dumps(engine))
            told = [f"{x[what][0]:.2f} s, {x[what][1]:.2f} s" for what in ("scores", "export")]
            print(f"| {base} | {name} | {told[0]} | {told[1]} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", default="10,1000,100000")
    parser.add_argument("--methods", default="fedit,fedsa_lora")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--partitions", action="store_true")
    parser.add_argument("--scored", nargs="?", const="tiny,minilm")
    parser.add_argument("--score", nargs=3, metavar=("BASE", "CLIENTS", "ENGINE"))
    parser.add_argument("--child", nargs=4, metavar=("METHOD", "CLIENTS", "ROWS", "ROUNDS"))
    asked = parser.parse_args()
    if asked.child:
        method, *numbers = asked.child
        train(method, *map(int, numbers))
        return
    if asked.score:
        base, more, engine = asked.score
        score(base, json.loads(more), json.loads(engine))
        return
    print(describe())
    if asked.partitions:
        partitions()
    elif asked.scored:
        scored(asked.scored)
    else:
        counts(asked)


if __name__ == "__main__":
    main()
