"""Architectures of transformers, tiny and random: trained, exported, and read by PEFT.

Every training is compared with the plainest one, of one client at a time on the readable path without checkpointing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from fedloom.core import Client, Work
from fedloom.data.batches import Encoded, Kind, collate
from fedloom.errors import ModelError
from fedloom.models.families import FAMILIES, family_of
from fedloom.models.huggingface import (
    all_linear,
    check_sites,
    default_targets,
    find_sites,
    head_group,
    head_modules,
    is_conv1d,
    load_base,
)
from fedloom.models.peft import whole_blocks, write_adapter
from fedloom.models.probe import probe
from fedloom.state import State
from fedloom.train.kernels.lora_linear import FusedLayers
from fedloom.train.kernels.packed_inputs import Packer
from fedloom.train.lora_linear import find_layers
from fedloom.train.optim import Settings
from fedloom.train.trainer import Trainer

VOCAB = 40

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 160,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_labels": 3,
}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    **MOE,
}
DEBERTA_V3 = {
    "relative_attention": True,
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 8,
    "position_biased_input": False,
}
OTHER: dict[str, dict[str, Any]] = {
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24},
    "electra": {"embedding_size": 8},
    "albert": {"embedding_size": 8},
    "convbert": {"embedding_size": 8},
    "deberta-v2": DEBERTA_V3,
    "mistral": {"sliding_window": 16},
    "gemma2": {"head_dim": 4, "sliding_window": 16},
    "gemma3_text": {"head_dim": 4, "sliding_window": 16},
    "gemma": {"head_dim": 4},
    "helium": {"head_dim": 4},
    "qwen3": {"head_dim": 4},
    "mixtral": MOE,
    "qwen3_moe": {"head_dim": 4, **MOE},
    "qwen2_moe": {"shared_expert_intermediate_size": 8, **MOE},
    "gpt_oss": {"head_dim": 4, "sliding_window": 16, **MOE},
    "llama4_text": {"head_dim": 4, **MOE},
    "phimoe": MOE,
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "opt": {"word_embed_proj_dim": 16, "ffn_dim": 24},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "canine": {"downsampling_rate": 2, "num_hash_buckets": 16},
    "llama 3.2": {
        "tie_word_embeddings": True,
        "rope_scaling": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 32,
        },
    },
    "nemotron_h": {
        "head_dim": 4,
        "hybrid_override_pattern": "M*",
        "mamba_num_heads": 4,
        "mamba_head_dim": 4,
        "ssm_state_size": 4,
        "n_groups": 1,
    },
    "layoutlm": {"max_2d_position_embeddings": 4},
}

CLASSIFIERS = (
    *("bert", "roberta", "xlm-roberta", "distilbert", "electra", "deberta", "deberta-v2", "albert", "modernbert"),
    *("llama", "gpt2", "qwen2"),
)
DECODERS = (
    *("gpt2", "llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "opt"),
    *("mixtral", "qwen3_moe", "gpt_oss", "gpt_neox", "olmo2", "falcon", "bloom", "starcoder2", "granite", "cohere"),
    *("glm", "deepseek_v2", "deepseek_v3", "mamba", "llama 3.2"),
)
MORE_CLASSIFIERS = (
    *("layoutlm", "esm", "convbert", "camembert", "mpnet", "ernie", "roformer", "rembert", "fnet"),
    *("mobilebert", "big_bird", "megatron-bert", "data2vec-text", "eurobert", "opt", "bloom", "gpt_neox", "flaubert"),
)
MORE_DECODERS = (
    *("gptj", "gpt_neo", "gpt_bigcode", "mpt", "codegen", "stablelm", "llama4_text", "rwkv", "biogpt", "xglm", "ctrl"),
    *("helium", "olmo", "cohere2", "qwen2_moe", "seed_oss", "glm4", "phimoe", "nemotron_h"),
)
# These call no block of transformers' that can be computed again.
NO_CHECKPOINTING = ("albert", "mpnet", "flaubert", "ctrl")
# FNet is refused; MobileBERT's written-out norms do not hold large random weights in bounds, and so no rounding of them.
NO_BFLOAT16 = ("fnet", "mobilebert")
TOLERANCE = 2e-5


def made(name: str, kind: Kind) -> Any:
    one = {"num_labels": 1, "problem_type": "regression"} if kind == "regression" else {}
    config = AutoConfig.for_model(name.partition(" ")[0], **(SMALL | OTHER.get(name, {}) | one))
    auto: Any = AutoModelForCausalLM if kind == "causal-lm" else AutoModelForSequenceClassification
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto.from_config(config)
        for x in model.parameters():  # from large weights, so that every adapter has something to do
            if x.ndim > 1:
                x.data.normal_(0, 0.15)
    return model.eval()


def rows(kind: Kind, length: int, seed: int) -> Encoded:
    """Four rows of a tenth less than `length` tokens at most."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(max(3, length * 9 // 10), length + 1, 4)
    return Encoded(
        tokens=rng.integers(3, VOCAB, lengths.sum()).astype(np.int32),
        offsets=np.concatenate(([0], np.cumsum(lengths))),
        pad_id=0,
        kind=kind,
        targets={"classification": rng.integers(0, 3, 4), "regression": rng.normal(size=4).astype(np.float32)}.get(
            kind
        ),
        starts=lengths // 2 if kind == "causal-lm" else None,
    )


