"""A commented run file for a kind of task: every key that it may want, the chosen ones set, the others as comments."""

from __future__ import annotations

import json
import textwrap
from typing import Any, Literal, get_args

from fedloom.cli.keys import Key, Section, sections
from fedloom.errors import ConfigError, nearest

Kind = Literal["classification", "regression", "causal-lm"]

_COMMON: dict[str, dict[str, Any]] = {
    "": {"seed": 0},
    "lora": {"rank": 8, "alpha": 16.0},
    "clients": {"count": 4},
    "method": {"name": "fedit"},
}
_CHOSEN: dict[str, dict[str, dict[str, Any]]] = {
    "classification": {
        "model": {"name": "minilm"},
        "task": {"data": "trec", "limit": 800},
        "train": {"rounds": 6, "lr": 6e-3},
    },
    "regression": {
        "model": {"name": "minilm"},
        "task": {"data": "vader-movies", "label": "rating", "limit": 800},
        "train": {"rounds": 6, "lr": 6e-3},
    },
    "causal-lm": {
        "model": {"name": "smollm2"},
        "task": {"data": "chatterbot", "prompt": "question", "response": "answer", "template": "chat"},
        "train": {"rounds": 3, "local_steps": 10, "batch_size": 4, "lr": 1e-3},
    },
}
_OTHERS = {
    "classification": {"prompt", "response", "template", "max_new_tokens"},
    "regression": {"prompt", "response", "template", "max_new_tokens"},
    "causal-lm": {"text", "label"},
}
"""Keys of [task] that a kind does not use."""


def starter(kind: str) -> str:
    """A run file for a kind of task, on packaged model and data. Raises ConfigError for another kind.

    >>> print(starter("regression").split("\\n\\n")[1])
    # Of every draw: the same seed gives the same bytes. (int, at least 0)
    seed = 0
    """
    if kind not in get_args(Kind):
        raise ConfigError(f"--kind is {kind!r}{nearest(kind, get_args(Kind))}; expected {', '.join(get_args(Kind))}")
    chosen = {name: dict(table) for name, table in (_COMMON | _CHOSEN[kind]).items()}
    chosen["task"] = {"kind": kind} | chosen["task"]
    parts = ["# A run file: fedloom run FILE. Keys behind a # are unset, or have this default."]
    for section in sections().values():
        parts.append(_table(section, chosen.get(section.name, {}), _OTHERS[kind] if section.name == "task" else set()))
    return "\n\n".join(parts) + "\n"


def _table(section: Section, chosen: dict[str, Any], unused: set[str]) -> str:
    # A section without a chosen key that needs one is off as long as its heading is a comment.
    off = "#" if not chosen and any(key.required for key in section.keys) else ""
    heading = [*_comment(section.about), f"{off}[{section.name}]"] if section.name else []
    return "\n".join(heading + [line for key in section.keys if key.name not in unused for line in _key(key, chosen)])


def _key(key: Key, chosen: dict[str, Any]) -> list[str]:
    comment = _comment(f"{key.meaning} ({key.type})")
    if key.name in chosen:
        return [*comment, f"{key.name} = {json.dumps(chosen[key.name])}"]
    return [*comment, f"#{key.name} = {'' if key.default is None else json.dumps(key.default)}".rstrip()]


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, 76, initial_indent="# ", subsequent_indent="# ")
