"""Bad and odd model directories: cut off, mixed up, made by others' tools, or made to run code."""

from __future__ import annotations

import functools
import json
import os
import pickle
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tests.bad.campaign import Case, written
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast

GOOD_WORDS = ["how", "many", "who", "is", "what", "where", "the", "city", "king", "year", "far", "old", "yes", "no"]
GOOD_WORDS += ["a", "b", ":", "of"]
SIZES: dict[str, Any] = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
MARKS = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
ENDS = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
WEIGHTS = "model.safetensors"


def _tokenizer(marks: dict[str, str], words: list[str] = GOOD_WORDS) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([*marks.values(), *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=marks["unk_token"]))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, **marks)


def made(path: Path, kind: str, **options: Any) -> Path:
    """A random model of an architecture with its tokenizer."""
    decodes = kind in ("llama", "mamba", "gpt2")
    tokenizer = _tokenizer(ENDS if decodes else MARKS)
    sizes = SIZES | {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "pad_token_id": 0} | options
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **sizes)
        model: Any = (AutoModelForCausalLM if decodes else AutoModel).from_config(config)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@functools.cache
def _kept(kind: str) -> Path:
    return made(Path(tempfile.mkdtemp(prefix="fedloom-model-")), kind)


def encoder() -> Path:
    """A good BERT."""
    return _kept("bert")


def decoder(path: Path | None = None, chat_template: str | None = None) -> Path:
    """A good Llama, or a copy of it with a chat template."""
    if path is None:
        return _kept("llama")
    shutil.copytree(_kept("llama"), path)
    if chat_template is not None:
        (path / "chat_template.jinja").write_text(chat_template)
    return path


def cases() -> Iterator[Case]:
    """All of them."""
    for name, (expected, damage, says, *more) in ENCODERS.items():
        yield _case(name, expected, "bert", damage, says, *more)
    for name, (expected, damage, says, *more) in DECODERS.items():
        yield _case(f"decoder: {name}", expected, "llama", damage, says, *more)
    for name, (expected, kind, task, options, says) in ARCHITECTURES.items():
        yield _architecture(name, expected, kind, task, options, says)
    for name, (expected, make, says) in NAMES.items():
        yield Case(f"name: {name}", expected, _named(make), says)


def _rows(folder: Path, task: str) -> dict[str, Any]:
    if task == "causal-lm":
        rows: list[Any] = [{"prompt": "who is", "response": "the king"}] * 8
    else:
        rows = [{"text": f"{GOOD_WORDS[i % 8]} is the city", "label": "ab"[i % 2]} for i in range(12)]
    return {"task.data": str(written(folder / "rows.jsonl", rows)), "task.kind": task}


def _case(name: str, expected: Any, kind: str, damage: Callable[[Path], Any], says: str, keys: Any = None) -> Case:
    def make(folder: Path) -> dict[str, Any]:
        model = folder / "model"
        shutil.copytree(_kept(kind), model)
        damage(model)
        task = "causal-lm" if kind == "llama" else "classification"
        return {"model.name": str(model), **_rows(folder, task), **(keys or {})}

    return Case(name, expected, make, says)


def _architecture(name: str, expected: Any, kind: str, task: str, options: dict[str, Any], says: str) -> Case:
    def make(folder: Path) -> dict[str, Any]:
        return {"model.name": str(made(folder / "model", kind, **options)), **_rows(folder, task)}

    return Case(f"architecture: {name}", expected, make, says)


def _named(make: Callable[[Path], Path | str]) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: {"model.name": str(make(folder)), **_rows(folder, "classification")}


# What is done to a good directory.


def _without(*names: str) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        for name in names:
            (model / name).unlink()

    return damage


