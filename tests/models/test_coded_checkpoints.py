"""Checkpoints whose weights another library has coded and reads. Skipped where that is not installed."""

from __future__ import annotations

import json
from collections.abc import Callable
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
from fedloom.errors import ModelError
from fedloom.models import peft
from fedloom.models.huggingface import check_sites, find_sites, load_base
from fedloom.models.quantised import bytes_of, is_coded
from fedloom.rng import generator
from fedloom.train.optim import Settings
from fedloom.train.trainer import Trainer

GROUP = 32


IDS = torch.tensor([[4, 9, 17, 33, 8]])


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


def two_llamas() -> tuple[Any, Any]:
    """A tiny random Llama, twice."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = tf.LlamaConfig(vocab_size=50, num_key_value_heads=2, initializer_range=0.2, **sizes)
    torch.manual_seed(0)
    model, dense = tf.LlamaForCausalLM(config), tf.LlamaForCausalLM(config)
    dense.load_state_dict(model.state_dict())
    return model, dense


def save_tokenizer(path: Path) -> None:
    core = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    tf.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>").save_pretrained(path)


def torchao(path: Path) -> Any:
    """A tiny Llama in torchao's int8, a scale a row; and the same with its rounded weights dense."""
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    model, dense = two_llamas()
    coded = by_torchao(model, path, Int8WeightOnlyConfig())
    for name, layer in coded.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            rounded = layer.weight.dequantize()
            assert is_coded(layer.weight) and not torch.equal(rounded, model.get_submodule(name).weight)
            dense.get_submodule(name).weight.data = rounded
    return dense


def by_torchao(model: Any, path: Path, how: Any) -> Any:
    """The model as torchao codes it; it is saved at the path."""
    model.save_pretrained(path / "dense")
    asked = tf.TorchAoConfig(how)
    coded: Any = tf.AutoModelForCausalLM.from_pretrained(path / "dense", quantization_config=asked)
    coded.save_pretrained(path)
    save_tokenizer(path)
    return coded


def compressed_tensors(path: Path) -> Any:
    """A tiny Llama in 4 bits, packed eight to an integer, groups of 32, as llm-compressor writes it; and the same dense."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    model, dense = two_llamas()
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
    values = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    (path / "config.json").write_text(
        json.dumps(values | {"quantization_config": said | {"quant_method": "compressed-tensors"}})
    )
    save_tokenizer(path)
    return dense


@pytest.mark.parametrize("library", [compressed_tensors, torchao])
def test_a_coded_checkpoint_trains_as_its_rounded_weights_do_and_its_adapter_loads(
    library: Callable[[Path], Any], tmp_path: Path
) -> None:
    from peft import PeftModel

    dense = library(tmp_path / "packed")
    base = load_base(str(tmp_path / "packed"), kind="causal-lm")
    assert base.quantization == library.__name__.replace("_", "-")
    sites = find_sites(base.model, ["q_proj", "v_proj"])
    assert check_sites(base.model, sites)
    assert bytes_of(base.model, torch.float32) < 0.4 * bytes_of(dense, torch.float32)
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
    again = load_base(str(tmp_path / "packed"), kind="causal-lm").model
    with pytest.raises(ModelError, match=r"whose codes fedloom cannot make dense: .* export --merge, need a base"):
        peft.merge(again, done.state["A"], done.state["B"], 1.0, {}, None, tmp_path / "merged")
    theirs: Any = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    with torch.no_grad():
        before = theirs(IDS).logits  # its first pass makes the weights dense, which PEFT looks for
        after = PeftModel.from_pretrained(theirs, str(tmp_path / "adapter"))(IDS).logits
        wanted = PeftModel.from_pretrained(dense, str(tmp_path / "adapter"))(IDS).logits
    assert (before - after).abs().max() > 0.01
    torch.testing.assert_close(after, wanted, rtol=0, atol=1e-4)


def test_codes_of_the_inputs_too_hand_no_gradient_back_and_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    by_torchao(two_llamas()[0], tmp_path, Int8DynamicActivationInt8WeightConfig())
    model = load_base(str(tmp_path), kind="causal-lm").model
    with pytest.raises(ModelError, match=r"layer 'model\.layers\.0\.self_attn\.q_proj' .* hands no gradient back"):
        check_sites(model, find_sites(model, ["q_proj"]))
