"""The blocks of a model, and adapters in some of them: in PEFT too, for whatever the layers are called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from fedloom.errors import ConfigError, ModelError
from fedloom.models.blocks import below, find_blocks, sites_in
from fedloom.models.huggingface import default_targets, find_sites, head_group, is_conv1d
from fedloom.models.peft import write_adapter

SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_local_experts": 12, "num_experts_per_tok": 2, "num_key_value_heads": 2}  # as many experts as blocks


def tiny(name: str, blocks: int = 12) -> nn.Module:
    classifier = name in ("bert", "albert", "deberta-v2", "flaubert")
    config = AutoConfig.for_model(name, num_hidden_layers=blocks, **SMALL, **(MOE if name == "mixtral" else {}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        auto: Any = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
        model: nn.Module = auto.from_config(config)
    return model.eval()


@pytest.mark.parametrize("name", ["bert", "gpt2", "mixtral"])
def test_chosen_layers_alone_are_adapted_in_peft(name: str, tmp_path: Path) -> None:
    """Block 1 is not block 10, nor expert 1; the logits are those of weights changed by hand."""
    from peft import PeftModel

    model = tiny(name)
    targets = ["c_fc", "c_attn"] if name == "gpt2" else ["w1", "q_proj"] if name == "mixtral" else ["query", "dense"]
    found = [x for x in targets if any(n.endswith(f".{x}") for n, _ in model.named_modules())]
    sites = sites_in(model, find_sites(model, found), [1, 11])
    blocks = find_blocks(model)
    assert len(blocks) == 12 and {n for n in blocks if any(s.startswith(f"{n}.") for s in sites)} == {
        blocks[1],
        blocks[11],
    }
    g = torch.Generator().manual_seed(1)
    A = {s: torch.randn(2, n, generator=g) for s, (_, n) in sites.items()}
    B = {s: torch.randn(m, 2, generator=g) for s, (m, _) in sites.items()}
    modules = dict(model.named_modules())
    turned = any(is_conv1d(modules[s]) for s in sites)
    write_adapter(
        tmp_path,
        A=A,
        B=B,
        alpha=2.0,
        rank=2,
        rslora=False,
        targets=list(sites),
        base_name="base",
        kind="classification" if name == "bert" else "causal-lm",
        head=head_group(model),
        fan_in_fan_out=turned,
    )
    ids = torch.randint(3, 40, (2, 7), generator=g)
    with torch.no_grad():
        for s in sites:
            change = B[s] @ A[s]
            modules[s].get_parameter("weight").add_(change.T if is_conv1d(modules[s]) else change)
        ours = model(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(tiny(name), str(tmp_path)).eval()
        theirs = adapted(input_ids=ids).logits
    assert {k.split(".lora_A")[0].removeprefix("base_model.model.") for k in adapted.state_dict() if "lora_A" in k} == {
        *sites
    }
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_halves_and_what_is_below() -> None:
    model = tiny("gpt2", 5)
    sites = find_sites(model, default_targets(model))
    upper, lower = sites_in(model, sites, "upper half"), sites_in(model, sites, "lower half")
    assert [s.split(".")[2] for s in upper] == ["2", "3", "4"] and {**lower, **upper} == sites
    assert below(model, upper) == ["transformer.h.0", "transformer.h.1"]
    assert below(model, sites) == below(model, []) == below(model, [*upper, "lm_head"]) == []
    assert sites_in(model, sites, "all") is sites


@pytest.mark.parametrize("name", ["albert", "flaubert"])
def test_blocks_that_cannot_be_told(name: str) -> None:
    model = tiny(name, 3)
    sites = find_sites(model, ["query"] if name == "albert" else ["q_lin"])
    with pytest.raises(ModelError, match=r"cannot be told: .*set layers"):
        sites_in(model, sites, "upper half")
    assert below(model, sites) == []


def test_what_is_not_there() -> None:
    model = tiny("bert", 3)
    sites = find_sites(model, ["query"])
    with pytest.raises(ConfigError, match=r"block 3, but this BertForSequenceClassification has 3: expected 0 to 2"):
        sites_in(model, sites, [0, 3])
    with pytest.raises(ConfigError, match="none of the layers named in targets is there"):
        sites_in(model, {"bert.pooler.dense": (16, 16)}, "upper half")


@pytest.mark.parametrize("layers", [[], [-1], [True], [1, 1], [1.0], "upper", 3])
def test_what_is_no_choice_of_blocks(layers: Any, settings: Callable[..., dict[str, Any]]) -> None:
    from fedloom.runs.config import parse

    with pytest.raises(
        ConfigError, match=r"lora.layers: got .*, expected 'all', 'upper half', 'lower half', or numbers"
    ):
        parse(settings(lora={"layers": layers}), "it")
