"""Checkpoints in 4 bits that compressed-tensors reads, as llm-compressor writes them. Skipped where it is not installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from fedloom import lora
from fedloom.core import Client, Work
from fedloom.data.batches import Encoded
from fedloom.models import peft
from fedloom.models.huggingface import find_sites, load_base
from fedloom.rng import generator
from fedloom.train.optim import Settings
from fedloom.train.trainer import Trainer

pytest.importorskip("compressed_tensors")

GROUP = 32


def rows() -> Encoded:
    rng = np.random.default_rng(0)
    lengths = np.array([5, 7, 6])
    return Encoded(
        tokens=rng.integers(3, 50, lengths.sum()).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        pad_id=0,
        kind="causal-lm",
        starts=np.array([2, 2, 2]),
    )


def checkpoint(path: Path) -> Any:
    """A tiny Llama in 4 bits, packed eight to an integer, groups of 32; and the same with its rounded weights dense."""
    from compressed_tensors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = tf.LlamaConfig(vocab_size=50, num_key_value_heads=2, initializer_range=0.2, **sizes)
    torch.manual_seed(0)
    model, dense = tf.LlamaForCausalLM(config), tf.LlamaForCausalLM(config)
    dense.load_state_dict(model.state_dict())
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=GROUP)
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    asked = {"config_groups": groups, "ignore": ["lm_head"], "format": "pack-quantized"}
    apply_quantization_config(model, QuantizationConfig(**asked))
    for name, layer in model.named_modules():
        if hasattr(layer, "weight_scale"):
            parts = layer.weight.data.view(len(layer.weight), -1, GROUP)
            layer.weight_scale.data = scale = parts.abs().amax(-1) / 7
            rounded = (parts / scale[..., None]).round().clamp(-8, 7) * scale[..., None]
            dense.get_submodule(name).weight.data = rounded.view_as(layer.weight)
    compressor = ModelCompressor.from_pretrained_model(model)
    assert compressor is not None
    compressor.compress_model(model)
    path.mkdir()
    save_file({k: x.contiguous() for k, x in model.state_dict().items()}, path / "model.safetensors", {"format": "pt"})
    said = QuantizationConfig(**asked, quantization_status="compressed").model_dump(mode="json")
    values = config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    (path / "config.json").write_text(
        json.dumps(values | {"quantization_config": said | {"quant_method": "compressed-tensors"}})
    )
    core = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    tf.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>").save_pretrained(path)
    return dense


def test_a_packed_checkpoint_trains_as_its_rounded_weights_do_and_its_adapter_loads(tmp_path: Path) -> None:
    from peft import PeftModel

    dense = checkpoint(tmp_path / "packed")
    base = load_base(str(tmp_path / "packed"), kind="causal-lm")
    assert base.quantization == "compressed-tensors"
    sites = find_sites(base.model, ["q_proj", "v_proj"])
    work = Work(train=lora.init(sites, 2, generator(0, "x")))
    made = []
    for model in (base.model, dense):
        with Trainer(model, sites, settings=Settings(batch_size=3, lr=0.1, local_steps=3)) as trainer:
            done = trainer.fit([(Client("a", 3, 2), work)], [rows()], 1)[0]
            made.append((done.loss, trainer.log_likelihoods(Work(train=done.state), rows())))
    assert made[0][0] == pytest.approx(made[1][0], rel=1e-5)
    np.testing.assert_allclose(made[0][1], made[1][1], rtol=1e-4)

    peft.write_adapter(
        tmp_path / "adapter",
        A=done.state["A"],
        B=done.state["B"],
        alpha=2.0,
        rank=2,
        rslora=False,
        targets=["q_proj", "v_proj"],
        base_name=str(tmp_path / "packed"),
        kind="causal-lm",
    )
    theirs: Any = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    ids = torch.tensor([[4, 9, 17, 33, 8]])
    with torch.no_grad():
        before = theirs(ids).logits  # its first pass makes the weights dense, which PEFT looks for
        after = PeftModel.from_pretrained(theirs, str(tmp_path / "adapter"))(ids).logits
        wanted = PeftModel.from_pretrained(dense, str(tmp_path / "adapter"))(ids).logits
    assert (before - after).abs().max() > 0.01
    torch.testing.assert_close(after, wanted, rtol=0, atol=1e-4)
