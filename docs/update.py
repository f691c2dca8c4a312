"""Write again what pages quote of the command line: every `fedloom keys` and `--help` block, as it is printed now.

python docs/update.py
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

from fedloom.cli import show
from fedloom.cli.main import call

PAGES = sorted(Path(__file__).parent.glob("*.md"))
QUOTED = re.compile(r"```console\n\$ (fedloom (?:keys[^\n]*|[^\n]*--help))\n.*?```", re.DOTALL)


def quoted(command: str) -> str:
    """A console block: the command and what it prints at 80 columns."""
    printed = io.StringIO()
    show.out.width = 80
    with contextlib.redirect_stdout(printed):
        call(shlex.split(command)[1:])
    lines = [line.rstrip() for line in printed.getvalue().splitlines()]
    return "\n".join(["```console", f"$ {command}", *lines, "```"])


if __name__ == "__main__":
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        page.write_text(QUOTED.sub(lambda found: quoted(found[1]), text), encoding="utf-8")
