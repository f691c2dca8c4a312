"""An engine whose clients live in another process: it builds the method from its table, and only states cross."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from fedloom.checkpoint import ClientStates
from fedloom.core import Exchange, Failure, Method, Round, Trained, Work
from fedloom.engine import Answer, Job, Total
from fedloom.methods import build

from .cases import SITES, Case, engine

_START = "import sys; sys.path.insert(0, sys.argv[1]); from methods.elsewhere import work; work()"


def work() -> None:
    """The other process: open a round or go on with it, until the pipe closes."""
    pipe, out = sys.stdin.buffer, sys.stdout.buffer
    at, method, visits = engine(), None, None
    while True:
        try:
            kind, content = pickle.load(pipe)
        except EOFError:
            return
        if kind == "method":
            at, method = engine(), build(*content)
        elif kind == "round":
            visits = at.visits(method, Round(content, (), 0, SITES))  # type: ignore[arg-type]
        elif kind == "close":
            assert visits is not None
            visits.close(content)
        else:
            assert visits is not None
            pickle.dump(list(visits.run(content)), out)
            out.flush()


class Elsewhere:
    """The near end of the pipe: an engine."""

    def __init__(self) -> None:
        self.sites = SITES
        self.client_states = ClientStates()
        tests = Path(__file__).parents[1]
        self._far = subprocess.Popen(
            [sys.executable, "-c", _START, str(tests)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def tell(self, kind: str, content: Any) -> None:
        """Send one message."""
        assert self._far.stdin is not None
        pickle.dump((kind, content), self._far.stdin)
        self._far.stdin.flush()

    def begin(self, case: Case) -> None:
        """From now on the clients are new, and of this case's method, which is named and not sent."""
        name = case.table["name"].removeprefix("tests.")  # where the other process finds a test's own method
        self.tell("method", ({**case.table, "name": name}, case.lora()))

    def visits(self, method: Method, round: Round) -> _Visits:
        self.tell("round", round.t)
        return _Visits(self)

    def answers(self) -> list[Answer | Failure]:
        """What the other process sends back."""
        assert self._far.stdout is not None
        made: list[Answer | Failure] = pickle.load(self._far.stdout)
        return made

    def stop(self) -> None:
        """End the other process."""
        assert self._far.stdin is not None and self._far.stdout is not None
        self._far.stdin.close()
        self._far.wait(timeout=20)
        self._far.stdout.close()


class _Visits:
    def __init__(self, at: Elsewhere) -> None:
        self.at = at

    def exchange(self, jobs: Iterable[Job], x: Exchange[Any]) -> Iterator[Answer | Failure | Total]:
        self.at.tell("exchange", list(jobs))
        yield from self.at.answers()

    def serve(self, work: Work) -> Trained:
        raise AssertionError("these methods need no proxy data")

    def close(self, live: Collection[str]) -> None:
        self.at.tell("close", list(live))
