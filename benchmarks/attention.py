"""Plain against fused attention on a CPU, forward and backward, by dtype and length. One command:

    python benchmarks/attention.py

Milliseconds of processor time for 2,048 tokens, 12 heads of 32, on one thread, best of 20. `fedloom.train.attention.choose`
follows this table.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fedloom.train.kernels.packed_attention import plain


def best(run: Callable[[], object]) -> float:
    """Milliseconds of the fastest of 20 runs."""
    times = []
    for _ in range(20):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return 1000 * min(times)


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}\n{'mask':8}{'dtype':10}{'tokens':>7}{'eager':>8}{'sdpa':>8}")
    for causal in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            for L in (16, 32, 64, 128, 256, 512):
                shape = (2048 // L, 12, L, 32)
                qkv = torch.randn(3, *shape).to(dtype).requires_grad_()
                grad = torch.randn(shape).to(dtype)
                allowed = torch.ones(L, L, dtype=torch.bool).tril() if causal else torch.rand(shape[0], 1, 1, L) > 0.1
                allowed[..., 0] = True
                added = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, -torch.inf)
                if not causal:
                    added = added.repeat_interleave(12, 0).squeeze(2)

                def eager(qkv: Tensor = qkv, m: Tensor = added, g: Tensor = grad) -> None:
                    out = plain(qkv.flatten(1, 3), m, qkv.shape[-1] ** -0.5)
                    torch.autograd.grad(out, qkv, g.flatten(0, 2))

                def sdpa(qkv: Tensor = qkv, m: Tensor = allowed, g: Tensor = grad) -> None:
                    mask, is_causal = (None, True) if m.dim() == 2 else (m, False)
                    out = F.scaled_dot_product_attention(*qkv.unbind(0), mask, is_causal=is_causal)
                    torch.autograd.grad(out, qkv, g)

                name = str(dtype).removeprefix("torch.")
                print(f"{'causal' if causal else 'padding':8}{name:10}{L:>7}{best(eager):>8.1f}{best(sdpa):>8.1f}")


if __name__ == "__main__":
    main()
