"""Tokenizers made here, so that the tests need no files: one that works on words, in the manner of BERT, Llama or GPT-2."""

from __future__ import annotations

from typing import Any

import pytest

WORDS = [f"w{i}" for i in range(50)]


def _tokenizer(special: list[str], template: str | None, pair: str | None, **named: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=special[0]))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if template is not None:
        pieces = [(x, vocabulary[x]) for x in special]
        core.post_processor = processors.TemplateProcessing(single=template, pair=pair, special_tokens=pieces)
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token=special[0], **named)


@pytest.fixture
def bert_tokenizer() -> Any:
    """[CLS] a [SEP] b [SEP], with token types and a padding token (id 1)."""
    tokenizer = _tokenizer(
        ["[UNK]", "[PAD]", "[CLS]", "[SEP]"],
        "[CLS] $A [SEP]",
        "[CLS] $A [SEP] $B:1 [SEP]:1",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tokenizer


@pytest.fixture
def llama_tokenizer() -> Any:
    """A start token (1), an end token (2), no padding token, and a chat template."""
    tokenizer = _tokenizer(["<unk>", "<s>", "</s>"], "<s> $A", "<s> $A $B", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}<s> {{ m['content'] }} </s>{% endfor %} w0"
    return tokenizer


@pytest.fixture
def gpt2_tokenizer() -> Any:
    """One special token (1) that ends texts, and none added to them."""
    return _tokenizer(["<unk>", "<|endoftext|>"], None, None, eos_token="<|endoftext|>")
