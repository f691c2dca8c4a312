"""How long a client's local step takes, against the loop a person writes with PEFT. One command:

    python benchmarks/training.py [--quick] [--threads 2] [--cpu-time]

All-MiniLM-L6-v2 on TREC questions, LoRA of rank 8 on query and value plus the classification head, AdamW. Every line does the
same batches, which every turn shuffles anew, as every round of a run does. "Readable" is kernels = "off". The lines take turns
within one process, client by client, so that a busy spell meets all of them; a ratio is the median of the ratios within one
such turn.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

# oneDNN keeps the last 1,024 kernels that it compiled. One client's line makes 447, all lines together more than 1,300: with
# the default they would compile again what others pushed out, which no run does.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")

import numpy as np
import torch
from datasets import Dataset
from machine import describe
from peft import LoraConfig, TaskType, get_peft_model
from torch.nn import functional as F

from fedloom import lora
from fedloom.core import Client, State, Work
from fedloom.data import packaged
from fedloom.data.batches import Encoded, collate, schedule, targets
from fedloom.data.tokenize import encode_labelled
from fedloom.models.huggingface import default_targets, find_sites, load_base
from fedloom.rng import generator
from fedloom.train.adapted_model import KernelChoice
from fedloom.train.optim import Settings
from fedloom.train.trainer import Trainer

RANK, LR = 8, 1e-3
Plan = list[np.ndarray]


def plan_of(data: Encoded, batch_size: int, client: int, t: int) -> Plan:
    """The batches of a client in turn t, those that fedloom's trainer makes in round t."""
    return schedule(data.lengths, batch_size, (0, t, f"client-{client}"), epochs=1)


Train = Callable[[range, int], None]
"""Train some of the clients on their batches of turn t."""


@dataclass(frozen=True)
class Line:
    """One way of doing the same training."""

    name: str
    batch_size: int
    clients: int
    """How many clients a turn trains: turns go through all of them. Times are per client step."""
    train: Train
    shapes: bool = True
    """Whether its batches differ in shape."""


def peft_line(
    name: str,
    model: torch.nn.Module,
    data: Sequence[Encoded],
    batch_size: int,
    *,
    evaluating: bool,
    fixed: int = 0,
) -> Train:
    """The usual loop: get_peft_model, train(), AdamW, one client after another."""
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=RANK, lora_alpha=2 * RANK, target_modules=["query", "value"])
    peft = get_peft_model(copy.deepcopy(model), config)
    start = {n: p.detach().clone() for n, p in peft.named_parameters() if p.requires_grad}

    def train(clients: range, t: int) -> None:
        for client in clients:
            encoded = data[client]
            with torch.no_grad():
                for key, p in peft.named_parameters():
                    if p.requires_grad:
                        p.copy_(start[key])
            optimizer = torch.optim.AdamW((p for p in peft.parameters() if p.requires_grad), lr=LR, weight_decay=0.0)
            peft.train(not evaluating)
            for rows in plan_of(encoded, batch_size, client, t):
                batch, labels = collate([(encoded, rows)]), targets([(encoded, rows)]).labels
                gap = (0, max(0, fixed - batch.input_ids.shape[1]))
                ids, mask = F.pad(batch.input_ids, gap, value=encoded.pad_id), F.pad(batch.attention_mask, gap)
                loss = peft(input_ids=ids, attention_mask=mask, labels=labels).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

    return train


def our_line(
    model: torch.nn.Module,
    sites: dict[str, tuple[int, int]],
    head: Sequence[str],
    data: Sequence[Encoded],
    batch_size: int,
    dtype: torch.dtype,
    kernels: KernelChoice,
) -> Train:
    """Trainer.fit on the clients of a call, in one cohort."""
    settings = Settings(lr=LR, batch_size=batch_size, clip=None)
    model = copy.deepcopy(model)
    state: State = lora.init(sites, RANK, generator(0, "benchmark"))
    state["head"] = {n: p.detach().clone() for n, p in model.named_parameters() if n.rpartition(".")[0] in head}
    trainer = Trainer(model, sites, head, settings=settings, dtype=dtype, kernels=kernels)
    works = [(Client(f"client-{k}", len(d), RANK), Work(train=state, scale=2.0)) for k, d in enumerate(data)]

    def train(clients: range, t: int) -> None:
        trainer.fit([works[k] for k in clients], [data[k] for k in clients], t)

    return train


