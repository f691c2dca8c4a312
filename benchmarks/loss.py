"""The loss over a large vocabulary, whole in float32 and in chunks: peak memory and processor time, each in its own process.

python benchmarks/loss.py
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time

import torch
from torch.nn import functional as F

from fedloom.data.batches import Targets
from fedloom.train.loss import client_losses

TOKENS, WORDS, CLIENTS = 2048, 128_256, 4


def main(way: str) -> None:
    """Print what one way takes: GiB beside the logits, processor seconds."""
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(TOKENS, WORDS, dtype=torch.bfloat16, generator=g).requires_grad_()
    labels = torch.randint(WORDS, (TOKENS,), generator=g)
    zero = torch.zeros(TOKENS, dtype=torch.int64)
    wanted = Targets(labels, torch.arange(CLIENTS).repeat_interleave(TOKENS // CLIENTS), zero, zero, CLIENTS)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    if way == "whole":
        each = F.cross_entropy(logits.float(), labels, reduction="none")
        losses = each.view(CLIENTS, -1).double().mean(1)
    else:
        losses = client_losses("causal-lm", logits, wanted)
    losses.sum().backward()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"| {way} | {(after - before) / 2**20:.2f} GiB | {time.process_time() - start:.1f} s |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:]:
        main(sys.argv[1])
    else:
        for name in ("whole", "chunks"):
            subprocess.run([sys.executable, __file__, name], check=True)
