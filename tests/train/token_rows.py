"""Random rows of tokens, for models that know 60 of them."""

from __future__ import annotations

import numpy as np

from fedloom.data.batches import Encoded, Kind

VOCAB = 60


def token_rows(kind: Kind, n: int, seed: int, longest: int) -> Encoded:
    """n rows of 4 to `longest` tokens; of a causal LM the second half is the answer."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, longest + 1, n)
    return Encoded(
        tokens=rng.integers(3, VOCAB, lengths.sum()).astype(np.int32),
        offsets=np.concatenate(([0], np.cumsum(lengths))),
        pad_id=0,
        kind=kind,
        targets=rng.integers(0, 3, n) if kind == "classification" else None,
        starts=lengths // 2 if kind == "causal-lm" else None,
    )
