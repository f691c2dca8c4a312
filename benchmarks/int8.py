"""What frozen products in int8 gain on a CPU, and what they round away. One command:

    OMP_NUM_THREADS=1 python benchmarks/int8.py [--shape minilm|roberta-large|llama-1b] [--tokens 512] [--turns 5] [--blocks 4]

For each frozen product of a block, bfloat16 activations (tokens, in) and weights: the forward product and the gradient of its
input, in bfloat16, as `train.int8_products` makes them (oneDNN's kernel) and through each other int8 kernel that is installed.
Inputs are coded within the time, one scale a row, symmetric; weights beforehand, by rows, and once more by columns for the
gradient. Processor seconds, best of the turns. Errors are relative, of the product in float64: of Gaussian numbers, and with
one input in a hundred columns 20 times as large, as inside a language model.

Then a whole step of fedloom's trainer on some blocks of the shape, LoRA of rank 8 on query and value: as it is and with
`int8_products`, in turns, one client. What other kernels would make of it is the step less the bfloat16 products, plus theirs.
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

from fedloom.train.kernels.int8_matmul import Int8Matmul

SHAPES = {"minilm": (384, 1536, 12), "roberta-large": (1024, 4096, 16), "llama-1b": (2048, 8192, 32)}
"""Width, inner width and heads of a RoBERTa; the last has Llama-3.2-1B's widths."""

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


def ours(w: Tensor) -> Product:
    return Int8Matmul(w, None)


KERNELS = {"fedloom": ours, "torch._int_mm": int_mm, "bitsandbytes": bitsandbytes, "torchao": torchao}


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


def steps(width: int, inner: int, heads: int, blocks: int, tokens: int, turns: int) -> dict[bool, float]:
    """Processor seconds of one client's step on a RoBERTa of so many blocks, the base in bfloat16, without and with int8."""
    import transformers as tf

    from fedloom import lora
    from fedloom.core import Client, Work
    from fedloom.data.batches import Encoded
    from fedloom.models.huggingface import default_targets, find_sites, head_group, head_modules
    from fedloom.rng import generator
    from fedloom.train.optim import Settings
    from fedloom.train.trainer import Trainer

    config = tf.RobertaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_hidden_layers=blocks,
        vocab_size=50265,
        max_position_embeddings=514,
        pad_token_id=1,
        num_labels=2,
    )
    rows, length = max(1, tokens // 32), 32
    rng = np.random.default_rng(0)
    data = Encoded(
        tokens=rng.integers(5, 50000, rows * length).astype(np.int32),
        offsets=np.arange(rows + 1) * length,
        pad_id=1,
        kind="classification",
        targets=rng.integers(0, 2, rows),
    )
    trainers = {}
    for int8 in (False, True):
        model: Any = tf.AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16)
        sites = find_sites(model, default_targets(model))
        work = Work(train={**lora.init(sites, 8, generator(0, "bench")), "head": head_group(model)}, scale=2.0)
        settings = Settings(lr=1e-4, batch_size=rows, local_steps=1, int8_products=int8)
        trainers[int8] = Trainer(model, list(sites), head_modules(model), settings=settings, dtype=torch.bfloat16)
    best = dict.fromkeys(trainers, float("inf"))
    for turn in range(-2, turns):
        for int8, trainer in trainers.items():
            clock = time.process_time()
            trainer.fit([(Client("a", rows, 8), work)], [data], turn)
            if turn >= 0:
                best[int8] = min(best[int8], time.process_time() - clock)
    return best


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--blocks", type=int, default=4)
    asked = parser.parse_args()
    print(describe())
    with torch.no_grad():
        tables = {shape: table(shape, asked.tokens, asked.turns) for shape in asked.shape or SHAPES}
    for shape, (base, times) in tables.items():
        width, inner, heads = SHAPES[shape]
        found = steps(width, inner, heads, asked.blocks, asked.tokens, asked.turns)
        whole = found[False]
        print(
            f"\n{shape}: a step of {asked.tokens} tokens on {asked.blocks} blocks {1000 * whole:.0f} ms, of which frozen ",
            end="",
        )
        print(
            f"products {1000 * asked.blocks * base:.0f} ms ({asked.blocks * base / whole:.0%}); with int8_products ",
            end="",
        )
        print(
            f"{1000 * found[True]:.0f} ms, {whole / found[True]:.2f} times as fast; by the products' times it would be"
        )
        for name, x in times.items():
            gain = whole / (whole - asked.blocks * (base - x))
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
        plain = timed(dense(w), x, turns), timed(lambda g, w=w: g @ w, grad, turns)  # type: ignore[misc]
        total += count * sum(plain)
        shown = f"{count} x ({out}, {into})"
        print(f"{shown:19}{'bfloat16':16}{1000 * plain[0]:>9.3f}{1000 * plain[1]:>9.3f}", end="")
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
