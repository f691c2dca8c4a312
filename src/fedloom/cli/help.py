"""Help that fits 80 columns: whole sentences, and what an argument is for."""

from __future__ import annotations

from typing import Any, get_type_hints

import click
from typer.core import TyperArgument, TyperCommand, TyperGroup
from typer.models import ArgumentInfo


class Command(TyperCommand):
    """A command whose arguments keep their help, which typer 0.20 loses on click 8.5."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        hints = get_type_hints(self.callback, include_extras=True)
        for param in self.params:
            if isinstance(param, TyperArgument):
                told = getattr(hints[str(param.name)], "__metadata__", ())
                param.help = next((x.help for x in told if isinstance(x, ArgumentInfo)), None)

    def get_short_help_str(self, limit: int = 45) -> str:
        """The first sentence, whole: the formatter wraps it."""
        return f"{(self.help or '').split('. ')[0].split(chr(10) * 2)[0].rstrip('.')}.".replace("\n", " ")

    def format_arguments(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Nothing: typer writes them with the options, click 8.5 would write them twice."""

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_help(ctx, formatter)
        # typer escapes brackets for rich, which does not print this.
        formatter.buffer[:] = [text.replace("\\[", "[") for text in formatter.buffer]


class Group(TyperGroup):
    """The commands, each with its first sentence."""

    command_class = Command
