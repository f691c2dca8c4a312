"""Text of others on the console: neither markup nor escape sequences of theirs are obeyed, and a message has an end."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.table import Table

from fedloom.cli.main import call
from fedloom.cli.show import Plain
from fedloom.cli.terminal import Terminal
from fedloom.errors import ConfigError, DataError, HubError

HOSTILE = ["a[/b]", "o[bold]x", "\x1b]0;title\x07", "\x9b31m", "lone \ud800", ":smile:", "\u202edesrever"]


def printed(what: object) -> str:
    console = Plain()
    console.file = io.StringIO()
    console.print(what, soft_wrap=True)
    return console.file.getvalue()


@pytest.mark.parametrize("text", HOSTILE)
def test_lines_and_cells_show_what_they_hold(text: str) -> None:
    table = Table(text)
    table.add_row(text)
    for out in (printed(text), printed(table)):
        assert not any(c in out for c in "\x1b\x07\x9b\ud800\u202e")
        out.encode()
    if text.isascii() and text.isprintable():
        assert printed(text).strip() == text


def test_a_dropped_client_may_give_any_reason(capsys: pytest.CaptureFixture[str]) -> None:
    record: dict[str, Any] = {
        "stage": "clients",
        "round": 1,
        "train_loss": None,
        "bytes_up": {},
        "bytes_down": {},
        "seconds": {"total": 1.0},
        "dropped": {text: text for text in HOSTILE},
    }
    console = Plain()
    console.file = io.StringIO()
    Terminal(console).round(record)
    out = console.file.getvalue()
    assert "client a[/b] dropped: a[/b]" in out and "\x1b" not in out and r"\x1b]0;title" in out


def test_a_message_is_printable_and_short() -> None:
    for error in (ConfigError, DataError, HubError):
        told = str(error("\x1b[2J got this\n" + "line\n" * 1000))
        assert told.startswith(r"\x1b[2J got this") and len(told.splitlines()) == 12
        assert len(str(error("x" * 10**6 + ": do that"))) < 2000 and str(error("x" * 10**6 + ": do that")).endswith(
            ": do that"
        )


@pytest.mark.parametrize("name", ["a[/b].toml", "\x1b]0;t\x07.toml", "lone\udcff.toml"])
def test_a_strange_name_is_one_message(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["run", name]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: there is no run file") and "\x1b" not in err
    assert "[/b]" in err or "[" not in name
