"""Pages of the site that are made, not written: one a method, the Python interface, and files from above this folder."""

from __future__ import annotations

import html
import inspect
import json
import re
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter
from traitlets.config import Config

from fedloom import methods
from fedloom.describe import Description, Field, describe

ROOT = Path(__file__).parents[1]
ABOVE = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/studies/README.md": "study-files.md",
    "examples/own_data.ipynb": "notebook.md",
}
"""File from above this folder -> its page here."""
MODULES = {
    "Runs": ("fedloom.api", "fedloom.runs.run.Result", "fedloom.runs.run.Observer"),
    "Methods": ("fedloom.methods", "fedloom.describe", "fedloom.core", "fedloom.methods.base", "fedloom.flows"),
    "Factors": ("fedloom.state", "fedloom.lora", "fedloom.client", "fedloom.spec"),
}


def on_config(config: Any) -> Any:
    """Put the methods' pages into the navigation, by group."""
    groups: dict[str, list[dict[str, str]]] = {}
    for each in described():
        groups.setdefault(each.group, []).append({each.name: f"method/{each.name}.md"})
    config.nav.insert(2, {"Methods": [{group: pages} for group, pages in groups.items()]})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made."""
    made = {f"method/{each.name}.md": method_page(each) for each in described()}
    made["python.md"] = python_page()
    for source, name in ABOVE.items():
        made[name] = re.sub(r"\]\((?:\.\./)*docs/", "](", page_of(ROOT / source))
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links at files above this folder to their pages here."""
    for source, name in ABOVE.items():
        markdown = markdown.replace(f"](../{source}", f"]({name}").replace(f"]({source}", f"]({name}")
    return re.sub(r"\]\((?:\.\./)?((?:examples|src|tests)/[^)]+)\)", r"] (`\1`)", markdown)


def page_of(file: Path) -> str:
    """A file's text; a notebook's cells with what they showed when docs/notebook.py ran them."""
    if file.suffix != ".ipynb":
        return file.read_text(encoding="utf-8")
    text, _ = MarkdownExporter(config=Config(NbConvertBase={"display_data_priority": ["text/plain"]})).from_filename(
        file
    )
    return str(text)


@cache
def described() -> list[Description]:
    """All methods, those over another one last."""
    return sorted((describe(name) for name in methods.names()), key=lambda each: each.wrapper)


def method_page(each: Description) -> str:
    """What `fedloom methods NAME` says, as a page."""
    cls = methods.get(each.name)
    facts = {
        "group": each.group + (", goes over another method: facts are those over `fedit`" if each.wrapper else ""),
        "follows budgets": ", ".join(each.budgets) or "none",
        "server to client": code(each.down),
        "client to server": code(each.up) + (f", in {each.exchanges} exchanges a round" if each.exchanges > 1 else ""),
        "stays with the client": code(each.kept) or "nothing",
        "training starts from": each.start,
        "secure sum": each.secure_sum,
        "a model for each client": each.personal,
        "proxy data": "yes: `task.proxy_data`" if each.proxy_data else "no",
    }
    parts = [f"# {each.name}"]
    parts.append(prose(inspect.getdoc(inspect.getmodule(cls)) or ""))
    parts.append(prose(inspect.getdoc(cls) or ""))
    parts.append(
        table(("fact", each.name), [(name, value if "`" in value else escaped(value)) for name, value in facts.items()])
    )
    for section in ("method", "lora"):
        if mine := [x for x in each.fields if x.section == section]:
            parts += [f"## [{section}]", table(("key", "default", "type", "meaning"), [row(x) for x in mine])]
    return "\n\n".join(parts) + "\n"


def row(x: Field) -> tuple[str, str, str, str]:
    """A field's line."""
    allowed = ", ".join(f"`{json.dumps(choice)}`" for choice in x.choices) or escaped(x.type)
    default = "fedit" if x.name == "over" else f"`{json.dumps(x.default)}`"
    return f"`{x.name}`", default, ", ".join(part for part in (allowed, x.bounds) if part), escaped(x.meaning)


def python_page() -> str:
    """The Python interface from its docstrings."""
    parts = ["# Python"]
    for heading, names in MODULES.items():
        parts += [f"## {heading}", *(f"::: {name}" for name in names)]
    return "\n\n".join(parts) + "\n"


def code(roles: tuple[str, ...]) -> str:
    return " ".join(f"`{role}`" for role in roles)


def table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def prose(text: str) -> str:
    """A docstring's paragraphs; lines that are set in stay as they are."""
    blocks = []
    for paragraph in text.split("\n\n"):
        for inset, lines in groupby(paragraph.splitlines(), lambda line: line.startswith("    ")):
            block = "\n".join(lines)
            blocks.append(block if inset else escaped(block))
    return "\n\n".join(blocks)


def escaped(text: str) -> str:
    """Plain text that Markdown leaves alone, but for `code`."""
    pieces = text.split("`")
    return "`".join(
        x if i % 2 else re.sub(r"([\\*_\[\]#])", r"\\\1", html.escape(x, False)) for i, x in enumerate(pieces)
    )
