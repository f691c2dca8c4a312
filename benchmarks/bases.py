"""Loading a base and stepping on it, in bfloat16 and quantised, at true shapes with random weights. One command:

    OMP_NUM_THREADS=1 python benchmarks/bases.py [--shape llama-3.2-1b] [--folder /tmp/bases] [--only load|step] [--turns 5]

The shape's file is made in the folder at the first call (2.5 GB for llama-3.2-1b) with the tokenizer of SmolLM2.
Each load is a process of its own, of a quantised base one that codes it and one that finds the codes; its peak is the kernel's
count, with the file pages that were looked at. The steps take turns within one process: one client, LoRA of rank 8 on query and
value, AdamW, two rows of 256 tokens of which half are the answer; processor time of one thread, so that a busy machine matters
less. A ratio is the median over turns.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe

HOW = ["bfloat16", "nf4", "nf4-double", "int8"]
DENSE = ("bfloat16", "float32")


def config_of(shape: str) -> Any:
    """The configuration that the model's authors publish."""
    import transformers as tf

    if shape == "qwen2.5-0.5b":
        sizes = dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14)
        return tf.Qwen2Config(
            **sizes,
            num_key_value_heads=2,
            vocab_size=151936,
            tie_word_embeddings=True,
            rope_theta=1e6,
            rms_norm_eps=1e-6,
        )
    layers = {"llama-3.2-1b": 16, "llama-2-7b": 32}[shape]
    if shape == "llama-2-7b":
        return tf.LlamaConfig(num_hidden_layers=layers, vocab_size=32000)
    return tf.LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )


def make(shape: str, folder: Path, layers: int | None) -> Path:
    """A model directory of random bfloat16 weights, unless it is there."""
    import transformers as tf
    from safetensors.torch import save_file

    from fedloom.models.huggingface import resolve

    path = folder / (shape if layers is None else f"{shape}-{layers}-layers")
    if (path / "model.safetensors").exists():
        return path
    path.mkdir(parents=True, exist_ok=True)
    config = config_of(shape)
    if layers is not None:
        config.vocab_size = max(49152, config.vocab_size * layers // config.num_hidden_layers)
        config.num_hidden_layers = layers
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.dtype = "bfloat16"
    config.save_pretrained(path)
    tf.AutoTokenizer.from_pretrained(resolve("smollm2")).save_pretrained(path)
    rng = torch.Generator().manual_seed(0)
    tensors = {}
    for name, x in model.named_parameters():
        new = torch.ones if "norm" in name else torch.zeros
        tensors[name] = new(x.shape, dtype=torch.bfloat16)
        if x.ndim > 1:
            for part in tensors[name].split(4096):
                part.copy_(torch.randn(part.shape, generator=rng) * 0.02)
    save_file(tensors, path / "model.tmp", metadata={"format": "pt"})
    (path / "model.tmp").rename(path / "model.safetensors")
    return path


def status(key: str) -> int:
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith(key))


def base_of(path: Path, how: str) -> Any:
    from fedloom.models.huggingface import load_base

    coded: Any = None if how in DENSE else how
    dtype = torch.float32 if how == "float32" else torch.bfloat16
    return load_base(str(path), kind="causal-lm", dtype=dtype, quantization=coded)


def load(path: Path, how: str) -> None:
    """In a process of its own: seconds, peak, what stays, what the weights' bytes say, and the hash."""
    import transformers  # noqa: F401  # its import is everybody's

    from fedloom.models import quantised

    if how not in DENSE:
        quantised.bitsandbytes()
    gc.collect()
    before, clock, cpu = status("VmRSS"), time.perf_counter(), time.process_time()
    base = base_of(path, how)
    found = {"wall": time.perf_counter() - clock, "cpu": time.process_time() - cpu}
    dtype = torch.float32 if how == "float32" else torch.bfloat16
    gc.collect()
    found |= {
        "peak": status("VmHWM") - before,
        "stays": status("VmRSS") - before,
        "anonymous": status("RssAnon"),
        "bytes": quantised.bytes_of(base.model, dtype),
        "file": sum(x.stat().st_size for x in path.glob("*.safetensors")),
    }
    print(json.dumps(found))


