"""What a model directory says of itself, and errors that tell which of its parts cannot be read."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fedloom.errors import FedloomError, ModelError
from fedloom.models.weights import json_object
from fedloom.text import shortened, shown


@contextmanager
def reading(part: str, name: str) -> Iterator[None]:
    """A block in which a library reads a part ("configuration", "tokenizer", ...) of a model, and may fail in any way.

    Raises ModelError that names it. What is not installed, or not in memory, is no fault of the files.
    """
    try:
        yield
    except (FedloomError, ImportError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"the {part} of model {name!r} are damaged, or a pickle of more than tensors, which could run code: get "
            "model.safetensors instead"
        ) from error
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error):
            raise
        said = shortened(" ".join(str(error).split()), 160)
        raise ModelError(
            f"the {part} of model {name!r} cannot be read ({type(error).__name__}: {said}): get its files again, or mend them"
        ) from error


def check_declared(directory: Path, name: str) -> None:
    """Raise ModelError for a config.json that is none, or that declares what transformers cannot read without code of others.

    That is an unknown architecture, one whose weights are another's, and one that is coded in an unknown way.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    config = json_object(directory / "config.json")
    kind = config.get("model_type")
    # Where it is left out, transformers guesses it from the name.
    if kind is not None and not (isinstance(kind, str) and kind in CONFIG_MAPPING):
        own = ", and its own code, which fedloom does not run" if config.get("auto_map") else ""
        raise ModelError(
            f"config.json of model {name!r} names the architecture {shown(kind)} (model_type){own}: expected one that "
            f"transformers {transformers.__version__} has; choose another model, or a newer transformers"
        )
    architectures = config.get("architectures")
    for architecture in architectures if isinstance(architectures, list) else []:
        made = getattr(getattr(transformers, str(architecture), None), "config_class", None)
        other = getattr(made, "model_type", None)
        if kind and other and other != kind:
            raise ModelError(
                f"config.json of model {name!r} says {kind!r} (model_type) and {architecture!r}, which is a {other!r} "
                "(architectures): expected one and the same; get the model's files again"
            )
    coded = config.get("quantization_config")
    method = coded.get("quant_method") if isinstance(coded, dict) else coded
    known = AUTO_QUANTIZATION_CONFIG_MAPPING
    if coded is not None and not any(x == method or x.startswith(f"{method}_") for x in known):  # bitsandbytes_4bit
        raise ModelError(
            f"config.json of model {name!r} says that it is quantised as {shown(method)}, which transformers does not know: "
            "get a checkpoint of another kind, or the dense one"
        )
