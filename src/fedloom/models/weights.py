"""The weight files of a model directory: exactly those that transformers loads, and their hash, kept to read them once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from fedloom.disk import cache_dir
from fedloom.errors import ModelError
from fedloom.text import shown

_ORDER = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""The first of them that is there is loaded; an index names the files that are."""


def weight_files(directory: Path) -> list[Path]:
    """What transformers loads from a model directory, in order of name. Raises ModelError if it cannot be told."""
    if (directory / "adapter_config.json").exists():
        raise ModelError(f"{directory} holds an adapter beside its model: merge it, or take adapter_config.json away")
    config = directory / "config.json"
    named = json_object(config).get("transformers_weights") if config.exists() else None
    if named is not None:
        raise ModelError(f"{directory / 'config.json'} names weights of its own ({shown(named)}): remove the entry")
    first = first_of(name for name in _ORDER if (directory / name).is_file())
    if first is None:
        raise ModelError(f"{directory} has no weights, expected one of {', '.join(_ORDER)}")
    if not first.endswith(".index.json"):
        return [directory / first]
    names = sorted(indexed(directory / first))
    for name in names:
        if Path(name).name != name or not (directory / name).is_file():
            raise ModelError(f"{directory / first} names {shown(name)}, expected a file of the same directory")
    return [directory / name for name in names]


def first_of(names: Iterable[str]) -> str | None:
    """That of some files which transformers loads: the weights, or the index of them."""
    there = set(names)
    return next((name for name in _ORDER if name in there), None)


def indexed(index: Path) -> set[str]:
    """The files that an index names. Raises ModelError if it is no index."""
    found = json_object(index).get("weight_map")
    names = list(found.values()) if isinstance(found, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise ModelError(f"{index} is no index of weights, expected file names in its weight_map")
    return set(names)


def json_object(path: Path) -> dict[str, Any]:
    """What a file of a model directory says. Raises ModelError if it is no object of JSON."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read ({type(error).__name__}): get the model's files again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds {shown(value)}, expected an object: get the model's files again")
    return value


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


def check_stored(directory: Path, coded: bool) -> None:
    """Raise ModelError that names a file which is not whole, or holds integers that no quantization_config explains.

    Only headers are read. `coded`: there is such a config.
    """
    from safetensors import SafetensorError, safe_open

    for file in weight_files(directory):
        if file.suffix != ".safetensors":
            continue
        try:
            with safe_open(str(file), framework="pt") as tensors:
                stored = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ModelError(f"{file} is not a whole file of safetensors ({error}): get it again") from error
        for name, dtype in stored.items():
            if not coded and name.endswith("weight") and dtype not in ("F16", "BF16", "F32", "F64"):
                raise ModelError(
                    f"{file} holds {name!r} as {dtype}, and config.json has no quantization_config that says how to read "
                    "it: get the dense model, or the whole quantised one"
                )


def sha256(directory: Path) -> str:
    """Hash of a model's weights: of the file where there is one, of their hashes in order of name where there are more."""
    hashes = [file_sha256(file) for file in weight_files(directory)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def file_sha256(file: Path) -> str:
    """Hash of one file. Read again only when the file at this path has another size, time of change or inode."""
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
