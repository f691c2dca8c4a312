"""What all commands share: the two consoles, how to go on after Ctrl-C, and what came of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from fedloom.runs.run import Result

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """One line, as it is: names of others hold no markup, and a long one is not wrapped."""
    out.print(text, soft_wrap=True, markup=False)


@contextmanager
def resumable(path: Path) -> Iterator[None]:
    """Say how to go on when Ctrl-C ends the block."""
    try:
        yield
    except KeyboardInterrupt:
        if (path / "run.toml").exists():
            err.print(f"interrupted; go on with: fedloom resume {path}", soft_wrap=True, markup=False)
        raise


def finished(result: Result, file: Path | str) -> None:
    """What came of a run. `file` is its run file, "" the quickstart's."""
    again = f"fedloom run {file}".rstrip()
    scores = ", ".join(f"{name} {value:.4f}" for name, value in result.eval.items() if value is not None)
    say(f"\nheld-out {scores}" if scores else "")
    say(f"adapter: {result.adapter_dir}")
    say(f"next:    fedloom evaluate {result.path}")
    say(f"         fedloom export {result.path} my-adapter [--merge]")
    say(f"         {again} --set method.name=fedit   (fedloom methods lists the others)")
