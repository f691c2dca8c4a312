"""Every architecture that the tests know, tiny and random: which path it takes, and how far it is from the plain path and PEFT.

python benchmarks/architectures.py [NAME ...]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.models import test_architectures as tests

from fedloom.data.batches import Kind
from fedloom.errors import ModelError

KINDS: dict[Kind, tuple[str, ...]] = {
    "classification": tests.CLASSIFIERS + tests.MORE_CLASSIFIERS,
    "causal-lm": tests.DECODERS + tests.MORE_DECODERS,
}


def row(name: str, kind: Kind) -> str:
    """A line of the table: the worse of short rows and long ones."""
    found = []
    for length in (9, 100):
        with tempfile.TemporaryDirectory() as folder:
            try:
                found.append(tests.check(name, kind, length, Path(folder)))
            except (AssertionError, ModelError) as error:
                return (
                    f"| {name} | {kind} | fails on rows of {length} tokens: {str(error).splitlines()[0][:80]} | | | | |"
                )
    one = found[0]
    targets = ", ".join(f"`{x}`" for x in one.targets)
    path = "packed" if one.packed else "padded"
    clients = "together" if one.together else "one by one"
    again = "yes" if one.checkpointing else "refused"
    plain, peft = (max(getattr(x, key) for x in found) for key in ("from_plain", "from_peft"))
    return f"| {name} | {kind} | {targets} | {path}, {clients} | {again} | {plain:.0e} | {peft:.0e} |"


def main() -> None:
    """Print the table."""
    print("| architecture | task | default targets | path | checkpointing | from the plain path | from PEFT |")
    print("|---|---|---|---|---|---|---|")
    for kind, names in KINDS.items():
        for name in names:
            if not sys.argv[1:] or name in sys.argv[1:]:
                print(row(name, kind), flush=True)


if __name__ == "__main__":
    main()
