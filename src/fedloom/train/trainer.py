"""Local training and evaluation of clients: the only place where a model, data and gradients meet."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedloom.core import Client, Trained, Work
from fedloom.data.batches import Encoded, schedule
from fedloom.exhaustion import RowsAtOnce
from fedloom.rng import seed_of
from fedloom.train import determinism, local_steps, private_steps
from fedloom.train.adapted_model import AdaptedModel, Feed, KernelChoice
from fedloom.train.ahead import in_turn
from fedloom.train.attention import AttentionName
from fedloom.train.flat_parameters import AdapterStack, flatten
from fedloom.train.frozen_prefix import DEFAULT_BYTES, Told
from fedloom.train.loss import cross_entropy, summed_losses
from fedloom.train.optim import Settings


@dataclass(frozen=True)
class Evaluation:
    """What a model said about one data set, in the order of its rows."""

    loss: float
    """Mean over the rows, or over the answer tokens of a causal LM (its exponential is the perplexity)."""
    count: int
    """Rows, or answer tokens, that the loss is a mean of."""
    logits: Tensor | None = None
    """(n, classes); None for a causal LM."""
    predictions: Tensor | None = None
    """(n,) class index or value; None for a causal LM."""


class Scorer(Protocol):
    """What scores are made with: a trainer, here or elsewhere."""

    def evaluate_together(self, works: Sequence[Work], data: Sequence[Encoded]) -> list[Evaluation]:
        """Loss and predictions of each work on rows of its own, row by row."""
        ...

    def log_likelihoods(self, work: Work, data: Encoded) -> NDArray[np.float64]:
        """(n,) of each row's answer."""
        ...

    def generate(self, work: Work, data: Encoded, max_new_tokens: int) -> list[list[int]]:
        """The greedy answer to each row's prompt."""
        ...


