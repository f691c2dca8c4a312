"""Load a pretrained model and its tokenizer through transformers, frozen, and find the layers to adapt in it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedloom.data import hub, packaged
from fedloom.data.batches import Kind as Kind
from fedloom.errors import ConfigError, ModelError, nearest
from fedloom.models import weights
from fedloom.models.families import family_of, model_type
from fedloom.models.probe import probe
from fedloom.models.usable import check_usable
from fedloom.rng import generator, seed_of
from fedloom.state import Group, Sites

_STATE_SPACE = frozenset({"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"})
"""Architectures of which PEFT refuses `out_proj`: fused kernels read its weight past the layer."""


@dataclass(frozen=True)
class Base:
    """A frozen pretrained model, ready to be adapted."""

    model: nn.Module
    tokenizer: Any
    path_or_id: str
    """The directory or hub id that transformers loads it from: what an adapter names as its base."""
    head: tuple[str, ...]
    """Names of the task head's linear layers, trained as role `head`; none for a causal LM."""
    family: str
    """transformers' `model_type`: bert, roberta, llama, gpt2, ..."""
    sha256: str
    """Hash of the weight files."""
    head_weights: Group
    """The head's parameters by full name, (out, in) and (out,), float32 on the CPU."""


def load_base(
    name: str,
    *,
    kind: Kind,
    num_labels: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    attention: str | None = None,
) -> Base:
    """Load a packaged name, a local directory or a hub id for a task, frozen and in eval mode, with a padding token.

    Weights are read in `dtype` straight to `device`: of a file of that dtype there is one copy in memory, on a CPU the file's
    own pages. The head is float32 in `Base.head_weights` all the same. A new one is drawn from `seed` alone; torch's global
    generator is left as it was. `attention` is transformers' `attn_implementation`. Raises ModelError if there is no such
    model or it does not fit the task, HubError if it is only on a hub that cannot be reached.
    """
    source = resolve(name)
    known = packaged.MODELS
    advice = packaged.absent(name) if name in known else f"Packaged models: {', '.join(known)}{nearest(name, known)}"
    local = Path(source).is_dir()
    with (
        quiet(),
        hub.access("model", source, ModelError, "" if local else advice, local),
        torch.random.fork_rng(devices=[]),
    ):
        import transformers

        torch.manual_seed(seed_of(seed, "load"))
        _check_architecture(transformers.AutoConfig.from_pretrained(source), name, kind)
        loader: Any = transformers.AutoModelForCausalLM
        options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
        if kind != "causal-lm":
            loader = transformers.AutoModelForSequenceClassification
            problem = "regression" if kind == "regression" else "single_label_classification"
            options |= {"num_labels": num_labels, "problem_type": problem, "ignore_mismatched_sizes": True}
        if torch.device(device).type != "cpu":
            options["device_map"] = {"": str(device)}
        if attention is not None:
            options["attn_implementation"] = attention
        if local:
            weights.weight_files(Path(source))  # of a hub id they are not here yet
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(source)
        loaded: Any = loader.from_pretrained(source, **options)
        model, info = loaded
        digest = packaged.weights_sha256(name) if name in known and local else weights.sha256(_directory(source))
        directory = _directory(source)
    check_usable(name, model, tokenizer)
    head = head_modules(model)
    for module in head:  # trained in float32, whatever the base's dtype
        model.get_submodule(module).float()
    if head and dtype != torch.float32:
        _restore_head(model, head, directory)
    fresh = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    _draw(model, fresh, head, seed, name, kind)
    return _frozen(model, tokenizer, source, digest, dtype)


