"""What beside its weights decides a model's answers: hashes of its configuration and of its tokenizer."""

from __future__ import annotations

import hashlib
import json
from typing import Any

_ELSEWHERE = ("_name_or_path", "transformers_version")
"""Of a configuration: where it came from and who read it, which change no answer."""
_SET_BY_CALLS = ("truncation", "padding")
"""Of a tokenizer: what the last call left there."""


def config_sha256(config: Any) -> str:
    """Hash of a configuration of transformers, in any order of its keys."""
    return _sha256({key: value for key, value in config.to_dict().items() if key not in _ELSEWHERE})


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash of a tokenizer of transformers: how it cuts, its words, its special tokens and its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    cuts = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    cuts = {key: value for key, value in cuts.items() if backend is None or key not in _SET_BY_CALLS}
    return _sha256([cuts, tokenizer.special_tokens_map, getattr(tokenizer, "chat_template", None)])


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