def start(model: nn.Module, targets: list[str]) -> Work:
    g = torch.Generator().manual_seed(1)
    sites = find_sites(model, targets)
    state: State = {
        "A": {site: torch.randn(2, n, generator=g) * 0.3 for site, (_, n) in sites.items()},
        "B": {site: torch.randn(m, 2, generator=g) * 0.1 for site, (m, _) in sites.items()},
    }
    head = head_group(model)
    return Work(train=state | ({"head": head} if head else {}), scale=2.0)


def trained(
    model: nn.Module,
    work: Work,
    data: list[Encoded],
    *,
    together: bool,
    checkpointing: bool = False,
    kernels: Literal["auto", "off"] = "auto",
    dtype: torch.dtype = torch.float32,
) -> list[State]:
    """Each client's state after one step."""
    settings = Settings(local_steps=1, batch_size=4, lr=0.1, optimizer="sgd", checkpointing=checkpointing)
    works = [(Client(str(i), 4, 2), work) for i in range(len(data))]
    sites, heads = list(work.train["A"]), head_modules(model)
    with Trainer(model, sites, heads, settings=settings, kernels=kernels, dtype=dtype) as trainer:
        if together:
            return [done.state for done in trainer.fit(works, data, 1)]
        return [trainer.fit([w], [d], 1)[0].state for w, d in zip(works, data, strict=True)]


def packs(model: nn.Module, kind: Kind, sites: list[str]) -> bool:
    """Whether batches go without padding."""
    fused = FusedLayers.of(model, find_layers(model, sites))
    if fused is None:
        return False
    packer = Packer.of(model, kind, fused)
    fused.part()
    return packer is not None


def distance(one: State, two: State) -> float:
    return max(float((x - two[role][site]).abs().max()) for role, group in one.items() for site, x in group.items())


