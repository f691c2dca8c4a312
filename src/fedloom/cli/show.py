"""What all commands share: the two consoles, how to go on after Ctrl-C, and what came of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from fedloom.text import printable

if TYPE_CHECKING:
    from fedloom.runs.config import RunConfig
    from fedloom.runs.run import Result


class Plain(Console):
    """A console for text of others: its words are no markup, and its escape sequences are seen, not obeyed."""

    def __init__(self, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


out = Plain()
err = Plain(stderr=True)


def say(text: str) -> None:
    """One line, as it is, however long."""
    out.print(text, soft_wrap=True)


@contextmanager
def resumable(path: Path) -> Iterator[None]:
    """Say how to go on when Ctrl-C ends the block."""
    try:
        yield
    except KeyboardInterrupt:
        if (path / "run.toml").exists():
            err.print(f"interrupted; go on with: fedloom resume {path}", soft_wrap=True)
        raise


def finished(result: Result, file: Path | str) -> None:
    """What came of a run, and its report if it asks for one. `file` is its run file, "" the quickstart's."""
    from fedloom.runs.run_directory import RunDirectory
    from fedloom.studies import web

    web.if_asked(result.path)
    again = f"fedloom run {file}".rstrip()
    scores = ", ".join(f"{name} {value:.4f}" for name, value in result.eval.items() if value is not None)
    say(f"\nheld-out {scores}{_over(result)}" if scores else "")
    say(f"adapter: {result.adapter_dir}")
    say(f"next:    fedloom evaluate {result.path}")
    say(f"         fedloom export {result.path} my-adapter [--merge]")
    if (other := _another(RunDirectory.open(result.path).config())) is not None:
        say(f"         {again} --set method.name={other}   (fedloom methods lists the others)")


def _over(result: Result) -> str:
    """Whose scores the last ones are the mean of, where they are of clients."""
    over = next((r.get("eval_over") for r in reversed(result.rounds) if "eval" in r), None)
    if not over:
        return ""
    rows = "each on rows of its own" if over["rows"] == "own" else "all on the same rows"
    return f" (mean over {over['clients']} of {over['of']} clients, {rows})"


def _another(config: RunConfig) -> str | None:
    """A method to compare with, one that follows the budgets of this run file."""
    if config.clients.keep != 1.0:
        return None
    names = ("fedit", "fedex_lora") if config.clients.ranks is None else ("flexlora", "hetlora")
    return next(name for name in names if name not in [config.method.name])
