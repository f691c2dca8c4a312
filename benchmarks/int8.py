"""Whether int8 kernels would make the frozen products of a step on a CPU faster, and what they would round away. One command:

    OMP_NUM_THREADS=1 python benchmarks/int8.py [--shape minilm|roberta-large] [--tokens 512] [--turns 5]

For each frozen product of a block, bfloat16 activations (tokens, in) and weights: the forward product and the gradient of its
input, in bfloat16 and through each int8 kernel that is installed. Activations are coded within the time: one scale a row,
symmetric, but for onednn's, which takes one scale and zero for all. Weights are coded beforehand, by rows, and once more by
columns for the gradient. Processor seconds, best of the turns. Errors are relative, of the product in float64: of Gaussian
numbers, and with one activation in a hundred columns 20 times as large, as inside a language model.

A whole step is measured at the same shape (fedloom's trainer on four blocks, LoRA of rank 8 on query and value); what it would
take is the step less the bfloat16 products, plus the int8 ones.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from machine import describe
from torch import Tensor
from torch.nn import functional

SHAPES = {"minilm": (384, 1536, 12), "roberta-large": (1024, 4096, 16)}
BLOCKS = 4
WANTED = 1.3

Product = Callable[[Tensor], Tensor]


def by_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 codes, float32 scale of each row), symmetric."""
    scale = x.abs().amax(1, keepdim=True).float().clamp_min_(1e-12) / 127
    return (x / scale).round_().to(torch.int8), scale


def dense(w: Tensor) -> Product:
    return lambda x: functional.linear(x, w)


def int_mm(w: Tensor) -> Product:
    codes, scale = by_rows(w)
    turned, scale = codes.T.contiguous(), scale.T

    def product(x: Tensor) -> Tensor:
        q, s = by_rows(x)
        return (torch._int_mm(q, turned).float().mul_(s).mul_(scale)).bfloat16()

    return product


def onednn(w: Tensor) -> Product:
    codes, scale = by_rows(w)
    packed = torch.ops.onednn.qlinear_prepack(codes, None)
    scale, zero = scale.view(-1), torch.zeros(len(w), dtype=torch.int64)

    def product(x: Tensor) -> Tensor:
        low, high = (v.item() for v in torch.aminmax(x))
        step = max(high - low, 1e-12) / 255
        shift = min(255, max(0, round(-low / step)))
        q = torch.quantize_per_tensor(x.float(), step, shift, torch.quint8).int_repr()
        made: Tensor = torch.ops.onednn.qlinear_pointwise(
            q, step, shift, packed, scale, zero, None, 1.0, 0, torch.bfloat16, "none", [], ""
        )
        return made

    return product


def bitsandbytes(w: Tensor) -> Product:
    import bitsandbytes.functional as bnb

    codes, scale, _ = bnb.int8_vectorwise_quant(w.half())

    def product(x: Tensor) -> Tensor:
        q, s, _ = bnb.int8_vectorwise_quant(x.half())
        made: Tensor = bnb.int8_mm_dequant(bnb.int8_linear_matmul(q, codes), s, scale).bfloat16()
        return made

    return product


def torchao(w: Tensor) -> Product:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    layer = torch.nn.Sequential(torch.nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=torch.bfloat16))
    layer[0].weight = torch.nn.Parameter(w, requires_grad=False)
    quantize_(layer, Int8DynamicActivationInt8WeightConfig())
    return layer


KERNELS = {"torch._int_mm": int_mm, "onednn": onednn, "bitsandbytes": bitsandbytes, "torchao": torchao}


def timed(product: Product, x: Tensor, turns: int) -> float:
    """Processor seconds of one call: best of the turns, each of as many calls as take some 50 ms."""
    clock = time.process_time()
    product(x)
    calls, best = 1, float("inf")
    calls = max(1, int(0.05 / max(time.process_time() - clock, 1e-5)))
    for _ in range(turns):
        clock = time.process_time()
        for _ in range(calls):
            product(x)
        best = min(best, (time.process_time() - clock) / calls)
    return best


def error(product: Product, x: Tensor, w: Tensor) -> float:
    right = x.double() @ w.double().T
    return float((product(x).double() - right).norm() / right.norm())


