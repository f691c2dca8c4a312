"""What is put around a row's text before a causal LM reads it: a name, or a text with the columns' names in braces."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedloom.errors import DataError, nearest
from fedloom.text import shown

TEMPLATES = {
    "plain": "{prompt}\n",
    "question": "Question: {prompt}\nAnswer: ",
    "alpaca": "### Instruction:\n{prompt}\n\n### Response:\n",
}
"""What is put around a prompt; the answer follows. `chat` stands for the tokenizer's own chat template."""
CHAT = "chat"
_PLACE = re.compile(r"\{([^\W\d]\w*)\}")
_RESPONSE, _END = "{response}", "{end}"


@dataclass(frozen=True)
class Template:
    """A template, read."""

    before: str
    """Text before the answer."""
    after: str | None = None
    """Text behind the answer, of a template that holds {response}: row and answer are then tokenised as one text. None: the
    answer is tokenised by itself."""
    end: bool = True
    """Whether the end token follows."""

    def columns(self, prompt: str) -> list[str]:
        """The columns that it reads before the answer; `prompt` is the one that {prompt} stands for."""
        return list(dict.fromkeys(prompt if name == "prompt" else name for name in _PLACE.findall(self.before)))

    def fill(self, rows: Mapping[str, Sequence[Any]], prompt: str) -> list[str]:
        """The text before the answer of every row (column -> values)."""
        columns = self.columns(prompt)

        def filled(values: tuple[Any, ...]) -> str:
            row = dict(zip(columns, values, strict=True))
            # In one pass: what a row holds is text, even if it has braces.
            return _PLACE.sub(lambda place: str(row[prompt if place[1] == "prompt" else place[1]]), self.before)

        return [filled(values) for values in zip(*(rows[column] for column in columns), strict=True)]


def read(template: str | None) -> Template:
    """A template by its name, or from its text; None is `plain`. Raises DataError for one without any column's name.

    >>> read("### Question: {question} {context} ### Answer: {response}").columns("prompt")
    ['question', 'context']
    """
    form = TEMPLATES.get(template or "plain", template or "")
    before, has_response, after = form.partition(_RESPONSE)
    if not _PLACE.search(before):
        raise DataError(
            f"got template {shown(form)}, expected {', '.join(TEMPLATES)}, {CHAT}, or a string with {{prompt}} or other "
            f"columns' names in it{nearest(form, [*TEMPLATES, CHAT])}"
        )
    if not has_response:
        return Template(before)
    return Template(before, after.replace(_END, ""), _END in after)
