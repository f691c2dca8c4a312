"""What a GPU makes of many clients: together, one by one and the PEFT loop, on a decoder of true shape with random weights.

    python benchmarks/gpu.py                          # Llama-3.2-1B's shape; --shape qwen2.5-0.5b for the other
    python benchmarks/gpu.py --device cpu --tiny      # that it runs; its numbers say nothing

Rank 8 on q and v, bfloat16, AdamW, four rows of 64 to 192 tokens a step, the second half of each an answer. Every line trains
the same rows in the same batches. The share of the peak is the arithmetic of frozen products, vocabulary and attention, forward
and backward without gradients of weights, over the time, over what a product of two large matrices reaches here. Memory is the
most that was allocated beside the model.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from machine import describe
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from fedloom import lora
from fedloom.core import Client, Work
from fedloom.data.batches import Encoded, collate, schedule
from fedloom.rng import generator
from fedloom.train.lora_linear import find_layers, shape_of
from fedloom.train.optim import Settings
from fedloom.train.trainer import Trainer

RANK, ALPHA, LR = 8, 16.0, 1e-4


@dataclass(frozen=True)
class Size:
    """How much is trained: rows a step, steps of a client, shortest and longest row, side of the matrices of the peak."""

    clients: int
    batch: int
    steps: int
    shortest: int
    longest: int
    side: int
    turns: int


TRUE, TINY = Size(64, 4, 4, 64, 192, 8192, 3), Size(4, 2, 2, 4, 12, 64, 1)


def model_of(shape: str, tiny: bool) -> Any:
    """A decoder with random weights, in bfloat16."""
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    if shape == "llama-3.2-1b":
        large = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
        kind: Any = LlamaForCausalLM
        config: Any = LlamaConfig(
            **(small if tiny else large), num_key_value_heads=2 if tiny else 8, vocab_size=500 if tiny else 128_256,
            tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        )  # fmt: skip
    else:
        large = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
        kind = Qwen2ForCausalLM
        config = Qwen2Config(
            **(small if tiny else large), num_key_value_heads=2, vocab_size=500 if tiny else 151_936,
            tie_word_embeddings=True,
        )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return kind(config).eval()
    finally:
        torch.set_default_dtype(before)


def rows_of(size: Size, words: int, k: int) -> Encoded:
    """Random rows of client k."""
    rng = np.random.default_rng(k)
    lengths = rng.integers(size.shortest, size.longest + 1, size.batch * size.steps)
    return Encoded(
        tokens=rng.integers(3, words, int(lengths.sum())).astype(np.int32),
        offsets=np.concatenate([[0], lengths.cumsum()]),
        pad_id=0,
        kind="causal-lm",
        starts=lengths // 2,
    )


def arithmetic(model: Any, data: Sequence[Encoded]) -> float:
    """Floating-point operations of one pass over all rows: frozen products, vocabulary and attention, forward and backward."""
    config, head = model.config, model.get_output_embeddings()
    inner = sum(x.weight.numel() for x in model.modules() if isinstance(x, torch.nn.Linear) and x is not head)
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    lengths = np.concatenate([x.lengths for x in data]).astype(np.float64)
    answers = sum(float((x.lengths - np.maximum(x.starts, 1)).sum()) for x in data if x.starts is not None)
    # A product is 2 forward and 2 for the gradient of its input. Attention has two forward, five backward, half of them seen.
    attention = config.num_hidden_layers * 7.0 * width * float((lengths**2).sum())
    return 4.0 * inner * float(lengths.sum()) + 4.0 * head.weight.numel() * answers + attention


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak(device: torch.device, side: int) -> float:
    """Operations a second of a bfloat16 product of two square matrices, the best of ten."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(12):
        wait(device)
        start = time.perf_counter()
        torch.mm(a, b)
        wait(device)
        times.append(time.perf_counter() - start)
    return 2.0 * side**3 / min(times[2:])


@contextmanager
def ours(
    model: Any, data: Sequence[Encoded], size: Size, device: torch.device, together: int, kernels: Any
) -> Iterator[Callable[[], None]]:
    """Train all clients, `together` at once."""
    sites = [n for n, x in model.named_modules() if n.endswith(("q_proj", "v_proj")) and isinstance(x, torch.nn.Linear)]
    shapes = {site: shape_of(x) for site, x in find_layers(model, sites).items()}
    works = [
        (
            Client(f"{k}", len(x), RANK),
            Work(train=lora.init(shapes, RANK, generator(0, k, "start")), scale=ALPHA / RANK),
        )
        for k, x in enumerate(data)
    ]

    settings = Settings(lr=LR, batch_size=size.batch, local_steps=size.steps)
    with Trainer(model, sites, settings=settings, device=device, dtype=torch.bfloat16, kernels=kernels) as trainer:

        def train() -> None:
            for first in range(0, len(works), together):
                trainer.fit(works[first : first + together], data[first : first + together], 1)

        yield train


