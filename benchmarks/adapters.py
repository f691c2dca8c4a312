"""Adapters of clients with unlike numbers of tokens: padded to the largest against grouped products, forward and backward.

    python benchmarks/adapters.py            # processor milliseconds, one thread, best of 10
    python benchmarks/adapters.py --device cuda

`fedloom.train.kernels.grouped_matmul.suits` follows this table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from machine import describe
from torch import Tensor

from fedloom.train.kernels.grouped_matmul import Groups, grouped_matmul
from fedloom.train.kernels.lora_matmul import Frozen, Segments, lora_matmul
from fedloom.train.kernels.packing import segments_of
from fedloom.train.lora_linear import Adapter


def best(run: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of the fastest of 10 runs, after two: of the processor, or until the GPU is done."""
    times = []
    for _ in range(12):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.process_time() if device.type == "cpu" else time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((time.process_time() if device.type == "cpu" else time.perf_counter()) - start)
    return 1000 * min(times[2:])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    device = torch.device(parser.parse_args().device)
    torch.set_num_threads(1)
    print(f"{describe()}; bfloat16, rank 8, without the frozen product\n")
    print("| width | clients | tokens of each | padded | grouped |\n|---:|---:|---|---:|---:|")
    for width, K, least, most in ((384, 16, 60, 120), (384, 16, 10, 200), (2048, 4, 200, 260), (2048, 16, 20, 300)):
        counts = np.random.default_rng(0).integers(least, most, K)
        x = torch.randn(1, int(counts.sum()), width, dtype=torch.bfloat16, device=device).requires_grad_()
        A = torch.randn(K, 8, width, dtype=torch.bfloat16, device=device).requires_grad_()
        B = torch.randn(K, width, 8, dtype=torch.bfloat16, device=device).requires_grad_()
        adapter = Adapter(A, B, torch.ones(K, 1, 1, dtype=torch.bfloat16, device=device))
        frozen = Alone(lambda _: [], [None], [width], [None])
        padded, grouped = segments_of(counts, 0, False, False), segments_of(counts, 0, False, True)
        assert isinstance(padded, Segments) and isinstance(grouped, Groups)
        segments, groups = padded.to(device), grouped.to(device)

        def spread(given: Any = (x, frozen, [adapter], segments)) -> None:
            (y,) = lora_matmul(*given)
            torch.autograd.grad(y, (given[0], *given[2][0][:2]), y.detach())

        def group(given: Any = (x, frozen, [adapter], groups)) -> None:
            (y,) = grouped_matmul(*given)
            torch.autograd.grad(y, (given[0], *given[2][0][:2]), y.detach())

        each = f"{counts.min()} to {counts.max()}"
        print(f"| {width} | {K} | {each} | {best(spread, device):.2f} | {best(group, device):.2f} |", flush=True)


class Alone(Frozen):
    """No frozen product, which would hide what is compared."""

    def __call__(self, x: Tensor) -> list[Tensor]:
        return [x.clone()]

    def back(self, grads: Sequence[Tensor]) -> Tensor:
        return grads[0].clone()


if __name__ == "__main__":
    main()
