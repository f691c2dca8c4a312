"""What adapters in the upper half of the blocks save, and what keeping the states of the blocks below saves. One command:

    python benchmarks/blocks.py [--turns 8] [--rows 32]

All-MiniLM-L6-v2 (six blocks) on TREC questions, LoRA of rank 8 on query and value plus the head, AdamW, batch 8, bfloat16, 16
clients; processor time of one thread, as the machine is shared. The lines take turns within one process; a ratio is the median
of the ratios within a turn. "Whole model" is the fast path without a prefix. Evaluation is of 512 questions, once seen.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from machine import describe
from training import trec

from fedloom import lora
from fedloom.core import Client, State, Work
from fedloom.data.batches import Encoded
from fedloom.models.blocks import Blocks, sites_in
from fedloom.models.huggingface import Base, default_targets, find_sites, load_base
from fedloom.rng import generator
from fedloom.train.optim import Settings
from fedloom.train.trainer import Trainer

LINES: dict[str, tuple[Blocks, int | None]] = {
    "all blocks": ("all", None),
    "upper half, whole model": ("upper half", None),
    "upper half, states made anew": ("upper half", 0),
    "upper half, states kept": ("upper half", 1 << 30),
}
"""Name -> adapted blocks, and the room of a prefix; None for none."""


class Line:
    """One way of training and scoring the same clients."""

    def __init__(self, base: Base, data: Sequence[Encoded], blocks: Blocks, room: int | None) -> None:
        model = copy.deepcopy(base.model)
        sites = sites_in(model, find_sites(model, default_targets(model)), blocks)
        state: State = lora.init(sites, 8, generator(0, "benchmark"))
        state["head"] = {
            n: p.detach().clone() for n, p in model.named_parameters() if n.rpartition(".")[0] in base.head
        }
        settings = Settings(lr=1e-3, batch_size=8)
        self.trainer = Trainer(model, sites, base.head, settings=settings, dtype=torch.bfloat16, prefix_bytes=room or 0)
        if room is None:
            self.trainer._model._prefix = None
        self.work = Work(train=state, scale=2.0)
        self.works = [(Client(f"client-{k}", len(d), 8), self.work) for k, d in enumerate(data)]
        self.data = data

    def train(self, clients: Sequence[int], t: int) -> None:
        """One epoch of these clients, together."""
        self.trainer.fit([self.works[k] for k in clients], [self.data[k] for k in clients], t)


def measured(tasks: dict[str, Callable[[int], None]], turns: int) -> dict[str, list[float]]:
    """Processor seconds of each task in every turn; all have run twice before."""
    found: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(-2, turns):
        for name in random.Random(turn).sample(sorted(tasks), len(tasks)):
            start = time.process_time()
            tasks[name](turn)
            if turn >= 0:
                found[name].append(time.process_time() - start)
    return found


def show(title: str, found: dict[str, list[float]], per: int) -> None:
    """A table in milliseconds."""
    first = next(iter(LINES))
    print(f"\n{title:34}{'median':>9}{'least':>9}{'all / this':>12}")
    for name in LINES:
        ratio = statistics.median(a / b for a, b in zip(found[first], found[name], strict=True))
        times = [1000 * x / per for x in found[name]]
        print(f"{name:34}{statistics.median(times):>9.2f}{min(times):>9.2f}{ratio:>12.2f}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--rows", type=int, default=32, help="of each client")
    options = parser.parse_args()
    torch.set_num_threads(1)
    base = load_base("minilm", kind="classification", num_labels=6)
    data = trec(base.tokenizer, 16, options.rows)
    (held_out,) = trec(base.tokenizer, 1, 512)
    lines = {name: Line(base, data, *how) for name, how in LINES.items()}
    steps = -(-options.rows // 8)
    print(describe())
    together = measured({n: lambda t, x=x: x.train(range(16), t) for n, x in lines.items()}, options.turns)
    show("ms a client step, 16 together", together, 16 * steps)
    alone = measured({n: lambda t, x=x: x.train([t % 16], t) for n, x in lines.items()}, 4 * options.turns)
    show("ms a client step, one by one", alone, steps)
    scored = measured({n: lambda t, x=x: x.trainer.evaluate(x.work, held_out) for n, x in lines.items()}, options.turns)
    show("ms an evaluation", scored, 1)
    told = lines["upper half, states kept"].trainer.prefix
    assert told is not None
    print(
        f"\nkept: {told.kept_rows} rows in {told.kept_bytes / 2**20:.1f} MiB, {told.kept_bytes / told.kept_rows:.0f} B a row"
    )


if __name__ == "__main__":
    main()
