"""A model in a GGUF file, de-quantised once into an ordinary model directory that loads in a fraction of a second."""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fedloom.disk import cache_dir as cache_dir
from fedloom.errors import ModelError

_ABANDONED_S = 3600.0


def converted(file: Path, sha256: str) -> Path:
    """The directory of the model in `file`, whose hash is `sha256`; converted once (SmolLM2: 15 s, 1.6 GB).

    Several processes may call it at once: each converts in a directory of its own and the first to finish wins.
    Raises ModelError if the file is damaged or its architecture unknown to transformers, or if the cache cannot be written,
    as on a full disk; nothing half-written stays.
    """
    target = cache_dir() / f"{file.name.removesuffix('.gguf')}-{sha256[:16]}"
    if (target / "config.json").is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(f".{target.name}-*"):
            if time.time() - left.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(left, ignore_errors=True)  # by a process that was killed
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            # The reader draws a progress bar of its own, and models are made with random weights before they are filled.
            with contextlib.redirect_stderr(io.StringIO()), torch.random.fork_rng(devices=[]):
                _convert(file, scratch)
            scratch.chmod(0o755)
            try:
                scratch.rename(target)
            except OSError:
                if not (target / "config.json").is_file():  # else another process has just put the same there
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{file.name} could not be converted into {target.parent} ({error}): it needs about 4 bytes a weight there; free "
            "some, or set FEDLOOM_CACHE to another directory"
        ) from error
    except Exception as error:  # whatever its reader raises
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(
            f"{file.name} cannot be read as a GGUF model ({why}): expected a whole file of a decoder that transformers knows"
        ) from error
    return target


def _convert(file: Path, dest: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    AutoTokenizer.from_pretrained(str(file.parent), **where).save_pretrained(str(dest))
    loaded = AutoModelForCausalLM.from_pretrained(str(file.parent), dtype=torch.float32, **where)
    # The loaded model still calls itself quantised and refuses to be saved, though its layers are plain ones: the same
    # weights in a model made from the same configuration without that note can be.
    config = type(loaded.config).from_dict(
        {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    )
    untyped: Any = AutoModelForCausalLM  # from_config has no annotations
    plain = untyped.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict(), strict=True)
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(str(dest))
