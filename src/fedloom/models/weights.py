"""The weight files of a model directory: exactly those that transformers loads, and their hash."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from fedloom.errors import ModelError
from fedloom.text import shown

_ORDER = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""The first of them that is there is loaded; an index names the files that are."""


def weight_files(directory: Path) -> list[Path]:
    """What transformers loads from a model directory, in order of name. Raises ModelError if it cannot be told."""
    if (directory / "adapter_config.json").exists():
        raise ModelError(f"{directory} holds an adapter beside its model: merge it, or take adapter_config.json away")
    named = _json(directory / "config.json").get("transformers_weights")
    if named is not None:
        raise ModelError(f"{directory / 'config.json'} names weights of its own ({shown(named)}): remove the entry")
    first = next((name for name in _ORDER if (directory / name).is_file()), None)
    if first is None:
        raise ModelError(f"{directory} has no weights, expected one of {', '.join(_ORDER)}")
    if not first.endswith(".index.json"):
        return [directory / first]
    names = sorted(_indexed(directory / first))
    for name in names:
        if Path(name).name != name or not (directory / name).is_file():
            raise ModelError(f"{directory / first} names {shown(name)}, expected a file of the same directory")
    return [directory / name for name in names]


def _indexed(index: Path) -> set[str]:
    """The files that an index names."""
    found = _json(index).get("weight_map")
    names = list(found.values()) if isinstance(found, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise ModelError(f"{index} is no index of weights, expected file names in its weight_map")
    return set(names)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read ({type(error).__name__}): get the model's files again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds {shown(value)}, expected an object: get the model's files again")
    return value


def weights_sha256(directory: Path) -> str:
    """Hash of the weights: of the file where there is one, of their hashes in order of name where there are more."""
    hashes = []
    for file in weight_files(directory):
        with file.open("rb") as stream:
            hashes.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()
