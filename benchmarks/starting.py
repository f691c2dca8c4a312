"""What starting, resuming and evaluating cost beside reading the base's file, at true shapes with random weights. One command:

    OMP_NUM_THREADS=1 python benchmarks/starting.py [--shape llama-2-7b] [--quantization nf4] [--folder DIR]

The shape's bfloat16 file is written in the folder, shard by shard (13.8 GB for llama-2-7b, whose vocabulary here is
that of the tokenizer, SmolLM2's), and everything is deleted after, unless --keep. Then, each in a process of its own:
reading the file as `cat` does, from the disk (its pages dropped from memory) and from memory; hashing it; `load_base`
from the disk, from memory, and with the hash kept; `fedloom run` of two rounds, `fedloom resume` of that run, and
`fedloom evaluate` of its adapter. The peak is the kernel's count of the resident set, its importing of 0.3 GB included;
`private` is the peak without the pages of files, which are nobody's copy. Both are read every 20 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from bases import config_of
from machine import describe

SHAPES = ["qwen2.5-0.5b", "llama-3.2-1b", "llama-2-7b"]
SHARD = 4 << 30
RUN = """
[model]
name = "{model}"
dtype = "bfloat16"
{quantization}
[task]
kind = "causal-lm"
data = "chatterbot"
prompt = "question"
response = "answer"
template = "alpaca"
limit = 16
eval_limit = 2
max_length = 16
[clients]
count = 1
[method]
name = "fedit"
[train]
rounds = 2
local_steps = 1
batch_size = 1
[engine]
threads = 1
[run]
keep_checkpoints = 2
"""


def write(shape: str, path: Path) -> None:
    """A model directory of random bfloat16 weights (16.8 million draws, over and over), one shard in memory at a time."""
    import transformers as tf
    from safetensors.torch import save_file

    from fedloom.models.huggingface import resolve

    path.mkdir(parents=True)
    config = config_of(shape)
    config.vocab_size = max(config.vocab_size, 49152)  # the tokenizer's
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(config)
    config.architectures, config.dtype = [type(model).__name__], "bfloat16"
    config.save_pretrained(path)
    tf.AutoTokenizer.from_pretrained(resolve("smollm2")).save_pretrained(path)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    named = [(n, x) for n, x in model.named_parameters() if n not in tied]
    shards: list[list[tuple[str, Any]]] = [[]]
    for name, x in named:
        if shards[-1] and sum(2 * y.numel() for _, y in (*shards[-1], (name, x))) > SHARD:
            shards.append([])
        shards[-1].append((name, x))
    drawn = torch.empty((1 << 24) + 1).normal_(0, 0.02, generator=torch.Generator().manual_seed(0)).bfloat16()
    where = {}
    for i, part in enumerate(shards, start=1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name, x in part:
            tensors[name] = (torch.ones if "norm" in name else torch.zeros)(x.shape, dtype=torch.bfloat16)
            where[name] = file
            for piece in tensors[name].view(-1).split(len(drawn)) if x.ndim > 1 else ():
                piece.copy_(drawn[: len(piece)])
        save_file(tensors, path / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(2 * x.numel() for _, x in named)}, "weight_map": where}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def drop(path: Path) -> None:
    """Drop the file's pages from memory, so that the next one to read it reads the disk."""
    for file in path.glob("*.safetensors"):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def watched(command: list[str], env: dict[str, str]) -> dict[str, Any]:
    """Seconds, CPU seconds, the peak and the private peak of a command; and what it printed."""
    clock = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env)
        private, peak, done = [0], [0], threading.Event()

        def look() -> None:
            while not done.wait(0.02):
                try:
                    text = Path(f"/proc/{child.pid}/status").read_text()
                except OSError:
                    return
                for line in text.splitlines():
                    if line.startswith("RssAnon"):
                        private[0] = max(private[0], 1024 * int(line.split()[1]))
                    if line.startswith("VmHWM"):  # `ru_maxrss` would begin with what this process had when it forked
                        peak[0] = max(peak[0], 1024 * int(line.split()[1]))

        thread = threading.Thread(target=look)
        thread.start()
        _, status, usage = os.wait4(child.pid, 0)
        done.set()
        thread.join()
        out.seek(0)
        text = out.read()
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{text[-2000:]}")
    return {
        "wall": time.perf_counter() - clock,
        "cpu": usage.ru_utime + usage.ru_stime,
        "peak": peak[0],
        "private": private[0],
        "text": text,
    }


def child(what: str, path: Path, quantization: str) -> None:
    """Within a process of its own: import, hash, or load."""
    from bases import base_of
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401  # its import is everybody's

    from fedloom.models import quantised, weights

    if quantization != "bfloat16":
        quantised.bitsandbytes()
    if what == "hash":
        weights.sha256(path)
    if what == "load":
        base_of(path, quantization)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-2-7b", choices=SHAPES)
    parser.add_argument("--quantization", default="bfloat16", choices=["bfloat16", "nf4", "nf4-double", "int8"])
    parser.add_argument("--folder", type=Path, help="where the file is written; a temporary folder if left out")
    parser.add_argument("--keep", action="store_true", help="leave the file for the next call with the same folder")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        child(asked.child[0], Path(asked.child[1]), asked.child[2])
        return
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="starting-"))
    try:
        measure(asked.shape, asked.quantization, folder)
    finally:
        if not asked.keep:
            shutil.rmtree(folder, ignore_errors=True)


def measure(shape: str, how: str, folder: Path) -> None:
    path, work = folder / shape, Path(tempfile.mkdtemp(prefix="work-", dir=folder if folder.exists() else None))
    if not path.exists():
        write(shape, path)
    size = sum(x.stat().st_size for x in path.glob("*.safetensors"))
    print(f"{describe()}\n{shape}, {how}: files of {size / 1e9:.2f} GB\n")
    env = os.environ | {"FEDLOOM_CACHE": str(work / "cache")}
    me = [sys.executable, __file__, "--child"]
    cat = ["sh", "-c", f"cat {path}/*.safetensors | tail -c 1"]  # cat to /dev/null copies nothing
    config = work / "run.toml"
    coded = "" if how == "bfloat16" else f'quantization = "{how}"'
    config.write_text(RUN.format(model=path, quantization=coded))
    cli = [sys.executable, "-c", "from fedloom.cli.main import main; main()"]
    run = [*cli, "run", str(config), "--out", str(work / "run")]
    steps: list[tuple[str, list[str], bool]] = [
        ("cat, from the disk", cat, True),
        ("cat, from memory", cat, False),
        ("importing alone", [*me, "import", str(path), how], False),
        ("hashing", [*me, "hash", str(path), how], False),
        ("load_base, from the disk, hash kept", [*me, "load", str(path), how], True),
        ("load_base, from memory, hash kept", [*me, "load", str(path), how], False),
        ("fedloom run, two rounds of a step of 16 tokens", run, False),
        ("fedloom resume from round 1", [*cli, "resume", str(work / "run"), "--round", "1"], False),
        ("fedloom evaluate", [*cli, "evaluate", str(work / "run")], False),
    ]
    print(f"{'':44}{'s':>8}{'CPU s':>8}{'peak, GB':>10}{'/ file':>8}{'private':>9}")
    for name, command, cold in steps:
        if cold:
            drop(path)
        x = watched(command, env)
        print(
            f"{name:44}{x['wall']:>8.1f}{x['cpu']:>8.1f}{x['peak'] / 1e9:>10.2f}{x['peak'] / size:>8.2f}"
            f"{x['private'] / 1e9:>9.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
