"""Loading a model's files: how much memory that takes, and the hash of what is loaded."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedloom.errors import ModelError
from fedloom.models import weights

PEAK = """
import sys, torch
from transformers import LlamaForCausalLM
from fedloom.models.huggingface import load_base

def status(key):
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

before = status("VmRSS")
base = load_base(sys.argv[1], kind="causal-lm", dtype=getattr(torch, sys.argv[2]))
total = sum(float(x.float().sum()) for x in base.model.parameters() if x.numel() < 1e6)
for x in base.model.parameters():
    x.view(torch.uint8).max()  # every page of it
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own count")
def test_a_model_is_loaded_once_in_its_dtype(decoder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        config = LlamaConfig(
            hidden_size=1024, num_hidden_layers=16, num_attention_heads=16, intermediate_size=2816, vocab_size=64
        )
        shapes = {name: x.shape for name, x in LlamaForCausalLM(config).state_dict().items()}
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(decoder).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(
        {name: torch.zeros(s, dtype=torch.bfloat16) for name, s in shapes.items()}, file, metadata={"format": "pt"}
    )
    size = file.stat().st_size
    assert size > 400e6  # or some buffers of 16 MB would matter
    ran = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path), "bfloat16"], capture_output=True, text=True, timeout=120, check=True
    )
    assert 0.9 * size < int(ran.stdout.split()[-1]) < 1.2 * size


def stored(path: Path, **files: str) -> Path:
    path.mkdir(exist_ok=True)
    for name, text in files.items():
        (path / name.replace("__", ".").replace("_of_", "-of-")).write_text(text)
    return path


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_the_hash_is_of_the_files_that_are_loaded(tmp_path: Path) -> None:
    both = stored(tmp_path / "a", model__safetensors="w", adapter_model__safetensors="other", pytorch_model__bin="old")
    assert weights.sha256(both) == digest("w")
    index = json.dumps({"weight_map": {"x": "two.safetensors", "y": "one.safetensors", "z": "one.safetensors"}})
    shards = stored(
        tmp_path / "b",
        one__safetensors="1",
        two__safetensors="2",
        model__safetensors__index__json=index,
    )
    assert [x.name for x in weights.weight_files(shards)] == ["one.safetensors", "two.safetensors"]
    assert weights.sha256(shards) == digest(f"{digest('1')}\n{digest('2')}")
    with pytest.raises(ModelError, match="has no weights"):
        weights.weight_files(stored(tmp_path / "c"))


def test_a_file_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLOOM_CACHE", str(tmp_path / "cache"))
    model = stored(tmp_path / "m", model__safetensors="w")
    file = model / "model.safetensors"
    read: list[Path] = []
    real = hashlib.file_digest
    monkeypatch.setattr(
        hashlib, "file_digest", lambda stream, name: read.append(Path(stream.name)) or real(stream, name)
    )
    assert weights.sha256(model) == weights.sha256(model) == digest("w") and read == [file]

    before = file.stat()
    file.write_text("v")  # of one size, and made to look as old
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weights.sha256(model) == digest("v") and len(read) == 2
    beside = model / "new"
    beside.write_text("v")
    beside.replace(file)  # another file under the name
    assert weights.sha256(model) == digest("v") and len(read) == 3


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDLOOM_CACHE", str(tmp_path / "file"))
    assert weights.sha256(stored(tmp_path / "m", model__safetensors="w")) == digest("w")
    monkeypatch.setenv("FEDLOOM_CACHE", str(tmp_path))
    assert weights.sha256(tmp_path / "m") == digest("w")
    kept = next((tmp_path / "sha256").iterdir())
    kept.write_text("half")
    assert weights.sha256(tmp_path / "m") == digest("w")
