"""Load a pretrained model and its tokenizer through transformers, frozen, and find the layers to adapt in it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedloom.data import hub, packaged
from fedloom.data.batches import Kind as Kind
from fedloom.errors import ModelError
from fedloom.models import code_cache, quantised, weights
from fedloom.models.quantised import Quantization as Quantization
from fedloom.models.reading import check_declared, reading
from fedloom.models.source import fetch, quiet
from fedloom.models.source import resolve as resolve
from fedloom.models.targets import all_linear as all_linear
from fedloom.models.targets import check_rank as check_rank
from fedloom.models.targets import check_sites as check_sites
from fedloom.models.targets import default_targets as default_targets
from fedloom.models.targets import find_sites as find_sites
from fedloom.models.targets import head_modules as head_modules
from fedloom.models.targets import is_conv1d as is_conv1d
from fedloom.models.usable import check_usable
from fedloom.rng import generator, seed_of
from fedloom.state import Group


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
    quantization: str | None = None
    """How its layers are quantised: by fedloom, or as the checkpoint says."""
    revision: str | None = None
    """Of a hub id, where one was asked for."""


def load_base(
    name: str,
    *,
    kind: Kind,
    num_labels: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    split: bool = False,
    seed: int = 0,
    attention: str | None = None,
    quantization: Quantization | None = None,
    on_status: Callable[[str], None] = lambda what: None,
) -> Base:
    """Load a packaged name, a local directory or a hub id for a task, frozen and in eval mode, with a padding token.

    Weights are read in `dtype` straight to `device`: of a file of that dtype there is one copy in memory, on a CPU the file's
    own pages. The head is float32 in `Base.head_weights` all the same. A new one is drawn from `seed` alone; torch's global
    generator is left as it was. `attention` is transformers' `attn_implementation`. With `quantization` every linear layer but
    the heads is coded, one after the other, on its way to the device. With `split` the model is spread over all GPUs, then
    memory, by accelerate. Raises ModelError if there is no such model or it does not fit the task, HubError if it is only on a
    hub that cannot be reached.
    """
    source = fetch(name, on_status=on_status)
    with quiet(), hub.access("model", name, ModelError, local=True), torch.random.fork_rng(devices=[]):
        import transformers

        path = str(source.directory)
        torch.manual_seed(seed_of(seed, "load"))
        check_declared(source.directory, name)
        with reading("configuration", name):
            config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        _check_architecture(config, name, kind)
        coded = _coded(name, config, quantization, split)
        # Layers are coded on their way to the device, which need not hold the dense model.
        options = _options(kind, num_labels, dtype, "cpu" if quantization else device, split, attention)
        weights.weight_files(source.directory)
        with reading("tokenizer", name):
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        with reading("configuration or weights", name):
            weights.check_stored(source.directory, coded is not None)
            model, info = _loaded(kind, path, options, name, coded)
        packed = name in packaged.MODELS and source.name == path
        digest = packaged.weights_sha256(name) if packed else weights.sha256(source.directory)
    quantised.take_over(model)
    head = head_modules(model)
    _check_head(model, head, name)
    _restore_head(model, head, source.directory, dtype)
    _draw(model, set(info["missing_keys"]), info["mismatched_keys"], head, seed, name, kind)
    check = partial(check_usable, name, model, tokenizer)
    if quantization is None:
        check()  # older transformers leave what is missing as memory had it, until it is drawn
    else:
        keep = {*head, *_vocabulary(model)}
        file = code_cache.place(digest, quantization, dtype, device, keep)
        code_cache.quantise(model, quantization, keep, device, file, check, on_status)
        digest = hashlib.sha256(f"{digest} {quantised.settings(quantization)}".encode()).hexdigest()
    made = _frozen(model, tokenizer, source.name, digest, dtype)
    return replace(made, quantization=quantization or coded, revision=source.revision)


def _coded(name: str, config: Any, quantization: Quantization | None, split: bool) -> str | None:
    """How the checkpoint is quantised already, if it is. Raises ModelError if it is to be quantised all the same, or split."""
    coded = quantised.method(config)
    if coded and quantization:
        raise ModelError(f"model {name!r} is quantised already ({coded}): take model.quantization out of the run file")
    if split and quantization:
        raise ModelError(
            f"model {name!r} is to be quantised, on one device, and split over several: choose one of both"
        )
    return coded


def _options(
    kind: Kind, num_labels: int, dtype: torch.dtype, device: torch.device | str, split: bool, attention: str | None
) -> dict[str, Any]:
    """Of transformers' `from_pretrained`."""
    # Of shapes that do not fit, `_draw` says which; code of the model's author is not even asked for.
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    options["trust_remote_code"] = False
    if kind != "causal-lm":
        problem = "regression" if kind == "regression" else "single_label_classification"
        options |= {"num_labels": num_labels, "problem_type": problem}
    if split:
        options["device_map"] = "auto"
    elif torch.device(device).type != "cpu":
        options["device_map"] = {"": str(device)}
    if attention is not None:
        options["attn_implementation"] = attention
    return options