@contextmanager
def peft_loop(model: Any, data: Sequence[Encoded], size: Size, device: torch.device) -> Iterator[Callable[[], None]]:
    """Train one client after the other as PEFT's users do: padded batches, autograd, torch's AdamW."""

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    wrapped: Any = get_peft_model(model, config)
    wrapped.train()
    own = {name: x for name, x in wrapped.named_parameters() if x.requires_grad}
    start = {name: x.detach().clone() for name, x in own.items()}

    def step(x: Encoded, rows: NDArray[np.int64]) -> None:
        batch = collate([(x, rows)])
        assert x.starts is not None
        answer = torch.arange(batch.input_ids.shape[1]) >= torch.from_numpy(x.starts[rows]).unsqueeze(1)
        labels = batch.input_ids.masked_fill(~(answer & batch.attention_mask.bool()), -100)
        ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
        wrapped(input_ids=ids, attention_mask=mask, labels=labels.to(device), use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(own.values(), 1.0)

    def train() -> None:
        for k, x in enumerate(data):
            for name, parameter in own.items():
                parameter.data.copy_(start[name])
            optimiser = torch.optim.AdamW(own.values(), LR, weight_decay=0.0)
            for rows in schedule(x.lengths, size.batch, (0, 1, f"{k}"), steps=size.steps):
                step(x, rows)
                optimiser.step()
                optimiser.zero_grad()

    try:
        yield train
    finally:
        wrapped.unload()
        model.eval().requires_grad_(False)


def measured(run: Callable[[], None], device: torch.device, turns: int) -> tuple[float, float]:
    """Seconds of the fastest turn after one more, and the GiB allocated beside what was there (0 without a GPU)."""
    run()
    wait(device)
    before = 0
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    times = []
    for _ in range(turns):
        start = time.perf_counter()
        run()
        wait(device)
        times.append(time.perf_counter() - start)
    most = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else 0
    return min(times), most / 2**30


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=["llama-3.2-1b", "qwen2.5-0.5b"], default="llama-3.2-1b")
    parser.add_argument("--tiny", action="store_true", help="a few numbers, to see that it runs")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("There is no CUDA device on this machine, and so no number of one: see --device cpu --tiny.")
    device, size = torch.device(options.device), TINY if options.tiny else TRUE
    model = model_of(options.shape, options.tiny).to(device).requires_grad_(False)
    data = [rows_of(size, model.config.vocab_size, k) for k in range(size.clients)]
    tokens, work, best = sum(len(x.tokens) for x in data), arithmetic(model, data), peak(device, size.side)
    print(
        f"{describe()}\n{options.shape}{', tiny' * options.tiny}: {size.clients} clients, "
        f"{size.steps} steps of {size.batch} rows"
    )
    print(f"measured peak in bfloat16: {best / 1e12:.2f} TFLOP/s\n")
    lines: list[tuple[str, AbstractContextManager[Callable[[], None]]]] = [
        ("PEFT loop", peft_loop(model, data, size, device))
    ]
    for together in (1, max(2, size.clients // 4), size.clients):
        name = "one by one" if together == 1 else f"{together} together"
        lines.append((f"fedloom, {name}", ours(model, data, size, device, together, "auto")))
    lines.append(("fedloom, one by one, plain path", ours(model, data, size, device, 1, "off")))
    print("| | ms a client's step | tokens a second | share of peak | PEFT loop / this | GiB beside the model |")
    print("|---|---:|---:|---:|---:|---:|")
    first = None
    for name, line in lines:
        try:
            with line as run:
                seconds, memory = measured(run, device, size.turns)
        except torch.OutOfMemoryError:
            print(f"| {name} | out of memory | | | | |", flush=True)
            continue
        first = seconds if first is None else first
        step = 1000 * seconds / (size.clients * size.steps)
        print(
            f"| {name} | {step:.2f} | {tokens / seconds:,.0f} | {work / seconds / best:.1%} | {first / seconds:.2f} "
            f"| {memory:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