def logits_in_peft(model: Any, weights: dict[str, Tensor], path: Path, data: Encoded) -> Tensor:
    from peft import PeftModel

    fresh = type(model)(model.config)
    fresh.load_state_dict(weights)
    batch = collate([(data, np.arange(4))])
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(fresh, str(path)).eval()
        logits: Tensor = adapted(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return logits[batch.attention_mask.bool()] if data.kind == "causal-lm" else logits


@dataclass(frozen=True)
class Outcome:
    """What a check found: distances are largest absolute differences of trained tensors, or of logits."""

    targets: list[str]
    packed: bool
    together: bool
    checkpointing: bool
    from_plain: float
    from_peft: float


def check(name: str, kind: Kind, length: int, path: Path) -> Outcome:
    model = made(name, kind)
    weights = {key: x.clone() for key, x in model.state_dict().items()}
    targets = default_targets(model)
    work = start(model, targets)
    together = check_sites(model, work.train["A"])
    data = [rows(kind, length, seed) for seed in (1, 2)]
    plain = trained(model, work, data, together=False, kernels="off")
    assert distance(plain[0], work.train) > 1e-5
    checkpointing = name not in NO_CHECKPOINTING
    packed = packs(model, kind, list(work.train["A"]))
    assert packed == (kind in getattr(family_of(model), "packs", ()))
    from_plain = 0.0
    for again in (False, True) if checkpointing else (False,):
        states = trained(model, work, data, together=together, checkpointing=again)
        from_plain = max(from_plain, *(distance(one, two) for one, two in zip(plain, states, strict=True)))
    assert from_plain < TOLERANCE
    A, B, head = (plain[0].get(role, {}) for role in ("A", "B", "head"))
    write_adapter(
        path,
        A=A,
        B=B,
        alpha=4.0,
        rank=2,
        rslora=False,
        targets=targets,
        base_name="base",
        kind=kind,
        head=whole_blocks(model, head),
        fan_in_fan_out=any(is_conv1d(model.get_submodule(site)) for site in A),
    )
    batch = collate([(data[0], np.arange(4))])
    after = Work(train=plain[0], scale=2.0)
    with Trainer(model, list(A), head_modules(model)) as trainer, torch.no_grad(), trainer.loaded(after, data[0]) as m:
        ours = m(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    ours = ours[batch.attention_mask.bool()] if kind == "causal-lm" else ours
    theirs = logits_in_peft(model, weights, path, data[0])
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(x, weights[key]) for key, x in model.state_dict().items())  # given back as it was
    return Outcome(targets, packed, together, checkpointing, from_plain, float((ours - theirs).abs().max()))


@pytest.mark.parametrize("length", [9, 100], ids=["short", "long"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers(name: str, length: int, tmp_path: Path) -> None:
    check(name, "classification", length, tmp_path)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("classification", name) for name in CLASSIFIERS + MORE_CLASSIFIERS if name not in NO_BFLOAT16),
        *(("causal-lm", name) for name in DECODERS + MORE_DECODERS),
    ],
)
def test_in_bfloat16_a_step_is_what_it_is_in_float32(kind: Kind, name: str) -> None:
    """Of the same rounded weights, up to the rounding of what is computed from them."""
    model = made(name, kind).bfloat16()
    work = start(model, default_targets(model))
    data = [rows(kind, 9, seed) for seed in (1, 2)]
    ours = trained(model, work, data, together=check_sites(model, work.train["A"]), dtype=torch.bfloat16)
    wanted = trained(model, work, data, together=False, kernels="off")
    for one, two in zip(ours, wanted, strict=True):
        made_of = [torch.cat([(s[r][x] - work.train[r][x]).flatten() for r in s for x in s[r]]) for s in (one, two)]
        assert (
            float((made_of[0] - made_of[1]).norm()) < 0.25 * float(made_of[1].norm()) and float(made_of[1].norm()) > 0
        )


@pytest.mark.parametrize("name", ["xlm-roberta", "modernbert"])
def test_regression(name: str, tmp_path: Path) -> None:
    check(name, "regression", 9, tmp_path)