def loads(path: Path, how: list[str]) -> None:
    from fedloom.models import weights

    print(f"\n{'':18}{'s':>7}{'CPU s':>7}{'peak':>9}{'/ file':>8}{'stays':>9}{'bytes':>9}   GB")
    codes = Path(os.environ["FEDLOOM_CACHE"]) / "codes"
    for name in (x for one in how for x in ([one] if one in DENSE else [f"{one} first", f"{one} again"])):
        if name.endswith(" first"):
            shutil.rmtree(codes, ignore_errors=True)
        command = [sys.executable, __file__, "--child", str(path), name.split()[0]]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        x = json.loads(shown.splitlines()[-1])
        print(
            f"{name:18}{x['wall']:>7.1f}{x['cpu']:>7.1f}{x['peak'] / 1e9:>9.2f}{x['peak'] / x['file']:>8.2f}"
            f"{x['stays'] / 1e9:>9.2f}{x['bytes'] / 1e9:>9.2f}"
        )
    clock = time.perf_counter()
    weights.sha256(path)
    print(f"the hash, kept beside: {1000 * (time.perf_counter() - clock):.1f} ms")


def steps(path: Path, how: list[str], turns: int, tokens: int) -> None:
    from fedloom import lora
    from fedloom.core import Client, Work
    from fedloom.data.batches import Encoded
    from fedloom.models.huggingface import default_targets, find_sites
    from fedloom.rng import generator
    from fedloom.train.optim import Settings
    from fedloom.train.trainer import Trainer

    rng = np.random.default_rng(0)
    data = Encoded(
        tokens=rng.integers(3, 30000, 2 * tokens).astype(np.int32),
        offsets=np.array([0, tokens, 2 * tokens]),
        pad_id=0,
        kind="causal-lm",
        starts=np.array([tokens // 2, tokens // 2]),
    )
    trainers, times = {}, {name: [] for name in how}
    for name in how:
        base = base_of(path, name)
        sites = find_sites(base.model, default_targets(base.model))
        work = Work(train=lora.init(sites, 8, generator(0, "bench")), scale=2.0)
        settings = Settings(lr=1e-4, batch_size=2, local_steps=1)
        trainers[name] = Trainer(base.model, list(sites), settings=settings, dtype=torch.bfloat16), work
    for turn in range(turns + 1):
        for name in how[turn % len(how) :] + how[: turn % len(how)]:
            trainer, work = trainers[name]
            clock = time.process_time()
            trained = trainer.fit([(Client("a", 2, 8), work)], [data], turn)
            if turn:
                times[name].append(time.process_time() - clock)
            loss = trained[0].loss
            if turn == turns:
                print(f"{name:12} loss {loss:.4f}")
    print(f"\none step of 2 x {tokens} tokens, CPU s{'':10}{'best':>8}{'median':>8}{'x bfloat16':>12}")
    for name in how:
        ratio = statistics.median(a / b for a, b in zip(times[name], times[how[0]], strict=True))
        print(f"{name:36}{min(times[name]):>8.2f}{statistics.median(times[name]):>8.2f}{ratio:>12.2f}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.2-1b", choices=["qwen2.5-0.5b", "llama-3.2-1b", "llama-2-7b"])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/bases"))
    parser.add_argument("--only", choices=["load", "step"])
    parser.add_argument("--how", default=",".join(HOW))
    parser.add_argument("--layers", type=int, help="so many of the shape's layers, its vocabulary in proportion")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=256, help="of each of two rows")
    parser.add_argument("--child", nargs=2, metavar=("PATH", "HOW"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if not asked.child:  # of its own: codes are removed from it
        os.environ["FEDLOOM_CACHE"] = str(asked.folder / "cache")
    if asked.child:
        load(Path(asked.child[0]), asked.child[1])
        return
    path, how = make(asked.shape, asked.folder, asked.layers), asked.how.split(",")
    print(describe())
    print(f"{path.name}: a file of {os.path.getsize(path / 'model.safetensors') / 1e9:.2f} GB")
    if asked.only != "step":
        loads(path, how)
    if asked.only != "load":
        steps(path, how, asked.turns, asked.tokens)


if __name__ == "__main__":
    main()