class Trainer:
    """Trains and evaluates clients on one model, which it owns until `close`: frozen, cast, moved and adapted in place."""

    def __init__(
        self,
        model: nn.Module,
        sites: Iterable[str],
        heads: Iterable[str] = (),
        *,
        settings: Settings | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        attention: AttentionName | Literal["auto"] = "auto",
        kernels: KernelChoice = "auto",
        prefix_bytes: int = DEFAULT_BYTES,
        ahead: bool | None = None,
    ) -> None:
        """`sites` are the layers that get an adapter, `heads` those trained whole, both names of modules.

        `dtype` is that of the frozen base. What is trained is float32 always, or float64 where a state is, and then
        everything computes in float64. `kernels` chooses hand-written kernels where they compute the same as the readable
        path, or never. What frozen blocks below all sites make of the rows takes `prefix_bytes` at most. With
        `ahead`, by default on a GPU alone, a thread makes the next batch while the device works. Raises ModelError
        for a name that is no linear layer, or a model that cannot recompute activations or multiply in int8.
        """
        self.settings = settings if settings is not None else Settings()
        if self.settings.deterministic:
            determinism.prepare()
        self._model = AdaptedModel(model, sites, heads, torch.device(device), dtype, attention, kernels, prefix_bytes)
        self.rows_at_once = RowsAtOnce()
        self._ahead = self._model.device.type == "cuda" if ahead is None else ahead
        if self.settings.checkpointing:
            self._model.blocks()
        if self.settings.int8_products:
            self._model.require_int8()

    @property
    def prefix(self) -> Told | None:
        """The frozen blocks below all sites, and what was kept of them; None if there are none, or with kernels off."""
        return self._model.prefix

    def close(self) -> None:
        """Give the model back with its own layers in place."""
        self._model.close()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def fit(
        self, works: Sequence[tuple[Client, Work]], data: Sequence[Encoded], t: int, part: int = 0
    ) -> list[Trained]:
        """Train each client on its data in round t, together where their works have the same roles, sites, base and gates.

        `part` counts the works of a visit: each has batches of its own.

        Results are in the order of `works`, tensors on the CPU in float32 (float64 where the state was). Nothing that is
        handed in is changed. A client's result does not depend on the others, up to the order of floating-point sums.
        """
        s = self.settings
        epochs = 1 if s.local_steps is None and s.local_epochs is None else s.local_epochs
        passes: dict[object, list[tuple[int, local_steps.Member]]] = {}
        for i, ((client, work), encoded) in enumerate(zip(works, data, strict=True)):
            key = (s.seed, t, client.id, *((part,) if part else ()))
            steps = s.local_steps if work.steps is None else work.steps
            plan = schedule(encoded.lengths, s.batch_size, key, steps=steps, epochs=epochs if steps is None else None)
            if s.private is not None:
                plan = private_steps.plan(s.private, client, work, len(encoded), s.batch_size, len(plan), t, part)
            member = local_steps.Member(client, work, encoded, plan, local_steps.gate_shape(work))
            passes.setdefault(_batching_key(work, encoded, member.gate), []).append((i, member))
        results: dict[int, Trained] = {}
        for members in passes.values():
            members.sort(key=lambda pair: -len(pair[1].plan))
            results.update(zip([i for i, _ in members], self._together([m for _, m in members], t, part), strict=True))
        return [results[i] for i in range(len(results))]

    def _together(self, members: Sequence[local_steps.Member], t: int, part: int) -> list[Trained]:
        with torch.random.fork_rng(enabled=self.settings.base_dropout):
            if self.settings.base_dropout:
                key = (*(m.client.id for m in members), *((part,) if part else ()))
                torch.manual_seed(seed_of(self.settings.seed, t, *key, "base dropout"))
            try:
                with self._exactly():
                    return local_steps.run(self._model, members, self.settings, t, part, self._ahead)
            finally:
                self._model.rest()

    def _exactly(self) -> AbstractContextManager[None]:
        return determinism.deterministic(self.settings.deterministic)

    def evaluate(self, work: Work, data: Encoded, batch_size: int | None = None) -> Evaluation:
        """Loss and predictions, row by row, of the model that `work` describes."""
        return self.evaluate_together([work], [data], batch_size)[0]

    def evaluate_together(
        self, works: Sequence[Work], data: Sequence[Encoded], batch_size: int | None = None
    ) -> list[Evaluation]:
        """What `evaluate` finds for each work on its own rows.

        Works whose rows fill one batch together are scored in one pass, where they could train in one; the result is that of
        each alone, up to the order of floating-point sums.
        """

        def scored(size: int) -> list[Evaluation]:
            found: dict[int, Evaluation] = {}
            for group in _passes(works, data, size):
                some = self._evaluate([works[i] for i in group], [data[i] for i in group], size)
                found |= zip(group, some, strict=True)
            return [found[i] for i in range(len(works))]

        return self.rows_at_once(batch_size or 8 * self.settings.batch_size, scored)

    def _evaluate(self, works: Sequence[Work], data: Sequence[Encoded], size: int) -> list[Evaluation]:
        """Of works scored together: all their rows in one batch, or a single work's in as many as it takes."""
        orders = [np.argsort(rows.lengths, kind="stable") for rows in data]
        told: list[Tensor] = []
        found: list[Tensor] = []

        def batch(i: int) -> Feed:
            rows = slice(i * size, (i + 1) * size)
            return self._model.feed([(each, order[rows]) for each, order in zip(data, orders, strict=True)])

        batches = in_turn(batch, -(-max(map(len, orders)) // size), self._model.device, self._ahead)
        # No inference mode: a cast made in it could not be trained on. Nothing waits for the device but its end.
        with self._exactly(), torch.no_grad(), Loaded(self._model, works, data, pack=True), batches as coming:
            self._model.foresee(list(zip(data, orders, strict=True)))
            for feed in coming:
                logits = self._model.logits(feed)
                told.append(torch.stack(summed_losses(data[0].kind, logits, feed.targets), 1))
                if data[0].kind != "causal-lm":
                    found.append(logits.to(torch.promote_types(logits.dtype, torch.float32)))
        sums = torch.stack(told).sum(0).tolist() if told else [(0.0, 0.0)] * len(works)
        each = torch.split(torch.cat(found).cpu(), [len(order) for order in orders]) if found else [None] * len(works)
        return [
            _evaluation(rows, order, x, *sums[k])
            for k, (rows, order, x) in enumerate(zip(data, orders, each, strict=True))
        ]

    def log_likelihoods(self, work: Work, data: Encoded, batch_size: int | None = None) -> NDArray[np.float64]:
        """(n,) log-likelihood of each row's answer tokens behind its prompt, of a causal LM."""
        size = batch_size or 8 * self.settings.batch_size
        return self.rows_at_once(size, partial(self._log_likelihoods, work, data))

    def _log_likelihoods(self, work: Work, data: Encoded, size: int) -> NDArray[np.float64]:
        rows = np.argsort(data.lengths, kind="stable")
        found = np.zeros(len(data))
        with self._exactly(), torch.no_grad(), Loaded(self._model, [work], [data], pack=True):
            self._model.foresee([(data, rows)])
            for first in range(0, len(rows), size):
                chosen = rows[first : first + size]
                feed = self._model.feed([(data, chosen)])
                logits = self._model.logits(feed)
                each = cross_entropy(logits, feed.targets.labels.to(logits.device)).double().cpu()
                sums = torch.zeros(len(chosen), dtype=each.dtype).index_add_(0, feed.targets.row.cpu(), each)
                found[chosen] = -sums.numpy()
        return found

    def generate(
        self, work: Work, data: Encoded, max_new_tokens: int = 64, batch_size: int | None = None
    ) -> list[list[int]]:
        """The greedy answer to each row's prompt (its tokens before `starts`), without the end token, in row order."""
        if data.starts is None:
            raise ValueError(f"answers are generated by a causal LM, got data of kind {data.kind!r}")
        size = batch_size or 8 * self.settings.batch_size
        return self.rows_at_once(size, partial(self._generate, work, data, max_new_tokens))

    def _generate(self, work: Work, data: Encoded, max_new_tokens: int, size: int) -> list[list[int]]:
        assert data.starts is not None, "of a causal LM"
        rows = np.argsort(data.starts, kind="stable")
        answers: dict[int, list[int]] = {}
        with self._exactly(), torch.no_grad(), self.loaded(work, data) as model:
            for first in range(0, len(rows), size):
                chosen = rows[first : first + size]
                answers.update(zip(chosen.tolist(), _greedy(model, data, chosen, max_new_tokens), strict=True))
        return [answers[i] for i in range(len(data))]

    def loaded(self, work: Work, data: Encoded) -> Loaded:
        """The model as one client's `work` describes it, for the length of a `with` block, to be called as any other.

        `data` is only looked at for its kind and the length of its rows.
        """
        return Loaded(self._model, [work], [data])


class Loaded:
    """A context that holds the adapter, head and offset of one client or of several on the model, as constants.

    With `pack` it is fed by `AdaptedModel.logits` alone, without padding where the architecture allows; else as any other.
    """

    def __init__(self, model: AdaptedModel, works: Sequence[Work], data: Sequence[Encoded], pack: bool = False) -> None:
        self._model, self._works, self._data, self._pack = model, works, data, pack

    def __enter__(self) -> nn.Module:
        model, works = self._model, self._works
        dtype = local_steps.state_dtype(works)
        kernels = not local_steps.gate_shape(works[0])
        compute = model.ready(
            dtype, works[0].base, self._data, kernels=kernels, pack=self._pack and kernels, prefix=self._pack
        )
        layout, flat = flatten([work.train for work in works], dtype, model.device)
        fixed = [local_steps.moved(work.fixed, dtype, model.device) for work in works]
        factors, views = AdapterStack([work.adapter for work in works], layout, fixed)(flat, compute)
        scale = torch.tensor([work.scale for work in works], dtype=compute, device=model.device).view(-1, 1, 1)
        model.put(factors, scale, local_steps.heads(views, local_steps.stacked_heads(fixed, compute), len(works)))
        return model.model

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._model.rest()


def _batching_key(work: Work, data: Encoded, gate: local_steps.GateShape) -> object:
    """Works that are equal here can be in one pass."""
    roles = tuple(sorted((role, site) for role, group in work.train.items() for site in group))
    fixed = tuple(sorted((role, site) for role, group in work.fixed.items() for site in group))
    base = tuple(sorted((role, site, id(x)) for role, group in work.base.items() for site, x in group.items()))
    return roles, fixed, base, gate, work.optimizer, local_steps.state_dtype([work]), data.kind


def _passes(works: Sequence[Work], data: Sequence[Encoded], size: int) -> list[list[int]]:
    """Which works are scored together: those that could train together, as long as their rows are no more than `size`."""
    passes: list[list[int]] = []
    going: dict[object, tuple[int, int]] = {}  # (pass, its rows)
    for i, (work, rows) in enumerate(zip(works, data, strict=True)):
        key = _batching_key(work, rows, local_steps.gate_shape(work))
        at, filled = going.get(key, (-1, size))
        if filled + len(rows) > size:
            at, filled = len(passes), 0
            passes.append([])
        passes[at].append(i)
        going[key] = at, filled + len(rows)
    return passes


def _evaluation(
    data: Encoded, order: NDArray[np.int64], logits: Tensor | None, total: float, count: float
) -> Evaluation:
    """What was found for one work's rows, whose logits come in `order`."""
    loss = total / count if count else math.nan
    if logits is None:
        return Evaluation(loss, int(count))
    logits = torch.empty_like(logits).index_copy_(0, torch.from_numpy(order), logits)
    predictions = logits.argmax(1) if data.kind == "classification" else logits.squeeze(1)
    return Evaluation(loss, int(count), logits, predictions)


def _greedy(model: nn.Module, data: Encoded, rows: NDArray[np.int64], max_new_tokens: int) -> list[list[int]]:
    """Generate from the prompts of some rows, padded on the left."""
    assert data.starts is not None
    device = next(model.parameters()).device
    prompts = [data.tokens[first : first + n] for first, n in zip(data.offsets[rows], data.starts[rows], strict=True)]
    L = max(map(len, prompts))
    ids = torch.full((len(rows), L), data.pad_id)
    mask = torch.zeros(len(rows), L, dtype=torch.int64)
    for i, prompt in enumerate(prompts):
        ids[i, L - len(prompt) :] = torch.from_numpy(prompt)
        mask[i, L - len(prompt) :] = 1
    # transformers' generation mixin is unknown to the type of nn.Module.
    made: Tensor = getattr(model, "generate")(  # noqa: B009
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=data.pad_id,
    )
    end = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {end} if isinstance(end, int) else set(end or ())
    answers: list[list[int]] = []
    for row in made[:, L:].tolist():
        stop = next((i for i, token in enumerate(row) if token in ends), len(row))
        answers.append(row[:stop])
    return answers
