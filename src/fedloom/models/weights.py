"""A model's weight files: those that transformers loads, and their hash, which is kept so that a large file is read once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from fedloom.models.gguf import cache_dir

_NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""In the order in which transformers looks for them."""


def weight_files(directory: Path) -> list[Path]:
    """The weight files that transformers loads from a model directory, by name; none if it has none."""
    found = next((directory / name for name in _NAMES if (directory / name).is_file()), None)
    if found is None:
        return []
    if found.suffix != ".json":
        return [found]
    names = json.loads(found.read_text(encoding="utf-8"))["weight_map"].values()
    return [directory / name for name in sorted(set(names))]


def read(directory: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Those of the parameters named that are in a model's safetensors files, as they are stored."""
    from safetensors import safe_open

    wanted = set(names)
    found: dict[str, Tensor] = {}
    for file in weight_files(directory):
        if file.suffix == ".safetensors":
            with safe_open(str(file), framework="pt") as tensors:
                found |= {name: tensors.get_tensor(name) for name in tensors.keys() if name in wanted}  # noqa: SIM118
    return found


def sha256(directory: Path) -> str:
    """Hash of a model's weights: of the file where there is one, of their hashes in order of name where there are more."""
    hashes = [_file_sha256(file) for file in weight_files(directory)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _file_sha256(file: Path) -> str:
    """Read again only when the file at this path has another size, time of change or inode."""
    stat = file.stat()
    what = [str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]
    kept = cache_dir() / "sha256" / hashlib.sha256(json.dumps(what).encode()).hexdigest()
    with contextlib.suppress(OSError, UnicodeDecodeError):
        known = kept.read_text(encoding="ascii")
        if len(known) == 64:
            return known
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    now = file.stat()
    if (now.st_size, now.st_mtime_ns, now.st_ino) != (stat.st_size, stat.st_mtime_ns, stat.st_ino):
        return digest  # of something that changed meanwhile: not to be remembered
    with contextlib.suppress(OSError):  # a cache that cannot be written is read through
        kept.parent.mkdir(parents=True, exist_ok=True)
        beside = kept.with_name(f"{kept.name}.{os.getpid()}")
        beside.write_text(digest, encoding="ascii")
        beside.replace(kept)
    return digest
