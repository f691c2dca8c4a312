"""Write again what pages quote of the command line, as it is printed now: `fedloom keys` and every command's help.

The reference gets a block for every section and every command there is. python docs/update.py
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from fedloom.cli import show
from fedloom.cli.keys import sections
from fedloom.cli.main import app, call

REFERENCE = Path(__file__).with_name("reference.md")


def main() -> None:
    """Write the reference's two lists."""
    commands = [str(each.name or each.callback.__name__) for each in app.registered_commands if each.callback]
    text = REFERENCE.read_text(encoding="utf-8")
    text = listed(text, r"keys (?!-)[^\n]*", (f"fedloom keys {name}" for name in sections() if name))
    text = listed(text, r"[^\n]*--help", ["fedloom --help", *(f"fedloom {name} --help" for name in commands)])
    REFERENCE.write_text(text, encoding="utf-8")


def listed(text: str, pattern: str, commands: Iterable[str]) -> str:
    """The text with its console blocks of a pattern, which stand together, in place of these commands' blocks."""
    blocks = re.compile(rf"(```console\n\$ fedloom {pattern}\n(?:(?!```).)*```\n+)+", re.DOTALL)
    made = "".join(f"{quoted(command)}\n\n" for command in commands)
    text, count = blocks.subn(lambda _: made, text)
    assert count == 1, f"the blocks of {pattern} stand in {count} places, expected one"
    return text


def quoted(command: str) -> str:
    """A console block: the command and what it prints at 80 columns."""
    printed = io.StringIO()
    show.out.width = 80
    with contextlib.redirect_stdout(printed):
        call(shlex.split(command)[1:])
    lines = [line.rstrip() for line in printed.getvalue().splitlines()]
    return "\n".join(["```console", f"$ {command}", *lines, "```"])


if __name__ == "__main__":
    main()