def trec(tokenizer: Any, clients: int, rows: int) -> list[Encoded]:
    """Questions of each client."""
    columns = packaged.read("trec")
    if columns is None:
        raise SystemExit(packaged.absent("trec"))
    chosen = torch.randperm(len(columns["text"]), generator=generator(0, "questions"))[: clients * rows].tolist()
    ds = Dataset.from_dict({name: [column[i] for i in chosen] for name, column in columns.items()})
    encoded = encode_labelled(ds, tokenizer, ["text"], "label", None, 128)
    return [encoded.select(range(k * rows, (k + 1) * rows)) for k in range(clients)]


def lines(clients: int, rows: int) -> list[Line]:
    """Everything that is compared, the PEFT loop first."""
    base = load_base("minilm", kind="classification", num_labels=6)
    sites = find_sites(base.model, default_targets(base.model))
    data = trec(base.tokenizer, clients, rows)
    model, head = base.model, base.head
    found = [
        Line("PEFT loop, as usually written", 8, 1, peft_line("", model, data, 8, evaluating=False)),
        Line("PEFT loop, base in eval mode", 8, 1, peft_line("", model, data, 8, evaluating=True)),
        Line("PEFT loop, padded to 128", 8, 1, peft_line("", model, data, 8, evaluating=False, fixed=128), False),
        Line("PEFT loop, as usually written", 4, 1, peft_line("", model, data, 4, evaluating=False)),
    ]
    kinds: list[tuple[int, KernelChoice]] = [(8, "auto"), (4, "auto"), (8, "off")]
    for b, kernels in kinds:
        for dtype in (torch.float32, torch.bfloat16):
            for together in (1, clients):
                how = "one by one" if together == 1 else f"{together} together"
                name = f"fedloom{', readable' * (kernels == 'off')}, {str(dtype).removeprefix('torch.')}, {how}"
                found.append(Line(name, b, together, our_line(model, sites, head, data, b, dtype, kernels)))
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rows and turns: some minutes")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (default: torch's own choice)")
    parser.add_argument("--only", default="", help="only the lines that contain one of these texts, parted by |")
    parser.add_argument("--cpu-time", action="store_true", help="processor time of one thread: for a busy machine")
    options = parser.parse_args()
    if options.cpu_time:
        options.threads = 1
    clock = time.process_time if options.cpu_time else time.perf_counter
    if options.threads:
        torch.set_num_threads(options.threads)
    clients, rows, turns = (16, 32, 6) if options.quick else (16, 64, 32)
    chosen = lines(clients, rows)
    chosen = [x for x in chosen if any(text in f"{x.name}, batch {x.batch_size}" for text in options.only.split("|"))]
    times: list[list[float]] = [[] for _ in chosen]
    # Warm up: a run meets every client again and again, so what is made once for a shape is made here.
    for line in chosen:
        for first in range(0, clients if line.shapes else 1, line.clients):
            line.train(range(first, first + line.clients), turns)
    for turn in range(turns):
        # In an order of its own: what a line leaves behind in caches and clock rates meets another one every time.
        for i in random.Random(turn).sample(range(len(chosen)), len(chosen)):
            line, found = chosen[i], times[i]
            first = turn * line.clients % clients
            start = clock()
            line.train(range(first, first + line.clients), turn)
            seconds = clock() - start
            found.append(1000 * seconds / (line.clients * -(-rows // line.batch_size)))
    print(describe())
    print(
        f"{clients} clients of {rows} questions, {turns} turns; ms per client step{' (processor time)' * options.cpu_time}\n"
    )
    print(f"{'':40}{'batch':>6}{'best':>9}{'median':>9}{'x PEFT':>9}{'x one by one':>14}")
    for line, found in zip(chosen, times, strict=True):

        def ratio(to: str, line: Line = line, found: list[float] = found) -> str:
            for other, theirs in zip(chosen, times, strict=True):
                if other.name == to and other.batch_size == line.batch_size:
                    return f"{statistics.median(a / b for a, b in zip(theirs, found, strict=True)):.2f}"
            return ""

        single = ratio(line.name.rpartition(",")[0] + ", one by one") if "together" in line.name else ""
        print(
            f"{line.name:40}{line.batch_size:>6}{min(found):>9.1f}{statistics.median(found):>9.1f}"
            f"{ratio('PEFT loop, as usually written'):>9}{single:>14}"
        )


if __name__ == "__main__":
    main()