def adopt(model: nn.Module, tokenizer: Any, *, kind: Kind, num_labels: int = 1) -> Base:
    """A model of transformers that the caller has made, as a base: taken over, frozen and in eval mode.

    Raises ModelError if it is of another kind, or has another number of labels.
    """
    config: Any = getattr(model, "config", None)
    wanted = "ForCausalLM" if kind == "causal-lm" else "ForSequenceClassification"
    written = callable(getattr(model, "generate", None)) and not head_modules(model)
    if config is None or not (written if kind == "causal-lm" else type(model).__name__.endswith(wanted)):
        raise ModelError(
            f"got a {type(model).__name__} for task.kind = {kind!r}, expected one of AutoModel{wanted}: token classification "
            "and models that write one sequence from another are left aside"
        )
    if tokenizer is None:
        raise ModelError("got a model without its tokenizer, expected both: fedloom.run(..., model=..., tokenizer=...)")
    if kind != "causal-lm" and config.num_labels != num_labels:
        raise ModelError(
            f"the model has num_labels = {config.num_labels}, and the data {num_labels}: load it with num_labels={num_labels}"
        )
    _check_architecture(config, type(model).__name__, kind)
    digest = hashlib.sha256()
    for name, x in sorted(model.state_dict().items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    name = str(config.name_or_path or type(model).__name__)
    return _frozen(model, tokenizer, name, digest.hexdigest(), next(model.parameters()).dtype)


def _frozen(model: Any, tokenizer: Any, source: str, digest: str, dtype: torch.dtype) -> Base:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.requires_grad_(False).eval()
    head = head_group(model)
    for module in head_modules(model):
        model.get_submodule(module).to(dtype)
    return Base(model, tokenizer, source, tuple(head_modules(model)), str(model.config.model_type), digest, head)


def _restore_head(model: nn.Module, head: Sequence[str], directory: Path) -> None:
    """Give a head that the checkpoint has the values that were rounded when it was read."""
    parameters = {
        f"{module}.{leaf}": x for module in head for leaf, x in model.get_submodule(module).named_parameters()
    }
    with torch.no_grad():
        for name, x in weights.read(directory, parameters).items():
            if x.shape == parameters[name].shape:
                parameters[name].copy_(x)


def head_group(model: nn.Module) -> Group:
    """The parameters of the task head by full name, float32 copies on the CPU: what role `head` starts from."""
    named = dict(model.named_parameters())
    names = [f"{module}.{leaf}" for module in head_modules(model) for leaf in ("weight", "bias")]
    return {name: named[name].detach().float().cpu().clone() for name in names if name in named}


def resolve(name: str) -> str:
    """The directory or hub id behind a model name.

    A packaged name gives its directory, or the hub id of the original where its package is not installed.
    Raises ModelError for a directory without a model, or a path that does not exist.
    """
    if name in packaged.MODELS:
        files = packaged.locate(name)
        if files is None:
            return str(packaged.MODELS[name].hub)
        if files[0].suffix == ".gguf":
            from fedloom.models import gguf

            with quiet():
                return str(gguf.converted(files[0], packaged.weights_sha256(name)))
        return str(files[0].parent)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{name!r} is a directory without config.json, expected one that save_pretrained wrote")
        return str(path)
    if path.is_file():
        raise ModelError(f"{name!r} is a file, expected a model directory: the one that has config.json in it")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not name.strip():
        raise ModelError(
            f"there is no model directory {name!r}, expected an existing one, a hub id (owner/name), or a packaged name: "
            f"{', '.join(packaged.MODELS)}"
        )
    return name


def _directory(source: str) -> Path:
    """Where the files of a directory or hub id are."""
    if Path(source).is_dir():
        return Path(source)
    from transformers.utils.hub import cached_file

    return Path(str(cached_file(source, "config.json"))).parent


def head_modules(model: nn.Module) -> list[str]:
    """Names of the linear layers that make up the task head of a sequence-classification model; none for a causal LM.

    BERT has `classifier`, RoBERTa `classifier.dense` and `classifier.out_proj`, Llama and GPT-2 `score`.
    """
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return []
    return [
        name
        for child, module in model.named_children()
        if child != getattr(model, "base_model_prefix", "")
        for name, layer in module.named_modules(prefix=child)
        if isinstance(layer, nn.Linear)
    ]


def default_targets(model: nn.Module) -> list[str]:
    """The layers that LoRA adapts in this architecture, as name endings: those of its record, else every layer that can be."""
    family = family_of(model)
    known = () if family is None else family.targets
    layers = [name for name, _ in _layers(model)]
    return [x for x in known if any(_matches(name, x) for name in layers)] or all_linear(model)


def all_linear(model: nn.Module) -> list[str]:
    """Every linear layer that can carry an adapter, the task head and the output embedding apart: name endings where all layers
    of one name can, else whole names.

    Raises ModelError if there is none.
    """
    layers = [name for name, _ in _layers(model)]
    refused = probe(model, layers).obstacles.keys() | {name for name in layers if _peft_refuses(model, name)}
    if not layers or refused == set(layers):
        raise ModelError(
            f"a {model_type(model)!r} model has no linear layer that can carry an adapter: choose another model"
        )
    spoilt = {_ending(name) for name in refused}
    return sorted({name if _ending(name) in spoilt else _ending(name) for name in layers if name not in refused})


def check_sites(model: nn.Module, sites: Iterable[str]) -> bool:
    """Whether clients can train together, each with adapters at these layers.

    Raises ModelError for a layer that can carry none. Only architectures whose layers are not known to are asked.
    """
    names = list(sites)
    for name in names:
        if _peft_refuses(model, name):
            raise ModelError(
                f"layer {name!r} of this {type(model).__name__} can carry no adapter, in PEFT neither: its weight is read past "
                "the layer; take it out of targets in [lora]"
            )
    family = family_of(model)
    if family is not None and family.packs:
        return True
    found = probe(model, names)
    for name, why in found.obstacles.items():
        raise ModelError(f"layer {name!r} of this {type(model).__name__} {why}: take it out of targets in [lora]")
    return not found.alone


def find_sites(model: nn.Module, targets: Iterable[str]) -> Sites:
    """The layers to adapt -> (out, in). A target matches a layer of its name, or one whose name ends in `.target`, as in PEFT.

    Linear layers and GPT-2's Conv1D count; the task head and the output embedding do not. Raises ModelError for a target
    that matches no layer.
    """
    layers = dict(_layers(model))
    sites: Sites = {}
    wanted = [targets] if isinstance(targets, str) else list(targets)
    for target in wanted:
        found = {name: size for name, size in layers.items() if _matches(name, target)}
        if not found:
            endings = _endings(model)
            raise ModelError(
                f"target {target!r} matches no linear layer of this {type(model).__name__}, expected some of: "
                f"{', '.join(endings)}{nearest(target, endings)}"
            )
        sites |= found
    if not sites:
        raise ModelError(f"no layers to adapt were named, expected some of: {', '.join(_endings(model))}")
    return {name: sites[name] for name in layers if name in sites}  # in the model's order, whatever that of the targets


def is_conv1d(layer: nn.Module) -> bool:
    """Whether the layer keeps its weight as (in, out), as GPT-2 does."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer, Conv1D)


def check_rank(sites: Sites, rank: int) -> None:
    """Raise ConfigError if the rank is below 1, or above a side of a layer, where it could add nothing."""
    name, size = min(sites.items(), key=lambda item: min(item[1]))
    if not 1 <= rank <= min(size):
        raise ConfigError(
            f"got rank {rank}, expected 1 to {min(size)}: layer {name!r} is {size[0]} x {size[1]}; change rank in [lora]"
        )


def auto_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """bfloat16 where the processor or GPU computes in it, else float32."""
    kind = torch.device(device).type
    if kind == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif kind == "cpu":
        fast = _cpu_has_bfloat16()
    else:
        fast = False
    return torch.bfloat16 if fast else torch.float32


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars, load reports and advice: what matters of them is raised as an error here."""
    hub.quiet()
    from transformers.utils import logging as untyped

    logging: Any = untyped
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _check_architecture(config: Any, name: str, kind: Kind) -> None:
    """Refuse, before any weights are read, what has no head for the task or reads a sequence to write another."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if config.is_encoder_decoder:
        raise ModelError(
            f"model {name!r} is an encoder-decoder ({config.model_type}), which fedloom does not train: choose a decoder such "
            "as a Llama for causal-lm, or an encoder such as RoBERTa for classification"
        )
    loader: Any = AutoModelForCausalLM if kind == "causal-lm" else AutoModelForSequenceClassification
    if type(config) not in loader._model_mapping and not getattr(config, "auto_map", None):
        raise ModelError(
            f"model {name!r} ({config.model_type}) cannot be used for {kind}: transformers has no "
            f"{loader.__name__} of it; choose another model, or another kind in [task]"
        )


def _draw(model: nn.Module, fresh: set[str], head: Sequence[str], seed: int, name: str, kind: Kind) -> None:
    """Draw the parameters that the checkpoint does not have, in float32, each from the seed and its own name.

    Only a task head and a pooler in front of it may be missing: a base with random layers must not pass for a pretrained one.
    """
    allowed = {f"{module}.{leaf}" for module in head for leaf in ("weight", "bias")}
    wrong = sorted(key for key in fresh if key not in allowed and "pooler" not in key.split("."))
    if wrong:
        task = "a causal LM" if kind == "causal-lm" else f"a base for {kind}"
        raise ModelError(
            f"model {name!r} cannot be used as {task}: its files lack {len(wrong)} parameters such as {wrong[0]!r}. "
            "Choose a model trained for this, or another kind in [task]"
        )
    std = float(getattr(model.config, "initializer_range", 0.02))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key in sorted(fresh):
            if key.endswith("bias"):
                parameters[key].zero_()
            else:
                values = torch.randn(parameters[key].shape, generator=generator(seed, "head", key)) * std
                parameters[key].copy_(values)


def _layers(model: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    """Adaptable layers and their (out, in), in the model's order."""
    head = set(head_modules(model))
    embeddings: Any = getattr(model, "get_output_embeddings", None)
    output = None if embeddings is None else embeddings()
    for name, layer in model.named_modules():
        if name in head or layer is output:
            continue
        if isinstance(layer, nn.Linear):
            yield name, (layer.out_features, layer.in_features)
        elif is_conv1d(layer):
            n, m = layer.get_parameter("weight").shape
            yield name, (int(m), int(n))


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _ending(name: str) -> str:
    """The last word of a layer's name; with the one before it where it is a number, which other modules end in too."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def _endings(model: nn.Module) -> list[str]:
    return sorted({_ending(name) for name, _ in _layers(model)})


def _peft_refuses(model: nn.Module, name: str) -> bool:
    return model_type(model) in _STATE_SPACE and _ending(name) == "out_proj"


def _cpu_has_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return any(word in flags for word in ("avx512_bf16", "amx_bf16"))