def _vocabulary(model: Any) -> list[str]:
    """The name of the vocabulary head, if there is one."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if head is not None and module is head]


def _loaded(kind: Kind, source: str, options: dict[str, Any], name: str, coded: str | None) -> tuple[Any, Any]:
    """(model, loading info)."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    loader: Any = AutoModelForCausalLM if kind == "causal-lm" else AutoModelForSequenceClassification
    if coded and "bitsandbytes" in coded:
        quantised.bitsandbytes()
    try:
        model, info = loader.from_pretrained(source, **options)
    except (ImportError, NotImplementedError) as error:
        if coded is None:
            raise
        lacks = (
            "what reads that is not installed"
            if isinstance(error, ImportError)
            else "this transformers cannot read that"
        )
        raise ModelError(
            f"model {name!r} is quantised ({coded}), and {lacks}: {' '.join(str(error).split())[:300]}"
        ) from error
    return model, info


def _check_head(model: nn.Module, head: Iterable[str], name: str) -> None:
    for module in head:
        layer = model.get_submodule(module)
        if not quantised.is_plain(layer):
            raise ModelError(
                f"the task head of model {name!r} ({module}) is quantised, and it is trained whole: expected one in full "
                "precision; quantise the model again with llm_int8_skip_modules naming it"
            )


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
    quantised.take_over(model)
    _check_head(model, head_modules(model), name)
    dtype = next(x.dtype for x in model.parameters() if x.is_floating_point())
    return replace(_frozen(model, tokenizer, name, digest.hexdigest(), dtype), quantization=quantised.method(config))


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


def _restore_head(model: nn.Module, head: Sequence[str], directory: Path, dtype: torch.dtype) -> None:
    """Make the head float32, whatever the base's dtype, with the checkpoint's values where reading it rounded them."""
    for module in head:
        model.get_submodule(module).float()
    if not head or dtype == torch.float32:
        return
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


def _check_architecture(config: Any, name: str, kind: Kind) -> None:
    """Refuse, before any weights are read, what has no head for the task or reads a sequence to write another."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if config.is_encoder_decoder:
        raise ModelError(
            f"model {name!r} is an encoder-decoder ({config.model_type}), which fedloom does not train: choose a decoder such "
            "as a Llama for causal-lm, or an encoder such as RoBERTa for classification"
        )
    loader: Any = AutoModelForCausalLM if kind == "causal-lm" else AutoModelForSequenceClassification
    if type(config) not in loader._model_mapping:
        raise ModelError(
            f"model {name!r} ({config.model_type}) cannot be used for {kind}: transformers has no "
            f"{loader.__name__} of it; choose another model, or another kind in [task]"
        )


def _draw(
    model: nn.Module,
    missing: set[str],
    mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]],
    head: Sequence[str],
    seed: int,
    name: str,
    kind: Kind,
) -> None:
    """Draw the parameters that the checkpoint does not have, in float32, each from the seed and its own name.

    `mismatched` are those that it has in another shape, as (name, its shape, the model's).

    Only a task head and a pooler in front of it may be missing: a base with random layers must not pass for a pretrained one.
    """
    allowed = {f"{module}.{leaf}" for module in head for leaf in ("weight", "bias")}
    for key, found, expected in sorted(mismatched):
        if key not in allowed:
            raise ModelError(
                f"the weights of model {name!r} do not fit its config.json: {key!r} is {list(found)}, expected "
                f"{list(expected)}. Get the model's files again, all of one version"
            )
        missing = missing | {key}
    wrong = sorted(key for key in missing if key not in allowed and "pooler" not in key.split("."))
    if wrong:
        task = "a causal LM" if kind == "causal-lm" else f"a base for {kind}"
        raise ModelError(
            f"model {name!r} cannot be used as {task}: its files lack {len(wrong)} parameters such as {wrong[0]!r}. "
            "Choose a model trained for this, or another kind in [task]"
        )
    std = float(getattr(model.config, "initializer_range", 0.02))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key in sorted(missing):
            if key.endswith("bias"):
                parameters[key].zero_()
            else:
                values = torch.randn(parameters[key].shape, generator=generator(seed, "head", key)) * std
                parameters[key].copy_(values)