def _file(name: str, content: bytes | str) -> Callable[[Path], Any]:
    def damage(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        written(model / name, content)

    return damage


def _all(*damages: Callable[[Path], Any]) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        for each in damages:
            each(model)

    return damage


def _json(name: str, *without: str, **values: Any) -> Callable[[Path], None]:
    """Keys of a file of JSON changed."""

    def damage(model: Path) -> None:
        old = json.loads((model / name).read_text()) if (model / name).exists() else {}
        new = {key: value for key, value in old.items() if key not in without} | values
        (model / name).write_text(json.dumps(new))

    return damage


def _config(*without: str, **values: Any) -> Callable[[Path], None]:
    return _json("config.json", *without, **values)


def _cut(name: str, keep: float) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        data = (model / name).read_bytes()
        (model / name).write_bytes(data[: int(keep * len(data))])

    return damage


def _tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        tensors = change(load_file(model / WEIGHTS))
        save_file({k: v.contiguous() for k, v in tensors.items()}, model / WEIGHTS, {"format": "pt"})

    return damage


def _each(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return _tensors(lambda found: {name: change(x) for name, x in found.items()})


def _some(word: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return _tensors(lambda found: {name: change(x) if word in name else x for name, x in found.items()})


def _drop(word: str) -> Callable[[Path], None]:
    return _tensors(lambda found: {name: x for name, x in found.items() if word not in name})


class _Trap:
    def __init__(self, where: Path) -> None:
        self.where = where

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.where}",)


def _pickled(model: Path) -> None:
    (model / WEIGHTS).unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({"x": _Trap(model.parent / "TRAPPED")}))


def _binary(model: Path) -> None:
    torch.save(load_file(model / WEIGHTS), model / "pytorch_model.bin")
    (model / WEIGHTS).unlink()


CODE = "import pathlib\n(pathlib.Path(__file__).parent.parent / 'TRAPPED').touch()\n"


def _code(model: Path) -> None:
    for name in (
        "modeling_x.py",
        "tokenization_x.py",
        "configuration_x.py",
        "sitecustomize.py",
        "setup.py",
        "conftest.py",
    ):
        (model / name).write_text(CODE)


def _index(**weight_map: str) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        names = weight_map or dict.fromkeys(load_file(model / WEIGHTS), WEIGHTS)
        (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
        (model / WEIGHTS).rename(model / "other.safetensors")

    return damage


def _outside(model: Path) -> None:
    found = load_file(model / WEIGHTS)
    (model / WEIGHTS).rename(model.parent / "outside.safetensors")
    names = dict.fromkeys(found, "../outside.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def _linked(model: Path) -> None:
    store = model.parent / "blobs"
    store.mkdir()
    for i, file in enumerate(sorted(model.iterdir())):
        file.rename(store / str(i))
        file.symlink_to(store / str(i))


def _dangling(model: Path) -> None:
    (model / WEIGHTS).unlink()
    (model / WEIGHTS).symlink_to(model.parent / "gone")


def _folder(name: str) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        (model / name).unlink()
        (model / name).mkdir()

    return damage


def _fifo(name: str) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        os.mkfifo(model / name)

    return damage


def _words(count: int, first: int = 0) -> Callable[[Path], None]:
    """A tokenizer of so many words."""
    return lambda model: _tokenizer(MARKS, [f"w{i}" for i in range(first, first + count)]).save_pretrained(model)


def _slow(model: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    (model / "vocab.txt").write_text("\n".join([*MARKS.values(), "[MASK]", *GOOD_WORDS[1:]]))


def _stray(model: Path) -> None:
    _binary(model)
    save_file({"x": torch.zeros(1)}, model / "extra.safetensors")


def _header(length: int, header: bytes) -> bytes:
    return struct.pack("<Q", length) + header


NESTED = '{"a": ' * 5000 + "1" + "}" * 5000
TRAP_MAP = {
    "AutoConfig": "configuration_x.X",
    "AutoModelForSequenceClassification": "modeling_x.X",
    "AutoModel": "modeling_x.X",
    "AutoTokenizer": ["tokenization_x.X", None],
}

ENCODERS: dict[str, Any] = {
    "as it is": ("trains", lambda model: None, ""),
    "nothing in it": (
        "refused",
        _without("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        "config.json",
    ),
    "no config": ("refused", _without("config.json"), "without config.json"),
    "config empty": ("refused", _file("config.json", b""), ""),
    "config no JSON": ("refused", _file("config.json", "{'a': 1}"), ""),
    "config cut off": ("refused", _cut("config.json", 0.5), ""),
    "config of bytes": ("refused", _file("config.json", bytes(range(256))), ""),
    "config a list": ("refused", _file("config.json", "[]"), ""),
    "config a text": ("refused", _file("config.json", '"bert"'), ""),
    "config with a BOM": (
        "either",
        lambda m: (m / "config.json").write_bytes(b"\xef\xbb\xbf" + (m / "config.json").read_bytes()),
        "",
    ),
    "config nested 5,000 deep": ("refused", _file("config.json", NESTED), ""),
    "config a directory": ("refused", _folder("config.json"), "config.json"),
    "config a fifo": ("refused", _fifo("config.json"), "config.json"),
    "config of Git LFS": ("refused", _file("config.json", "version https://git-lfs.github.com/spec/v1\n"), ""),
    "config without its type": ("refused", _config("model_type"), ""),
    "config of no known type": ("refused", _config(model_type="nonsense"), "nonsense"),
    "config type a number": ("refused", _config(model_type=7), ""),
    "config type a list": ("refused", _config(model_type=["bert"]), "['bert']"),
    "config type with markup": ("refused", _config(model_type="[/red]\x1b[31m"), ""),
    "config with code": ("either", _all(_code, _config(auto_map=TRAP_MAP)), ""),
    "config with code, type unknown": (
        "refused",
        _all(_code, _config(auto_map=TRAP_MAP, model_type="x")),
        "does not run",
    ),
    "code beside it": ("trains", _code, ""),
    "width a text": ("refused", _config(hidden_size="wide"), ""),
    "width negative": ("refused", _config(hidden_size=-16), ""),
    "width zero": ("refused", _config(hidden_size=0), ""),
    "width null": ("refused", _config(hidden_size=None), ""),
    "width of another model": ("refused", _config(hidden_size=32), "do not fit"),
    "width of 10^12": ("refused", _config(hidden_size=10**12), ""),
    "heads that do not divide": ("refused", _config(num_attention_heads=3), ""),
    "heads none": ("refused", _config(num_attention_heads=0), ""),
    "layers too many": ("refused", _config(num_hidden_layers=3), "lack"),
    "layers too few": ("either", _config(num_hidden_layers=1), ""),
    "layers none": ("either", _config(num_hidden_layers=0), ""),
    "words too many": ("refused", _config(vocab_size=1000), "do not fit"),
    "words too few": ("refused", _config(vocab_size=5), "do not fit"),
    "words negative": ("refused", _config(vocab_size=-5), ""),
    "padding beyond the words": ("refused", _config(pad_token_id=10**6), ""),
    "an activation that is none": ("refused", _config(hidden_act="nonsense"), "nonsense"),
    "dropout of 2": ("refused", _config(hidden_dropout_prob=2.0), ""),
    "an attention that is none": (
        "either",
        _config(_attn_implementation="nonsense", attn_implementation="nonsense"),
        "",
    ),
    "a dtype that is none": ("either", _config("dtype", torch_dtype="float99", dtype="float99"), ""),
    "labels of another task": (
        "trains",
        _config(id2label={"0": "x", "1": "y", "2": "z"}, label2id={"x": 0, "y": 1, "z": 2}),
        "",
    ),
    "labels that are none": ("either", _config(id2label=[1, 2], label2id="x"), ""),
    "positions of 4": ("refused", _config(max_position_embeddings=4), "do not fit"),
    "roberta's type": ("refused", _config(model_type="roberta"), "'BertModel', which is a 'bert'"),
    "roberta's type and class": ("either", _config(model_type="roberta", architectures=["RobertaModel"]), ""),
    "gpt2's type": ("refused", _config(model_type="gpt2", architectures=["GPT2Model"]), ""),
    "a quantisation that is none": (
        "refused",
        _config(quantization_config={"quant_method": "nonsense"}),
        "quantised as 'nonsense'",
    ),
    "a quantisation that is a text": ("refused", _config(quantization_config="4 bits"), "quantised as '4 bits'"),
    "a quantisation by a library that is not here": (
        "refused",
        _config(quantization_config={"quant_method": "gptq", "bits": 4}),
        "",
    ),
    "weights named in the config": (
        "refused",
        _config(transformers_weights="../x.safetensors"),
        "names weights of its own",
    ),
    "no weights": ("refused", _without(WEIGHTS), "has no weights"),
    "weights empty": ("refused", _file(WEIGHTS, b""), ""),
    "weights cut off": ("refused", _cut(WEIGHTS, 0.6), ""),
    "weights cut off in their header": ("refused", _cut(WEIGHTS, 0.01), ""),
    "weights of Git LFS": ("refused", _file(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:1\n"), ""),
    "weights of text": ("refused", _file(WEIGHTS, "not weights at all"), ""),
    "weights with an endless header": ("refused", _file(WEIGHTS, _header(2**60, b"{}")), ""),
    "weights with a header of nothing": ("refused", _file(WEIGHTS, _header(4, b"null")), ""),
    "weights without tensors": ("refused", _tensors(lambda found: {}), ""),
    "weights of another name": (
        "refused",
        _tensors(lambda found: {f"x.{name}": x for name, x in found.items()}),
        "lack",
    ),
    "weights of another shape": ("refused", _some("query", lambda x: x[..., :3]), "do not fit"),
    "one layer missing": ("refused", _drop("layer.1.attention"), "lack"),
    "weights NaN": ("refused", _each(lambda x: x * float("nan")), "not finite"),
    "one weight infinite": (
        "refused",
        _some("layer.0.output.dense.weight", lambda x: x + torch.eye(16, 24) * float("inf")),
        "not finite",
    ),
    "weights in float64": ("trains", _each(lambda x: x.double()), ""),
    "weights in float16": ("trains", _each(lambda x: x.half()), ""),
    "weights in int8": ("refused", _each(lambda x: x.to(torch.int8)), "no quantization_config"),
    "weights all zero": ("trains", _each(torch.zeros_like), ""),
    "weights a directory": ("refused", _folder(WEIGHTS), "has no weights"),
    "weights a fifo": ("refused", _fifo(WEIGHTS), "has no weights"),
    "weights a link to nothing": ("refused", _dangling, "has no weights"),
    "files that are links": ("trains", _linked, ""),
    "an index": ("refused", _index(), ""),
    "an index outside": ("refused", _outside, "expected a file of the same directory"),
    "an index of no file": ("refused", _index(x="gone.safetensors"), "gone.safetensors"),
    "an index that is none": ("refused", _all(_index(), _file("model.safetensors.index.json", "[]")), "index"),
    "weights of torch": ("trains", _binary, ""),
    "weights of torch cut off": ("refused", _all(_binary, _cut("pytorch_model.bin", 0.5)), ""),
    "weights of torch that run code": ("refused", _pickled, "could run code"),
    "weights of torch beside others": ("trains", _stray, ""),
    "an adapter beside": ("refused", _file("adapter_config.json", "{}"), "adapter"),
    "an adapter alone": ("refused", _all(_without("config.json", WEIGHTS), _file("adapter_config.json", "{}")), ""),
    "no tokenizer": ("refused", _without("tokenizer.json", "tokenizer_config.json"), "knows no word"),
    "tokenizer empty": ("refused", _file("tokenizer.json", b""), ""),
    "tokenizer cut off": ("refused", _cut("tokenizer.json", 0.5), ""),
    "tokenizer of another version": ("refused", _json("tokenizer.json", model={"type": "Nonsense"}), ""),
    "tokenizer a fifo": ("refused", _fifo("tokenizer.json"), ""),
    "tokenizer with more words": ("refused", _words(500), "embeddings"),
    "tokenizer of other words": ("trains", _words(10), ""),
    "tokenizer of no words": ("refused", _words(0), "knows no word"),
    "tokenizer of torch's vocabulary": ("trains", _slow, ""),
    "tokenizer settings nested": ("refused", _file("tokenizer_config.json", NESTED), ""),
    "tokenizer settings a list": ("refused", _file("tokenizer_config.json", "[1]"), ""),
    "tokenizer settings with code": ("either", _all(_code, _json("tokenizer_config.json", auto_map=TRAP_MAP)), ""),
    "tokenizer of no class": ("either", _json("tokenizer_config.json", tokenizer_class="NonsenseTokenizer"), ""),
    "tokenizer without padding": ("either", _json("tokenizer_config.json", "pad_token", "sep_token", "cls_token"), ""),
    "longest row of 0": ("either", _json("tokenizer_config.json", model_max_length=0), ""),
    "targets that are none": ("refused", lambda model: None, "matches no linear layer", {"lora.targets": ["nonsense"]}),
    "a rank above the layers": ("refused", lambda model: None, "rank", {"lora.rank": 64}),
}
"""name -> what should become of it, what is done to a good BERT, words of the message, keys of the run file."""

DECODERS: dict[str, Any] = {
    "as it is": ("trains", lambda model: None, ""),
    "generation settings cut off": ("either", _file("generation_config.json", '{"a'), ""),
    "generation settings a list": ("either", _file("generation_config.json", "[]"), ""),
    "output embedding missing": ("refused", _drop("lm_head"), "lack"),
    "groups of heads that do not divide": ("refused", _config(num_key_value_heads=5), "do not fit"),
    "rope of no kind": (
        "refused",
        _config(rope_scaling={"rope_type": "nonsense"}, rope_parameters={"rope_type": "nonsense"}),
        "",
    ),
    "for classification": (
        "either",
        lambda model: None,
        "",
        {"task.kind": "classification", "task.text": ["prompt"], "task.label": "response"},
    ),
    "quantised twice": (
        "refused",
        _config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "",
        {"model.quantization": "nf4"},
    ),
}

ARCHITECTURES: dict[str, Any] = {
    "T5": (
        "refused",
        "t5",
        "classification",
        {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2},
        "encoder-decoder",
    ),
    "BART": (
        "refused",
        "bart",
        "classification",
        {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1},
        "encoder-decoder",
    ),
    "Mamba for classification": (
        "refused",
        "mamba",
        "classification",
        {"state_size": 4},
        "cannot be used for classification",
    ),
    "Mamba": ("trains", "mamba", "causal-lm", {"state_size": 4}, ""),
    "ViT": (
        "refused",
        "vit",
        "classification",
        {"image_size": 8, "patch_size": 4},
        "cannot be used for classification",
    ),
    "Wav2Vec2": (
        "refused",
        "wav2vec2",
        "classification",
        {
            "num_feat_extract_layers": 1,
            "conv_dim": [8],
            "conv_kernel": [3],
            "conv_stride": [2],
            "num_conv_pos_embedding_groups": 2,
        },
        "",
    ),
    "BERT that writes": ("either", "bert", "causal-lm", {}, ""),
    "GPT-2": ("trains", "gpt2", "causal-lm", {}, ""),
}


def _gguf(content: bytes) -> Callable[[Path], Path]:
    return lambda folder: written(folder / "model.gguf", content)


NAMES: dict[str, Any] = {
    "nothing": ("refused", lambda f: "", "config.json"),
    "a folder that is not there": ("refused", lambda f: f / "gone", "no model directory"),
    "an empty folder": ("refused", lambda f: f, "without config.json"),
    "a file of weights": ("refused", lambda f: shutil.copy(encoder() / WEIGHTS, f / "model.safetensors"), "is a file"),
    "a packaged name misspelt": ("refused", lambda f: "minillm", "did you mean 'minilm'"),
    "a name with NUL": ("refused", lambda f: "a\0b", ""),
    "a name of 5,000 characters": ("refused", lambda f: "x" * 5000, ""),
    "a path of 5,000 characters": ("refused", lambda f: f"{f}/{'x' * 5000}", ""),
    "an address": ("refused", lambda f: "https://example.org/model", ""),
    "a hub that is not reached": ("refused", lambda f: "nobody/nothing", "HF_HUB_OFFLINE"),
    "a revision alone": ("refused", lambda f: "@main", ""),
    "a folder of markup": ("trains", lambda f: shutil.copytree(encoder(), f / "a[" / "red]"), ""),
    "a folder of escape sequences": ("trains", lambda f: shutil.copytree(encoder(), f / "a\x1b[31mb"), ""),
    "a GGUF file of nothing": ("refused", _gguf(b""), ""),
    "a GGUF file of text": ("refused", _gguf(b"not a model"), ""),
    "a GGUF file cut off": ("refused", _gguf(b"GGUF" + struct.pack("<IQQ", 3, 5, 7)), ""),
    "a GGUF file that promises 10^18": ("refused", _gguf(b"GGUF" + struct.pack("<IQQ", 3, 10**18, 10**18)), ""),
}
