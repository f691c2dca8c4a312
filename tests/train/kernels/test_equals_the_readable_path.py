"""The kernels compute what the readable path does: losses, gradients and trained parameters, whatever the rows and budgets."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GemmaConfig, GemmaForCausalLM, MistralConfig, MistralForCausalLM

import fedloom.train
from fedloom.core import Client, Factors, State, Trained, Work
from fedloom.data.batches import Encoded
from fedloom.train.kernels import lora_linear, packing
from fedloom.train.kernels.packed_inputs import readers
from fedloom.train.optim import Settings
from fedloom.train.trainer import Trainer

ENCODERS = ("bert", "roberta", "xlm-roberta")
DECODERS = ("llama", "gpt2", "qwen2")
LENGTHS = {
    "different lengths and numbers of rows": [[3, 9, 17, 2], [5], [20, 20, 1]],
    "full rows and a client with fewer": [[16, 16, 16], [16, 16], [16]],
    "full rows": [[16, 16], [16, 16]],
    "long rows": [[34, 30], [3, 2], [11, 33]],
    "one token": [[1], [1, 1], [2]],
    "unlike lengths": [[5, 100, 9], [40, 3], [70, 2, 2]],
    "one client": [[3, 9, 17, 2, 40]],
}
MIXED = LENGTHS["different lengths and numbers of rows"]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 0.05}
"""Of the gradient, relative to its largest entry. bfloat16 has 8 bits: one rounding is 0.004."""


def of_lengths(lengths: list[int], kind: Any, seed: int = 0) -> Encoded:
    """Token rows of given lengths."""
    rng = np.random.default_rng(seed)
    n = len(lengths)
    return Encoded(
        tokens=rng.integers(3, 40, sum(lengths)).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        pad_id=0,
        kind=kind,
        targets=None
        if kind == "causal-lm"
        else rng.integers(0, 2, n).astype(np.float32 if kind == "regression" else np.int64),
        starts=np.asarray([max(1, x // 2) for x in lengths]) if kind == "causal-lm" else None,
    )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel was called: that a test compares what it says."""
    found: Counter[str] = Counter()
    for module, name in ((lora_linear, "lora_matmul"), (packing, "pack_rows")):
        real = getattr(module, name)

        def counted(*given: Any, real: Any = real, name: str = name) -> Any:
            found[name] += 1
            return real(*given)

        monkeypatch.setattr(module, name, counted)
    return found


def both(
    family: Any, works: Sequence[tuple[Client, Work]], data: Sequence[Encoded], settings: Settings, **options: Any
) -> tuple[list[Trained], list[Trained]]:
    """Trained with kernels, and without."""
    results = []
    for kernels in ("auto", "off"):
        with Trainer(
            family.model, family.sites, family.heads, settings=settings, kernels=kernels, **options
        ) as trainer:
            results.append(trainer.fit(works, data, 1))
    return results[0], results[1]


def assert_close(ours: Sequence[Trained], theirs: Sequence[Trained], atol: float) -> None:
    for one, two in zip(ours, theirs, strict=True):
        assert one.loss == pytest.approx(two.loss, abs=atol, nan_ok=True)
        for role, group in two.state.items():
            for site, x in group.items():
                torch.testing.assert_close(one.state[role][site], x, rtol=0, atol=atol)


@pytest.mark.parametrize("few_shapes", [False, True])
@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS])
@pytest.mark.parametrize("case", LENGTHS)
def test_whatever_the_lengths_of_rows(
    name: str, case: str, few_shapes: bool, build: Any, works: Any, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "rounds", lambda *_: few_shapes)
    family = build(name)
    clients = works(family, ranks=[2, 4, 3][: len(LENGTHS[case])])
    data = [of_lengths(lengths, family.kind, k) for k, lengths in enumerate(LENGTHS[case])]
    packed, readable = both(family, clients, data, Settings(lr=0.01, batch_size=4, local_steps=2))
    assert_close(packed, readable, 1e-9)
    assert calls["lora_matmul"] and calls["pack_rows"]


