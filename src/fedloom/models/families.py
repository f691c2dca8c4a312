"""What fedloom knows of a model family: one record per architecture of transformers, by its `model_type`.

A record is an option, never a condition: a family without one is adapted where the run file says (`targets`) and trains on the
readable path, padded. DeepSeek-LLM and SmolLM2 are `llama`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from fedloom.data.batches import Kind


@dataclass(frozen=True, kw_only=True)
class Family:
    """The facts of one architecture."""

    targets: tuple[str, ...]
    """Name endings of the layers that the LoRA papers adapt, or PEFT by default; those that a model has of them."""
    siblings: tuple[tuple[str, ...], ...] = ()
    """Names of layers that one module calls on the same input, in this order: they can be one matrix product."""
    packs: frozenset[Kind] = frozenset()
    """Tasks whose batches may be packed: its attention takes transformers' interface, and no more than `attend` knows of."""
    changes_scores: bool = False
    """Whether its attention caps scores, or has a sink beside them: no fused kernel does that."""
    reader: str = ""
    """The module of a packed encoder that reads the first token of each row."""
    positions_follow_padding: bool = False
    """Whether position ids start at the padding token's id + 1, as fairseq counts, and not at 0."""


_ROWS = frozenset[Kind]({"classification", "regression"})
_BERT = Family(targets=("query", "value"), siblings=(("query", "key", "value"),), packs=_ROWS, reader="pooler")
_ROBERTA = Family(
    targets=("query", "value"),
    siblings=(("query", "key", "value"),),
    packs=_ROWS,
    reader="classifier",
    positions_follow_padding=True,
)
_LLAMA = Family(
    targets=("q_proj", "v_proj"),
    siblings=(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")),
    packs=frozenset({"causal-lm"}),
)
_QKV = ("q_proj", "k_proj", "v_proj")
_PADDED_LLAMA = Family(targets=_LLAMA.targets, siblings=_LLAMA.siblings)
_FUSED_QKV = Family(targets=("query_key_value",))

FAMILIES = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "electra": Family(targets=("query", "value"), siblings=(("query", "key", "value"),)),
    "distilbert": Family(targets=("q_lin", "v_lin")),
    "deberta": Family(targets=("in_proj",)),
    "deberta-v2": Family(targets=("query_proj", "value_proj")),
    "albert": Family(targets=("query", "value"), siblings=(("query", "key", "value"),)),
    "modernbert": Family(targets=("Wqkv",)),
    "gpt2": Family(targets=("c_attn",), packs=frozenset({"causal-lm"})),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3"), _LLAMA),
    **dict.fromkeys(("gemma", "gemma3_text", "olmo", "olmo2", "granite", "cohere", "cohere2"), _PADDED_LLAMA),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "stablelm", "seed_oss", "helium"), _PADDED_LLAMA),
    **dict.fromkeys(("gemma2", "gpt_oss"), replace(_LLAMA, changes_scores=True)),
    **dict.fromkeys(("phi", "opt", "starcoder2", "glm", "glm4"), Family(targets=_LLAMA.targets, siblings=(_QKV,))),
    **dict.fromkeys(("gptj", "gpt_neo"), Family(targets=_LLAMA.targets)),
    **dict.fromkeys(("phi3", "codegen"), Family(targets=("qkv_proj",))),
    **dict.fromkeys(("falcon", "bloom", "gpt_neox"), _FUSED_QKV),
    "mpt": Family(targets=("Wqkv",)),
    "gpt_bigcode": Family(targets=("c_attn",)),
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3"), Family(targets=("q_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"))
    ),
    "layoutlm": Family(targets=("query", "value"), siblings=(("query", "key", "value"),)),
    "llama4_text": Family(targets=_LLAMA.targets, siblings=(_QKV,)),
    "rwkv": Family(targets=("key", "value", "receptance", "output")),
    "nemotron_h": Family(targets=("q_proj", "k_proj", "v_proj", "o_proj")),
    "mamba": Family(targets=("in_proj", "x_proj")),
}
"""`config.model_type` -> its record."""


def model_type(model: nn.Module) -> str:
    """transformers' name of the architecture; that of the class for any other module."""
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def family_of(model: nn.Module) -> Family | None:
    """The record of the model's architecture, if there is one."""
    return FAMILIES.get(model_type(model))


def first_position(model: nn.Module) -> int:
    """The position id of a row's first token."""
    family = family_of(model)
    if family is None or not family.positions_follow_padding:
        return 0
    return int(getattr(getattr(model, "config", None), "pad_token_id", 0)) + 1
