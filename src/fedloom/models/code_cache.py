"""The codes of a quantised base, kept between runs: coding 1 B weights in NF4 takes 19 s of a processor, reading them nothing.

A file of safetensors in the cache directory, named by all that the codes depend on. On a CPU the codes of a run are the file's
own pages. What cannot be read, or is not what was written, is made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fedloom.disk import cache_dir
from fedloom.models import quantised
from fedloom.models.quantised import Coded, Quantization
from fedloom.models.weights import file_sha256

_LEFT_S = 3600.0
"""After which a file that is not whole is nobody's: codes of 70 B weights are written in a minute."""


def place(
    sha256: str, how: Quantization, dtype: torch.dtype, device: torch.device | str, keep: Collection[str]
) -> Path:
    """The file of the codes of weights with this hash, read in `dtype` and coded on `device` but for the layers of `keep`.

    Raises ModelError without bitsandbytes.
    """
    quantised.bitsandbytes()
    kind = torch.device(device).type  # a GPU's rounding is its own
    words = [sha256, quantised.settings(how), str(dtype), kind, sorted(keep), version("bitsandbytes")]
    return cache_dir() / "codes" / f"{how}-{hashlib.sha256(json.dumps(words).encode()).hexdigest()[:32]}.safetensors"


def read(file: Path) -> Mapping[str, Coded] | None:
    """Layer -> its codes; None if there is no such file, or it is not as it was written."""
    try:
        if file_sha256(file) != _beside(file).read_text(encoding="ascii"):
            return None
        flat: dict[str, dict[str, Tensor]] = {}
        with safe_open(str(file), framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                layer, _, part = key.rpartition("/")
                flat.setdefault(layer, {})[part] = tensors.get_tensor(key)
        return {layer: (x.pop("packed"), quantised.codes(x)) for layer, x in flat.items()}
    except (OSError, ValueError, KeyError, SafetensorError):
        return None


def write(file: Path, model: nn.Module) -> None:
    """Keep the codes of a model. A cache that cannot be written, as on a full disk, is done without: nothing of it stays."""
    layers = quantised.quantised(model)
    flat = {f"{name}/packed": layer.weight.data for name, layer in layers.items()}
    flat |= {f"{name}/{part}": x for name, layer in layers.items() for part, x in layer.codes.tensors().items()}
    beside = file.with_name(f".{file.name}-{secrets.token_hex(4)}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _sweep(file.parent)
        # A table of levels is one tensor for all layers, and safetensors keeps none twice.
        save_file({key: x.cpu().contiguous().clone() if _shared(key) else x.cpu() for key, x in flat.items()}, beside)
        digest = file_sha256(beside)
        os.replace(beside, file)
        _beside(file).write_text(digest, encoding="ascii")
    except (OSError, SafetensorError):
        pass
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """Delete what processes that were killed while they wrote have left."""
    for left in folder.glob(".*.safetensors-*"):
        if time.time() - left.stat().st_mtime > _LEFT_S:
            left.unlink(missing_ok=True)


def _shared(key: str) -> bool:
    """Whether layers share this tensor."""
    return key.endswith(("/code", "/code2"))


def _beside(file: Path) -> Path:
    return file.with_suffix(".sha256")


def quantise(
    model: nn.Module,
    how: Quantization,
    keep: Collection[str],
    device: torch.device | str,
    file: Path,
    check: Callable[[], None],
    on_status: Callable[[str], None] = lambda what: None,
) -> None:
    """As `quantised.quantise`, from the codes in `file` if they are there; else they are put there.

    `check` looks at the model's weights: before they are coded, and at what is left dense where they were coded before.
    """
    found = read(file)
    if found is not None:
        quantised.quantise(model, how, keep, device, found)
        check()
        return
    check()
    on_status(f"coding the base in {how} (kept for the next start)")
    quantised.quantise(model, how, keep, device)
    write(file, model)
