"""Adapters of clients with unlike numbers of tokens: padded to the largest against grouped products, forward and backward.

    python benchmarks/adapters.py                  # processor time, one thread
    python benchmarks/adapters.py --device cuda    # time until the GPU is done

The first table is of one layer without its frozen product, milliseconds, the best of 10. The second is of `Trainer.fit`,
seconds for 12 steps of 16 clients on MiniLM's shape with random weights, the better of two; *ahead* makes batches in a thread.
`fedloom.train.kernels.grouped_matmul.suits` and `Trainer`'s `ahead` follow them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
from machine import describe
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from fedloom import lora
from fedloom.core import Client, State, Work
from fedloom.data.batches import Encoded
from fedloom.rng import generator
from fedloom.train.kernels import grouped_matmul
from fedloom.train.kernels.grouped_matmul import Groups
from fedloom.train.kernels.lora_matmul import Frozen, Segments, lora_matmul
from fedloom.train.kernels.packing import segments_of
from fedloom.train.lora_linear import Adapter, find_layers, shape_of
from fedloom.train.optim import Settings
from fedloom.train.trainer import Trainer


def best(run: Callable[[], object], device: torch.device, warm: int = 2, turns: int = 10) -> float:
    """Seconds of the fastest run: of the processor, or until the GPU is done."""
    times = []
    for _ in range(warm + turns):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.process_time() if device.type == "cpu" else time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((time.process_time() if device.type == "cpu" else time.perf_counter()) - start)
    return min(times[warm:])


class Alone(Frozen):
    """No frozen product, which would hide what is compared."""

    def __call__(self, x: Tensor) -> list[Tensor]:
        return [x.clone()]

    def back(self, grads: Sequence[Tensor]) -> Tensor:
        return grads[0].clone()


def layers(device: torch.device) -> None:
    """Print the table of one layer."""
    print("| width | clients | tokens of each | padded | grouped |\n|---:|---:|---|---:|---:|")
    for width, K, least, most in ((384, 16, 60, 120), (384, 16, 10, 200), (2048, 4, 200, 260), (2048, 16, 20, 300)):
        counts = np.random.default_rng(0).integers(least, most, K)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.bfloat16, device=device).requires_grad_()

        x, A, B = draw(1, int(counts.sum()), width), draw(K, 8, width), draw(K, width, 8)
        frozen = Alone(lambda _: [], [None], [width], [None])
        padded, grouped = segments_of(counts, 0, False, False), segments_of(counts, 0, False, True)
        assert isinstance(padded, Segments) and isinstance(grouped, Groups)
        adapters = [Adapter(A, B, torch.ones(K, 1, 1, dtype=torch.bfloat16, device=device))]
        found = []
        for multiply, where in ((lora_matmul, padded.to(device)), (grouped_matmul.grouped_matmul, grouped.to(device))):

            def run(multiply: Any = multiply, where: Any = where, given: Any = (x, A, B)) -> None:
                (y,) = multiply(given[0], frozen, adapters, where)  # noqa: B023
                torch.autograd.grad(y, given, y.detach())

            found.append(f"{1000 * best(run, device):.2f}")
        print(f"| {width} | {K} | {counts.min()} to {counts.max()} | {' | '.join(found)} |", flush=True)


def steps(device: torch.device) -> None:
    """Print the table of whole steps."""
    shape: dict[str, Any] = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
    model = BertForSequenceClassification(BertConfig(**shape, num_attention_heads=12, num_labels=3))
    sites = [
        n for n, _ in model.named_modules() if n.endswith(("query", "value", "output.dense", "intermediate.dense"))
    ]
    shapes = {site: shape_of(x) for site, x in find_layers(model, sites).items()}
    rng = np.random.default_rng(0)
    works, data = [], []
    for k in range(16):
        lengths = rng.integers(5, 25, 8 * 12)
        tokens = rng.integers(3, 900, int(lengths.sum())).astype(np.int32)
        offsets = np.concatenate([[0], lengths.cumsum()])
        data.append(Encoded(tokens, offsets, 0, "classification", targets=rng.integers(0, 3, len(lengths))))
        state: State = lora.init(shapes, 8, generator(0, k, "start"))
        state["head"] = {n: x.detach().clone() for n, x in model.named_parameters() if n.startswith("classifier")}
        works.append((Client(f"{k}", len(lengths), 8), Work(train=state, scale=2.0)))
    print("\n| | padded | padded, ahead | grouped |\n|---|---:|---:|---:|")
    found = []
    for grouped, ahead in ((False, False), (False, True), (True, False)):
        with (
            mock.patch.object(grouped_matmul, "suits", lambda *_, grouped=grouped: grouped),
            Trainer(
                model,
                sites,
                ["classifier"],
                settings=Settings(batch_size=8, local_steps=12),
                device=device,
                dtype=torch.bfloat16,
                ahead=ahead,
            ) as trainer,
        ):

            def run(trainer: Trainer = trainer) -> None:
                trainer.fit(works, data, 1)

            found.append(f"{best(run, device, warm=1, turns=2):.2f}")
    print(f"| seconds | {' | '.join(found)} |", flush=True)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    device = torch.device(parser.parse_args().device)
    torch.set_num_threads(1)
    print(f"{describe()}; bfloat16, rank 8\n")
    layers(device)
    steps(device)


if __name__ == "__main__":
    main()
