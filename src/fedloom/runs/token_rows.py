"""Token rows of a run, made when they are first asked for: what a client trains on, and what models are scored on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fedloom.data import choices
from fedloom.data.chat import encode_chats
from fedloom.data.choices import Choices
from fedloom.data.tokenize import Encoded, encode_causal, encode_labelled
from fedloom.runs.canaries import Canaries
from fedloom.runs.config import RunConfig
from fedloom.runs.tables import Tables

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Rows:
    """Token rows of a run, made when they are first asked for: a node has no use for all of them."""

    config: RunConfig
    tables: Tables
    tokenizer: Any
    max_length: int
    """Tokens of a row, prompt and answer."""
    canaries: Canaries | None = None

    def _encode(self, rows: Dataset) -> Encoded:
        task, most = self.config.task, self.max_length
        if self.tables.chats:
            return encode_chats(rows, self.tokenizer, self.tables.text[0], most)
        if task.kind == "causal-lm":
            return encode_causal(rows, self.tokenizer, task.prompt, task.response, task.template, most)
        labels = self.tables.labels or None
        return encode_labelled(rows, self.tokenizer, self.tables.text, task.label, labels, most, task.kind)

    @cached_property
    def train(self) -> Encoded:
        rows = self._encode(self.tables.train)
        return rows if self.canaries is None else self.canaries.labelled(rows)

    @cached_property
    def eval(self) -> Encoded:
        return self._encode(self.tables.eval)

    @cached_property
    def common_answers(self) -> Encoded:
        """A row for each answer that a common held-out row chooses from."""
        assert self.tables.choices is not None, "task.choices was checked"
        return self.answers(self.tables.eval, self.tables.choices)

    def answers(self, table: Dataset, found: Choices) -> Encoded:
        """A row for each answer that a row of the table chooses from, without end token."""
        task = self.config.task
        rows = choices.expanded(table, task.response, found)
        return encode_causal(
            rows, self.tokenizer, task.prompt, task.response, task.template, self.max_length, end=False
        )

    @cached_property
    def proxy(self) -> Encoded | None:
        return None if self.tables.proxy is None else self._encode(self.tables.proxy)

    def encode(self) -> None:
        """Make all of them now. Raises DataError for a row that cannot be tokenised, or whose label is unknown."""
        _ = self.train, self.eval, self.proxy