def step(width: int, inner: int, heads: int, tokens: int, turns: int) -> float:
    """Processor seconds of one client's step on a RoBERTa of four blocks, the base in bfloat16."""
    import transformers as tf

    from fedloom import lora
    from fedloom.core import Client, Work
    from fedloom.data.batches import Encoded
    from fedloom.models.huggingface import default_targets, find_sites, head_group
    from fedloom.rng import generator
    from fedloom.train.optim import Settings
    from fedloom.train.trainer import Trainer

    config = tf.RobertaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_hidden_layers=BLOCKS,
        vocab_size=50265,
        max_position_embeddings=514,
        pad_token_id=1,
        num_labels=2,
    )
    model: Any = tf.AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16)
    model.requires_grad_(False).eval()
    rows, length = max(1, tokens // 32), 32
    rng = np.random.default_rng(0)
    data = Encoded(
        tokens=rng.integers(5, 50000, rows * length).astype(np.int32),
        offsets=np.arange(rows + 1) * length,
        pad_id=1,
        kind="classification",
        targets=rng.integers(0, 2, rows),
    )
    sites = find_sites(model, default_targets(model))
    work = Work(train={**lora.init(sites, 8, generator(0, "bench")), "head": head_group(model)}, scale=2.0)
    settings = Settings(lr=1e-4, batch_size=rows, local_steps=1)
    trainer, best = Trainer(model, list(sites), settings=settings, dtype=torch.bfloat16), float("inf")
    for turn in range(turns + 1):
        clock = time.process_time()
        trainer.fit([(Client("a", rows, 8), work)], [data], turn)
        if turn:
            best = min(best, time.process_time() - clock)
    return best


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--turns", type=int, default=5)
    asked = parser.parse_args()
    print(describe())
    with torch.no_grad():
        tables = {shape: table(shape, asked.tokens, asked.turns) for shape in asked.shape or SHAPES}
    for shape, (base, times) in tables.items():
        width, inner, heads = SHAPES[shape]
        whole = step(width, inner, heads, asked.tokens, asked.turns)
        print(
            f"\n{shape}: a step of {asked.tokens} tokens on {BLOCKS} blocks {1000 * whole:.0f} ms, of which frozen ",
            end="",
        )
        print(f"products {1000 * BLOCKS * base:.0f} ms ({BLOCKS * base / whole:.0%}); a whole step would be")
        for name, x in times.items():
            gain = whole / (whole - BLOCKS * (base - x))
            print(f"    {name:16}{gain:6.2f} times as fast{'' if gain >= WANTED else f', wanted {WANTED}'}")


def table(shape: str, tokens: int, turns: int) -> tuple[float, dict[str, float]]:
    """Print a block's products; their processor seconds in bfloat16, and through each kernel."""
    width, inner, _ = SHAPES[shape]
    rng = torch.Generator().manual_seed(0)
    print(f"\n{shape}, {tokens} tokens{'':16}{'forward':>9}{'gradient':>9}   ms{'error':>8}{'of outliers':>13}")
    total, times = 0.0, dict.fromkeys(KERNELS, 0.0)
    for out, into, count in ((width, width, 4), (inner, width, 1), (width, inner, 1)):
        w = (0.02 * torch.randn(out, into, generator=rng)).bfloat16()
        x, grad = (
            torch.randn(tokens, into, generator=rng).bfloat16(),
            torch.randn(tokens, out, generator=rng).bfloat16(),
        )
        rough = x.clone()
        rough[:, ::100] *= 20
        turned = w.T.contiguous()
        ours = timed(dense(w), x, turns), timed(lambda g, w=w: g @ w, grad, turns)  # type: ignore[misc]
        total += count * sum(ours)
        shown = f"{count} x ({out}, {into})"
        print(f"{shown:19}{'bfloat16':16}{1000 * ours[0]:>9.3f}{1000 * ours[1]:>9.3f}", end="")
        print(f"{error(dense(w), x, w):>13.4f}{error(dense(w), rough, w):>13.4f}")
        for name, make in list(KERNELS.items()):
            if name not in times:
                continue
            try:
                there, back = make(w), make(turned)
                found = timed(there, x, turns), timed(back, grad, turns)
            except (ImportError, RuntimeError, NotImplementedError, AttributeError) as problem:
                print(f"{'':19}{name:16}cannot: {' '.join(str(problem).split())[:90]}")
                del times[name]
                continue
            times[name] += count * sum(found)
            print(f"{'':19}{name:16}{1000 * found[0]:>9.3f}{1000 * found[1]:>9.3f}", end="")
            print(f"{error(there, x, w):>13.4f}{error(there, rough, w):>13.4f}", flush=True)
    return total, times


if __name__ == "__main__":
    main()
