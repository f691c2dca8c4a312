"""Bases in 4 and 8 bits: the codes are bitsandbytes', and what is trained on them is what PEFT trains."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedloom import lora
from fedloom.core import Client, State, Work
from fedloom.data.batches import Encoded, Kind, collate
from fedloom.errors import ModelError
from fedloom.models import code_cache, peft, quantised
from fedloom.models.huggingface import adopt, default_targets, find_sites, load_base
from fedloom.models.quantised import Quantization
from fedloom.rng import generator
from fedloom.train.optim import Settings
from fedloom.train.trainer import Trainer

pytest.importorskip("bitsandbytes")

HOW: list[Quantization] = ["nf4", "nf4-double", "int8"]
WORDS = 50


def tiny(family: str) -> Any:
    """A tiny random model; 96 is no multiple of a block of 64, so that blocks go over the ends of rows."""
    import transformers as tf

    small: dict[str, Any] = {"vocab_size": WORDS, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= {"initializer_range": 0.2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if family == "llama":
            return tf.LlamaForCausalLM(tf.LlamaConfig(**small, num_key_value_heads=2, intermediate_size=96))
        if family == "gpt2":
            return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=WORDS, n_positions=64, n_embd=64, n_layer=2, n_head=4))
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return tf.BertForSequenceClassification(
            tf.BertConfig(**small, **still, intermediate_size=96, num_labels=3, max_position_embeddings=64)
        )


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[str], str]:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    def save(family: str) -> str:
        path = tmp_path / family
        tiny(family).save_pretrained(str(path))
        core = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
        PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>").save_pretrained(str(path))
        return str(path)

    return save


def theirs(source: str, how: Quantization, kind: Kind, dtype: torch.dtype = torch.float32, head: bool = False) -> Any:
    """What transformers and bitsandbytes make of a directory."""
    import transformers as tf

    four = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_use_double_quant": how == "nf4-double",
    }
    # By default it quantises BERT's classifier, too.
    keep = {"llm_int8_skip_modules": ["none" if head else "lm_head" if kind == "causal-lm" else "classifier"]}
    config = tf.BitsAndBytesConfig(**({"load_in_8bit": True} if how == "int8" else four), **keep)
    loader: Any = tf.AutoModelForCausalLM if kind == "causal-lm" else tf.AutoModelForSequenceClassification
    labels = {} if kind == "causal-lm" else {"num_labels": 3}
    return loader.from_pretrained(source, quantization_config=config, dtype=dtype, device_map={"": "cpu"}, **labels)


def rows(kind: Kind) -> Encoded:
    rng = np.random.default_rng(0)
    lengths = np.array([9, 5, 12])
    return Encoded(
        tokens=rng.integers(3, WORDS, lengths.sum()).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        pad_id=0,
        kind=kind,
        targets=rng.integers(0, 3, 3) if kind == "classification" else None,
        starts=np.array([3, 2, 5]) if kind == "causal-lm" else None,
    )


def gradient_in_peft(model: nn.Module, state: State, data: Encoded, targets: list[str]) -> State:
    """Of the mean loss, by PEFT and autograd, in training mode, in which bitsandbytes rounds no inputs."""
    from peft import LoraConfig, get_peft_model

    adapted: Any = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))  # type: ignore[arg-type]
    adapted.train()
    leaves: dict[tuple[str, str], nn.Parameter] = {}
    for role in ("A", "B"):
        for site, x in state[role].items():
            leaves[role, site] = adapted.get_parameter(f"base_model.model.{site}.lora_{role}.default.weight")
            leaves[role, site].data.copy_(x)
    batch = collate([(data, np.arange(3))])
    made = adapted(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    if data.kind == "classification":
        loss = nn.functional.cross_entropy(made, torch.from_numpy(data.targets))
    else:
        assert data.starts is not None
        where = [(i, j) for i in range(3) for j in range(data.starts[i], data.lengths[i])]
        row, column = torch.tensor(where).T
        loss = nn.functional.cross_entropy(made[row, column - 1], batch.input_ids[row, column])
    found = torch.autograd.grad(loss, list(leaves.values()))
    made_state: State = {"A": {}, "B": {}}
    for (role, site), x in zip(leaves, found, strict=True):
        made_state[role][site] = x
    return made_state


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_gradients_are_those_of_peft_on_the_same_base(
    saved: Callable[[str], str], family: str, how: Quantization
) -> None:
    kind: Kind = "causal-lm" if family == "llama" else "classification"
    source = saved(family)
    base = load_base(source, kind=kind, num_labels=3, quantization=how)
    reference = theirs(source, how, kind)
    targets = [*default_targets(base.model), "down_proj" if family == "llama" else "intermediate.dense"]
    sites = find_sites(base.model, targets)
    state = lora.init(sites, 4, generator(0, "quantised"))
    state["B"] = {s: torch.randn(x.shape, generator=generator(0, s)) * 0.1 for s, x in state["B"].items()}
    wanted = gradient_in_peft(reference, state, rows(kind), targets)
    head = {"head": base.head_weights} if base.head else {}
    settings = Settings(optimizer="sgd", lr=1.0, batch_size=3, local_steps=1, clip=None)
    for kernels in ("auto", "off"):
        with Trainer(base.model, sites, base.head, settings=settings, kernels=kernels) as trainer:
            work = Work(train=state | head, scale=2.0)
            trainer.evaluate(work, rows(kind))  # leaves the codes as they are
            (made,) = trainer.fit([(Client("a", 3, 4), work)], [rows(kind)], 1)
        for role in ("A", "B"):
            for site, x in wanted[role].items():
                step = state[role][site] - made.state[role][site]
                torch.testing.assert_close(step, x, rtol=0, atol=1e-5 * float(x.abs().max()))


@pytest.mark.parametrize("how", ["nf4-double", "int8"])
def test_a_saved_quantised_checkpoint_is_the_same_base(
    saved: Callable[[str], str], tmp_path: Path, how: Quantization
) -> None:
    source = saved("llama")
    ours = load_base(source, kind="causal-lm", quantization=how)
    stored = str(tmp_path / "stored")
    theirs(source, how, "causal-lm").save_pretrained(stored)
    ours.tokenizer.save_pretrained(stored)
    base = load_base(stored, kind="causal-lm")
    assert base.quantization is not None and "bitsandbytes" in base.quantization and base.sha256 != ours.sha256
    layers = quantised.quantised(base.model)
    assert layers.keys() == quantised.quantised(ours.model).keys() and len(layers) == 14
    for name, layer in layers.items():
        assert torch.equal(quantised.dense(layer), quantised.dense(ours.model.get_submodule(name)))
    with pytest.raises(ModelError, match=r"quantised already \(bitsandbytes .*take model.quantization out"):
        load_base(stored, kind="causal-lm", quantization=how)


def test_a_model_given_quantised_is_taken_over(saved: Callable[[str], str]) -> None:
    """bitsandbytes' own layers change the order of their codes in a first pass without gradients, and have none afterwards."""
    source = saved("llama")
    ours = load_base(source, kind="causal-lm", dtype=torch.bfloat16, quantization="nf4")
    given = theirs(source, "nf4", "causal-lm", torch.bfloat16).eval()
    with torch.no_grad():
        given.model.layers[0].self_attn.q_proj(torch.ones(2, 64, dtype=torch.bfloat16))
    base = adopt(given, ours.tokenizer, kind="causal-lm")
    for name, layer in quantised.quantised(ours.model).items():
        made = quantised.dense(base.model.get_submodule(name))
        # Those scales are in bfloat16 since.
        torch.testing.assert_close(made, quantised.dense(layer), rtol=0.01, atol=0)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_merged_model_is_dense_and_computes_the_same(
    saved: Callable[[str], str], tmp_path: Path, family: str
) -> None:
    import transformers as tf

    base = load_base(saved(family), kind="causal-lm", quantization="nf4-double")
    sites = find_sites(base.model, default_targets(base.model))
    state = lora.init(sites, 2, generator(0, "merge"))
    state["B"] = {s: torch.randn(x.shape, generator=generator(0, s)) * 0.1 for s, x in state["B"].items()}
    ids = torch.tensor([[3, 9, 4, 7, 20]])
    with (
        Trainer(base.model, sites) as trainer,
        torch.no_grad(),
        trainer.loaded(Work(train=state, scale=1.5), rows("causal-lm")) as adapted,
    ):
        wanted = adapted(input_ids=ids).logits.clone()
    peft.merge(base.model, state["A"], state["B"], 1.5, {}, None, tmp_path / "merged")
    made: Any = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(made.config, "quantization_config") and not quantised.quantised(made)
    with torch.no_grad():
        torch.testing.assert_close(made(input_ids=ids).logits, wanted, rtol=0, atol=1e-4)


