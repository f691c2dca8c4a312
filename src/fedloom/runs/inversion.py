"""What a server can read from one plain upload: the tokens of a client's rows, from the row space of a gradient.

The gradient of A is scale (B'g)' x summed over tokens: its rows lie in the span of the tokens' inputs x to that layer. At the
first layer x depends on a token and its position alone, so that every token of the vocabulary can be tried at every position.
Petrov et al., "DAGER: Exact gradient inversion for large language models", NeurIPS 2024, arXiv 2405.15586. The attacker is
told the rows' lengths.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fedloom.core import State, Visit
from fedloom.data.tokenize import Encoded
from fedloom.models.blocks import below
from fedloom.runs.experiment import Experiment
from fedloom.train.optim import Settings

ROWS = (1, 2, 4)
"""Rows of the batches that are tried."""
AT_ONCE = 256
"""Vocabulary tokens in one pass."""


class _Stop(Exception):
    """The first layer was reached: what comes after it is of no use."""


def tokens_found(e: Experiment, state: State, client: int = 0) -> dict[str, Any]:
    """`found / all` tokens of batches of some rows, from an upload of one step that starts at this state."""
    one = e.clients[client]
    rows = e.rows_of(one.id)
    work = e.method.model(e.method.serve(state, one), e.head, Visit(1, one, e.sites))
    if "A" not in work.train:
        return {"tokens": "A is not trained: this attack has no gradient to read"}
    if not any(bool(x.any()) for x in work.train.get("B", work.fixed.get("B", {})).values()):
        return {"tokens": "B is zero: the gradient of A is too"}
    if below(e.base.model, e.sites):
        return {
            "tokens": "the first block has no adapter: this attack tries tokens one by one, and later blocks mix them"
        }
    inputs = _FirstInputs(e, state)
    found: dict[str, Any] = {}
    for count in ROWS:
        batch = rows.select(list(range(min(count, len(rows)))))
        settings, e.trainer.settings = (
            e.trainer.settings,
            Settings(optimizer="sgd", lr=1.0, clip=None, batch_size=count),
        )
        try:
            done = e.trainer.fit([(one, replace(work, optimizer="sgd", steps=1, lr=1.0))], [batch], 1)[0]
        finally:
            e.trainer.settings = settings
        moves = [work.train["A"][site] - x for site, x in done.state["A"].items() if site in inputs.sites]
        hits, total = _match(batch, torch.cat(moves), inputs)
        found[f"tokens of {count} rows"] = f"{hits} / {total}"
    return found


def _match(batch: Encoded, grads: Tensor, inputs: _FirstInputs) -> tuple[int, int]:
    """(tokens found, tokens there): at each position as many tokens are named as there are different ones."""
    _, sizes, right = torch.linalg.svd(grads.double(), full_matrices=False)
    basis = right[sizes > 1e-4 * sizes[0]].float()  # (k, n)
    L = int(batch.lengths.max())
    there: list[set[int]] = [set() for _ in range(L)]
    for first, n in zip(batch.offsets[:-1], batch.lengths, strict=True):
        for p in range(int(n)):
            there[p].add(int(batch.tokens[first + p]))
    distance = torch.cat([_distances(x, basis) for x in inputs.of_vocabulary(L)])  # (V, L)
    hits = 0
    for p, tokens in enumerate(there):
        named = distance[:, p].topk(len(tokens), largest=False).indices.tolist()
        hits += len(tokens & set(named))
    return hits, sum(map(len, there))


def _distances(x: Tensor, basis: Tensor) -> Tensor:
    """(V, L, n) -> (V, L): how far each input is from the span, over its length."""
    inside = (x @ basis.T).square().sum(-1)
    return 1 - inside / x.square().sum(-1).clamp_min(1e-12)


class _FirstInputs:
    """What goes into the first adapted layers, for any token at any position."""

    def __init__(self, e: Experiment, state: State) -> None:
        self.e, self._model = e, e.global_model(state)
        seen = self._run(torch.zeros(1, 2, dtype=torch.int64))
        first = next(iter(seen))
        self.first = first
        self.sites = {site for site, x in seen.items() if x.shape == seen[first].shape and torch.equal(x, seen[first])}

    def of_vocabulary(self, L: int) -> list[Tensor]:
        """Chunks (v, L, n) over the vocabulary: every token at every position."""
        vocabulary = len(self._embeddings().weight)
        made = []
        for low in range(0, vocabulary, AT_ONCE):
            ids = torch.arange(low, min(vocabulary, low + AT_ONCE)).unsqueeze(1).expand(-1, L)
            made.append(self._run(ids, self.first)[self.first])
        return made

    def _embeddings(self) -> nn.Embedding:
        # transformers' models, which a base is, have it; torch's type does not know.
        found: object = getattr(self.e.base.model, "get_input_embeddings")()  # noqa: B009
        assert isinstance(found, nn.Embedding)
        return found

    def _run(self, ids: Tensor, until: str | None = None) -> dict[str, Tensor]:
        """Site -> its input (v, L, n); of the sites before and including `until`, or of the model's whole first layers."""
        seen: dict[str, Tensor] = {}

        def note(site: str, module: nn.Module, given: tuple[Tensor, ...]) -> None:
            seen.setdefault(site, given[0].detach().float().cpu())
            if site == until:
                raise _Stop

        with torch.no_grad(), self.e.trainer.loaded(self._model, self.e.rows.eval) as model:
            hooks = [
                model.get_submodule(site).register_forward_pre_hook(lambda m, x, site=site: note(site, m, x))
                for site in self.e.sites
            ]
            try:
                model(input_ids=ids.to(self.e.device), attention_mask=torch.ones_like(ids).to(self.e.device))
            except _Stop:
                pass
            finally:
                for hook in hooks:
                    hook.remove()
        return seen
