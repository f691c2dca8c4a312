"""fedloom: federated LoRA fine-tuning of language models, where the method is a choice.

>>> import fedloom
>>> result = fedloom.run("run.toml")                       # doctest: +SKIP
>>> result.eval, result.adapter_dir                        # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fedloom import methods as methods
    from fedloom.api import load_config as load_config
    from fedloom.api import resume as resume
    from fedloom.api import run as run
    from fedloom.runs.config import RunConfig as RunConfig
    from fedloom.runs.run import Result as Result

__all__ = ["Result", "RunConfig", "__version__", "load_config", "methods", "resume", "run"]

_WHERE = {
    "load_config": "fedloom.api",
    "run": "fedloom.api",
    "resume": "fedloom.api",
    "RunConfig": "fedloom.runs.config",
    "Result": "fedloom.runs.run",
}


def __getattr__(name: str) -> Any:
    # Nothing heavy is imported before it is asked for: `fedloom.wireless` must work without torch.
    if name == "methods":
        return importlib.import_module("fedloom.methods")
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'fedloom' has no attribute {name!r}")