def test_codes_take_the_memory_that_they_say(saved: Callable[[str], str]) -> None:
    source, bits = saved("llama"), {}
    for how in (None, *HOW):
        model = load_base(source, kind="causal-lm", dtype=torch.bfloat16, quantization=how).model
        layers = {n: x for n, x in model.named_modules() if isinstance(x, nn.Linear) and n != "lm_head"}
        count = sum(x.in_features * x.out_features for x in layers.values())
        assert quantised.parameters(model) == sum(x.numel() for x in tiny("llama").parameters())
        rest = quantised.parameters(model) - count
        bits[how] = 8 * (quantised.bytes_of(model, torch.bfloat16) - 2 * rest) / count
    assert bits[None] == 16 and bits["nf4"] == 4.5
    assert 4.125 < bits["nf4-double"] < 4.3 and 8 < bits["int8"] < 8.6  # a float32 scale for each row of 64


def raising(error: Exception) -> Callable[..., Any]:
    def fails(*given: Any, **named: Any) -> Any:
        raise error

    return fails


def test_what_cannot_be_is_said(saved: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved("bert")
    theirs(source, "int8", "classification", head=True).save_pretrained(str(tmp_path / "head"))
    load_base(source, kind="classification", num_labels=3).tokenizer.save_pretrained(str(tmp_path / "head"))
    with pytest.raises(ModelError, match=r"task head of model .* \(classifier\) is quantised"):
        load_base(str(tmp_path / "head"), kind="classification", num_labels=3)
    config = Path(saved("llama")) / "config.json"
    values = json.loads(config.read_text()) | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    config.write_text(json.dumps(values))
    with pytest.raises(ModelError, match=r"quantised \(gptq\), and what reads that is not installed"):
        load_base(str(config.parent), kind="causal-lm")
    with monkeypatch.context() as patch:  # as transformers 5 says of HQQ where that is installed
        not_yet = raising(NotImplementedError("HQQ is not available yet"))
        patch.setattr("transformers.AutoModelForCausalLM.from_pretrained", not_yet)
        with pytest.raises(ModelError, match=r"and this transformers cannot read that: HQQ is not available yet"):
            load_base(str(config.parent), kind="causal-lm")
    (tmp_path / "model.gguf").write_text("x")
    with pytest.raises(ModelError, match=r"model.gguf cannot be read as a GGUF model"):
        load_base(str(tmp_path / "model.gguf"), kind="causal-lm")
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(ModelError, match=r"needs bitsandbytes.*pip install 'fedloom\[quantized\]'"):
        load_base(source, kind="classification", num_labels=3, quantization="nf4")


class Tenths(nn.Module):
    """A layer as other libraries have: no nn.Linear, and integers for weights."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = layer.out_features, layer.in_features
        self.register_buffer("qweight", (layer.weight.detach() * 10).round().to(torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.get_buffer("qweight").to(x.dtype) / 10)


def test_layers_of_other_libraries_are_adapted_on_the_readable_path() -> None:
    model, dense = tiny("llama"), tiny("llama")
    for name, layer in dict(model.named_modules()).items():
        if name.endswith("v_proj"):
            model.set_submodule(name, Tenths(layer))
            dense.get_submodule(name).weight.data = model.get_submodule(name)(torch.eye(64)).T.contiguous()
    sites = find_sites(model, ["q_proj", "v_proj"])
    assert sites == find_sites(dense, ["q_proj", "v_proj"])
    work = Work(train=lora.init(sites, 2, generator(0, "x")))
    made = []
    for each in (model, dense):
        with Trainer(each, sites, settings=Settings(batch_size=3, lr=0.01, local_steps=2)) as trainer:
            made.append(trainer.fit([(Client("a", 3, 2), work)], [rows("causal-lm")], 1)[0])
    assert made[0].loss == pytest.approx(made[1].loss, rel=1e-5)
    with pytest.raises(ModelError, match="a layer is a Tenths, whose codes fedloom cannot make dense"):
        quantised.dense(model.get_submodule("model.layers.0.self_attn.v_proj"))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_codes_are_made_once(
    how: Quantization, family: str, saved: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second start reads the same codes, and no dense weight of a coded layer; a damaged file is made anew."""
    monkeypatch.setenv("FEDLOOM_CACHE", str(tmp_path / "cache"))
    source, told = saved(family), list[str]()
    kind: Kind = "classification" if family == "bert" else "causal-lm"

    def start() -> Any:
        return load_base(source, kind=kind, num_labels=3, quantization=how, on_status=told.append)

    def dense(base: Any) -> dict[str, torch.Tensor]:
        layers = quantised.quantised(base.model)
        return {name: layer.dense(torch.float32).clone() for name, layer in layers.items()}

    first = start()
    wanted, coding = dense(first), f"coding the base in {how} (kept for the next start)"
    assert len(wanted) > 5 and told.count(coding) == 1
    (file,) = (tmp_path / "cache" / "codes").glob("*.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(quantised, "_nf4", None)
        patch.setattr(quantised, "_int8", None)
        second = start()
    assert second.sha256 == first.sha256 and told.count(coding) == 1
    for name, layer in quantised.quantised(second.model).items():
        one = quantised.quantised(first.model)[name]
        assert torch.equal(layer.weight, one.weight) and layer.codes.tensors().keys() == one.codes.tensors().keys()
        assert all(torch.equal(x, one.codes.tensors()[part]) for part, x in layer.codes.tensors().items())
    assert all(torch.equal(x, wanted[name]) for name, x in dense(second).items())
    assert quantised.bytes_of(second.model, torch.float32) == quantised.bytes_of(first.model, torch.float32)
    del second, layer
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    assert all(torch.equal(x, wanted[name]) for name, x in dense(start()).items())
    assert told.count(coding) == 2
    assert [path.suffix for path in sorted((tmp_path / "cache" / "codes").iterdir())] == [".safetensors", ".sha256"]


def test_codes_of_other_weights_kinds_and_dtypes_are_other_files(saved: Callable[[str], str], tmp_path: Path) -> None:
    places = {
        code_cache.place(sha, how, dtype, device, keep)
        for sha in "ab"
        for how in HOW
        for dtype in (torch.float32, torch.bfloat16)
        for device in ("cpu", "cuda:0")
        for keep in ([], ["head"])
    }
    assert len(places) == 2 * 3 * 2 * 2 * 2
    assert code_cache.place("a", "nf4", torch.float32, "cuda:1", []) in places


def test_a_cache_that_cannot_be_written_is_done_without(
    saved: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    monkeypatch.setenv("FEDLOOM_CACHE", str(tmp_path / "cache"))
    base = load_base(saved("llama"), kind="causal-lm", quantization="nf4")
    assert quantised.quantised(base.model)


def test_what_killed_processes_left_is_deleted(
    saved: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDLOOM_CACHE", str(tmp_path))
    save, codes = code_cache.save_file, tmp_path / "codes"

    def interrupted(tensors: Any, path: Path) -> None:
        save(tensors, path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(code_cache, "save_file", interrupted)
        load_base(saved("llama"), kind="causal-lm", quantization="nf4")
    assert not [*codes.iterdir()]
    names = [".nf4-0.safetensors-0123abcd", ".nf4-1.safetensors-0123abcd"]
    for name, age_s in zip(names, (7200, 60), strict=True):
        (codes / name).write_bytes(b"x")
        os.utime(codes / name, (time.time() - age_s,) * 2)
    load_base(saved("llama"), kind="causal-lm", quantization="nf4")
    left = {path.name for path in codes.iterdir() if path.name.startswith(".")}
    assert left == {names[1]}, "another process may be writing that"
