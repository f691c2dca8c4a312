"""Recipes: packaged run and study files for published settings, each with its source, its target and what it lacks.

A recipe is a run file with two more tables: [recipe] says where it is from, [study] names the methods to compare.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from fedloom.errors import ConfigError, nearest

PREFIX = "recipe:"


@dataclass(frozen=True)
class Recipe:
    """A published setting."""

    name: str
    text: str
    """The file as it is."""
    about: str
    source: str
    status: str
    """`exact`; `partly`: see `gaps`; `trend`: no number to hold it against."""
    target: str | dict[str, Any]
    """Published scores by method, or `unknown`."""
    gaps: list[str]
    """What is different here."""
    run: dict[str, Any]
    """Values of its run file."""
    study: dict[str, Any]
    """Values of its study file, without the base."""


def names() -> list[str]:
    """The names of all recipes."""
    return sorted(f.name.removesuffix(".toml") for f in files(__name__).iterdir() if f.name.endswith(".toml"))


def get(name: str) -> Recipe:
    """A recipe by name. Raises ConfigError naming the known ones."""
    if name not in names():
        raise ConfigError(f"there is no recipe {name!r}{nearest(name, names())}; known: {', '.join(names())}")
    text = (files(__name__) / f"{name}.toml").read_text(encoding="utf-8")
    values = tomllib.loads(text)
    head, study = values.pop("recipe"), values.pop("study")
    return Recipe(name, text, run=values, study=study, **head)


def stand_in(run: Mapping[str, Any]) -> dict[str, Any]:
    """The same run on packaged model and data, of minutes on two cores: same method, budgets and kind of split."""
    made = {table: dict(values) for table, values in run.items()}
    task, clients = made["task"], made["clients"]
    causal = task.get("kind") == "causal-lm"
    made["model"] = {"name": "smollm2" if causal else "minilm"}
    shared = {key: task[key] for key in ("kind", "template") if key in task}
    if "template" in shared:
        shared["template"] = _of_one_column(shared["template"])
    if causal:
        made["task"] = shared | {"data": "chatterbot", "prompt": "question", "response": "answer", "max_length": 64}
        made["task"] |= {"limit": 64, "eval_limit": 16}
    else:
        made["task"] = shared | {"data": "trec", "max_length": 32, "limit": 240, "eval_limit": 120}
    made["lora"].pop("targets", None)
    if clients.get("partition") == "by-field":
        made["clients"] |= {"field": "topic" if causal else "fine", "fraction": 0.1}
    else:
        made["clients"] |= {"count": min(4, clients["count"]), "fraction": 1.0}
    train = {key: value for key, value in made["train"].items() if key not in ("local_epochs", "local_steps")}
    made["train"] = train | {"rounds": 2, "local_steps": 2, "batch_size": 4, "evaluate_every": 1}
    return made


def _of_one_column(template: str) -> str:
    """The template with {prompt} in place of the columns that it names."""
    return re.sub(r"\{(?!response|end)\w+\}( \{(?!response|end)\w+\})*", "{prompt}", template)


def needs(run: Mapping[str, Any]) -> list[str]:
    """What a run file takes from a hub, or expects as a file, because it is not packaged."""
    from fedloom.data import packaged

    task = run["task"]
    found = [("model", run["model"]["name"], packaged.MODELS)]
    found += [("data", task[key], packaged.DATA) for key in ("data", "eval_data") if key in task]
    return [f"{what} {name}" for what, name, known in found if name not in known]