def offset_of(family: Any, work: Work, form: str) -> State:
    torch.manual_seed(1)
    left = {s: torch.randn(len(w), 2).double() * 0.1 for s, w in work.train["B"].items()}
    right = {s: torch.randn(2, w.shape[1]).double() for s, w in work.train["A"].items()}
    if form == "dense":
        return {"left": {s: left[s] @ right[s] for s in left}}
    return {"left": left, "right": right} if form == "factors" else {}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("offset", ["none", "factors", "dense"])
@pytest.mark.parametrize("trained", ["A and B", "B alone"])
@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS, "gpt2-classifier"])
def test_losses_and_gradients(
    name: str, trained: str, offset: str, dtype: torch.dtype, build: Any, works: Any, calls: Counter[str]
) -> None:
    family = build(name)
    clients = works(family, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    base = offset_of(family, clients[0][1], offset)
    clients = [(c, replace(w, base=base)) for c, w in clients]
    if trained == "B alone":
        clients = [(c, replace(w, train=without_A(w.train), fixed={"A": w.train["A"]})) for c, w in clients]
    data = [of_lengths(lengths, family.kind, k) for k, lengths in enumerate(MIXED)]
    # One step of plain gradient descent, so large that what it takes away is the gradient to the last digit.
    step = Settings(lr=1e4, optimizer="sgd", clip=None, local_steps=1)
    ours, theirs = both(family, clients, data, step, dtype=torch.float32 if dtype == torch.float64 else dtype)
    tolerance = TOLERANCE[dtype]
    for one, two, (_, work) in zip(ours, theirs, clients, strict=True):
        assert one.loss == pytest.approx(two.loss, rel=tolerance)
        for role, group in work.train.items():
            largest = max(float((two.state[role][site] - x).abs().max()) for site, x in group.items())
            assert largest > 0
            for site in group:
                apart = float((one.state[role][site] - two.state[role][site]).abs().max())
                assert apart <= tolerance * largest, f"{role} {site}"
    assert calls["lora_matmul"]
    assert bool(calls["pack_rows"]) == (name != "gpt2-classifier")


def without_A(state: State) -> State:
    return {role: group for role, group in state.items() if role != "A"}


def gated(train: State, fixed: State) -> Factors:
    return Factors(train["A"], train["B"], train["gate"])


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("why", ["dropout", "base dropout", "gate"])
def test_what_the_kernels_have_not_takes_the_readable_path_by_itself(
    name: str, why: str, build: Any, works: Any, calls: Counter[str]
) -> None:
    family = build(name)
    clients = works(family, ranks=[2, 4, 4])
    if why == "gate":
        gates = {site: torch.randn(2, x.shape[1]).double() for site, x in clients[0][1].train["A"].items()}
        clients = [(c, replace(w, train=w.train | {"gate": gates}, adapter=gated)) for c, w in clients]
    data = [of_lengths(lengths, family.kind, k) for k, lengths in enumerate(MIXED)]
    settings = Settings(lr=0.01, dropout=0.2 if why == "dropout" else 0.0, base_dropout=why == "base dropout")
    auto, off = both(family, clients, data, settings)
    assert_close(auto, off, 0.0)
    assert not calls


def test_a_layer_that_is_more_than_its_weight_takes_the_readable_path(
    build: Any, works: Any, rows: Any, calls: Counter[str]
) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    family = build("bert")
    site = family.sites[0]
    parent, _, child = site.rpartition(".")
    setattr(family.model.get_submodule(parent), child, Doubled(16, 16))
    auto, off = both(family, works(family), [rows(n, family.kind, n) for n in (4, 11, 7)], Settings(lr=0.01))
    assert_close(auto, off, 0.0)
    assert not calls


@pytest.mark.parametrize("kind", ["classification", "causal-lm"])
def test_fused_and_plain_attention_agree_on_packed_rows(
    kind: str, build: Any, works: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = build("bert" if kind == "classification" else "llama")
    clients = works(family, ranks=[2, 4])
    data = [of_lengths([3, 9, 17, 2], family.kind), of_lengths([20, 1], family.kind)]
    results = []
    for choice in ("eager", "sdpa"):
        monkeypatch.setattr("fedloom.train.kernels.packed_attention.choose", lambda *_, choice=choice: choice)
        with Trainer(family.model, family.sites, family.heads, settings=Settings(lr=0.01)) as trainer:
            results.append(trainer.fit(clients, data, 1))
    assert_close(*results, 1e-9)


def test_sentence_pairs_keep_their_token_types(build: Any, works: Any, calls: Counter[str]) -> None:
    family = build("bert")
    clients = works(family, ranks=[2])
    data = of_lengths([5, 9, 12], family.kind)
    pairs = replace(data, token_types=(np.arange(26) % 3 == 0).astype(np.int8))
    packed, readable = both(family, clients, [pairs], Settings(lr=0.01))
    assert calls["pack_rows"]
    assert_close(packed, readable, 1e-9)
    with Trainer(family.model, family.sites, family.heads) as trainer:
        assert not torch.allclose(*(trainer.evaluate(clients[0][1], x).logits for x in (pairs, data)), atol=1e-4)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2-classifier"])
def test_evaluation(name: str, build: Any, works: Any, calls: Counter[str]) -> None:
    family = build(name)
    ((_, work),) = works(family, ranks=[3])
    data = of_lengths([5, 9, 12, 30], family.kind)
    scores = []
    for kernels in ("auto", "off"):
        with Trainer(family.model, family.sites, family.heads, kernels=kernels) as trainer:  # type: ignore[arg-type]
            scores.append(trainer.evaluate(work, data).loss)
    assert scores[0] == pytest.approx(scores[1], abs=1e-9)
    assert calls["lora_matmul"] and bool(calls["pack_rows"]) == (name != "gpt2-classifier")


def test_which_batches_can_be_packed(build: Any) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    mistral = MistralForCausalLM(MistralConfig(vocab_size=40, num_key_value_heads=1, sliding_window=4, **small))
    assert readers(mistral, "causal-lm") == []
    gemma = GemmaForCausalLM(GemmaConfig(vocab_size=40, num_key_value_heads=1, head_dim=8, **small))
    assert readers(gemma, "causal-lm") is None
    assert readers(build("gpt2-classifier").model, "classification") is None
    assert readers(torch.nn.Linear(2, 2), "classification") is None
    assert readers(build("bert").model, "classification") == ["bert.encoder.layer.1.attention.output", "bert.pooler"]
    for name in ("roberta", "xlm-roberta"):  # in the order of the forward pass, not in which the model declares them
        assert readers(build(name).model, "regression") == ["roberta.encoder.layer.1.attention.output", "classifier"]


def test_the_model_is_as_it_was_once_the_trainer_lets_go(build: Any, works: Any, rows: Any) -> None:
    for name in ("bert", "llama"):
        family = build(name)
        ids = torch.arange(3, 15).view(2, 6)
        before = family.model.eval()(input_ids=ids).logits
        kept = dict(family.model.named_modules())
        storages = {p.untyped_storage().data_ptr() for p in family.model.parameters()}
        with Trainer(family.model, family.sites, family.heads) as trainer:
            trainer.fit(works(family, ranks=[2], dtype=torch.float32), [rows(4, family.kind)], 1)
        torch.testing.assert_close(family.model(input_ids=ids).logits, before, rtol=0, atol=0)
        after = dict(family.model.named_modules())
        assert list(after) == list(kept) and all(after[n] is kept[n] and "forward" not in vars(kept[n]) for n in kept)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in kept.values())
        assert len({p.untyped_storage().data_ptr() for p in family.model.parameters()}) == len(storages)


def test_importing_the_trainer_changes_nothing_of_transformers() -> None:
    code = (
        "from transformers import AttentionInterface; before = list(AttentionInterface());"
        "import fedloom.train.trainer; assert list(AttentionInterface()) == before"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_readable_path_knows_the_kernels_at_one_door() -> None:
    train = Path(fedloom.train.__file__).parent
    importers = {path.name for path in train.glob("*.py") if "fedloom.train.kernels" in imported_by(path)}
    assert importers == {"adapted_model.py"}


def imported_by(path: Path) -> str:
    nodes = ast.walk(ast.parse(path.read_text()))
    return " ".join(ast.unparse(node) for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)))