@pytest.mark.parametrize("length", [9, 100], ids=["short", "long"])
@pytest.mark.parametrize("name", DECODERS)
def test_decoders(name: str, length: int, tmp_path: Path) -> None:
    check(name, "causal-lm", length, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("length", [9, 100], ids=["short", "long"])
@pytest.mark.parametrize("name", MORE_CLASSIFIERS)
def test_more_classifiers(name: str, length: int, tmp_path: Path) -> None:
    check(name, "classification", length, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("length", [9, 100], ids=["short", "long"])
@pytest.mark.parametrize("name", MORE_DECODERS)
def test_more_decoders(name: str, length: int, tmp_path: Path) -> None:
    check(name, "causal-lm", length, tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_name_in_a_record_is_one_of_the_model(name: str) -> None:
    family = FAMILIES[name]
    causal = name in DECODERS + MORE_DECODERS
    model = made(name, "causal-lm" if causal else "classification")
    assert family_of(model) is family
    names = {path.rpartition(".")[2] for path, _ in model.named_modules()}
    assert set(find_sites(model, default_targets(model))) and set(default_targets(model)) <= set(family.targets)
    siblings = {layer for group in family.siblings for layer in group}
    assert not siblings or siblings & names
    assert not family.reader or family.reader in names


def test_default_targets_are_those_of_peft() -> None:
    """Of every text model that PEFT names; of phi, LoRA's own two, of deepseek's kin nothing is said there."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as THEIRS

    # Encoder-decoders are refused, those with images are no text models, and of the rest transformers has no code.
    apart = {
        "t5",
        "mt5",
        "bart",
        "blip-2",
        "llama4",
        "gemma4",
        "chatglm",
        "RefinedWebModel",
        "RefinedWeb",
        "btlm",
        "rwkv7",
    }
    for name in THEIRS.keys() - apart - {"phi"}:
        assert FAMILIES[name].targets == tuple(THEIRS[name]), name


def test_recomputing_is_refused_before_training() -> None:
    model = made("albert", "classification")
    with pytest.raises(ModelError, match="cannot recompute activations: set checkpointing = false"):
        Trainer(model, find_sites(model, ["query"]), settings=Settings(checkpointing=True))


def test_a_model_that_cannot_compute_in_its_dtype_is_told_before_training() -> None:
    fnet = made("fnet", "classification").bfloat16()  # whose Fourier transform has no such kernel
    with pytest.raises(ModelError, match=r'in bfloat16: .*; set model\.dtype = "float32", or choose another model$'):
        default_targets(fnet)


def test_a_layer_that_all_rows_share_trains_one_client_at_a_time() -> None:
    model = made("deberta-v2", "classification")
    assert not check_sites(model, find_sites(model, ["query_proj"]))  # reads relative positions too
    assert check_sites(model, find_sites(model, ["intermediate.dense"]))
    fnet = made("fnet", "classification")  # mixes padding into its tokens
    assert not check_sites(fnet, find_sites(fnet, default_targets(fnet)))


@pytest.mark.parametrize(
    ("name", "kind", "target", "why"),
    [
        ("mamba", "causal-lm", "dt_proj", "is not called"),
        ("mamba", "causal-lm", "out_proj", "in PEFT neither"),
        ("llama4_text", "causal-lm", "router", "returns more than a product"),
        ("esm", "classification", "regression", "is not called"),
    ],
)
def test_layers_that_can_carry_no_adapter(name: str, kind: Kind, target: str, why: str) -> None:
    model = made(name, kind)
    with pytest.raises(ModelError, match=f"{target}'.* {why}.*targets in \\[lora\\]") as caught:
        check_sites(model, find_sites(model, [target]))
    assert "\n" not in str(caught.value)
    assert not any(x.endswith(target) for x in all_linear(model))


def test_rows_that_are_not_one_after_the_other() -> None:
    config = AutoConfig.for_model("xlnet", vocab_size=VOCAB, d_model=16, n_layer=1, n_head=4, d_inner=24, num_labels=3)
    model = AutoModelForSequenceClassification.from_config(config).eval()  # time first
    assert set(probe(model, find_sites(model, ["layer_1", "layer_2"])).obstacles.values()) == {
        "does not get the rows of a batch one after the other"
    }
    with pytest.raises(ModelError, match="no linear layer that can carry an adapter"):
        default_targets(model)


def test_every_linear_layer() -> None:
    assert all_linear(made("llama", "causal-lm")) == [
        *("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    ]
    assert all_linear(made("bert", "classification")) == ["dense", "key", "query", "value"]
    assert "ffn.0" in all_linear(made("ctrl", "causal-lm"))  # "0" would be every block, too


@pytest.mark.parametrize(
    ("name", "kind", "why"),
    [
        ("t5", "classification", "is an encoder-decoder"),
        ("bart", "causal-lm", "is an encoder-decoder"),
        ("deberta", "causal-lm", "cannot be used for causal-lm: transformers has no AutoModelForCausalLM of it"),
        ("mamba", "classification", "cannot be used for classification"),
    ],
)
def test_architectures_without_the_task(name: str, kind: Kind, why: str, tmp_path: Path) -> None:
    AutoConfig.for_model(name).save_pretrained(str(tmp_path))
    with pytest.raises(ModelError, match=why) as caught:
        load_base(str(tmp_path), kind=kind)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)
