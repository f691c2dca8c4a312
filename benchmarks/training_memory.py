"""What a training step really takes of memory, beside what `runs/memory.py` foretells of it.

    OMP_NUM_THREADS=1 python benchmarks/training_memory.py [--only smollm2] [--folder /tmp/training-memory]

Each line is a process of its own: one round of one step in which every row fills its length, nearly all of it answer where a
decoder is trained. Measured is how far the resident set grows from the end of round 0, which read all weights, to its peak.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from machine import describe

LINES: list[dict[str, Any]] = [
    *({"model": "minilm", "dtype": x, "rows": 8, "length": 64, "cohort": k} for x in ("bfloat16", "float32") for k in (1, 16)),
    *({"model": "smollm2", "dtype": "bfloat16", "rows": 4, "length": 256, "cohort": k} for k in (1, 4)),
    {"model": "smollm2", "dtype": "float32", "rows": 4, "length": 256, "cohort": 1},
    {"model": "smollm2", "dtype": "bfloat16", "rows": 4, "length": 256, "cohort": 1, "checkpointing": True},
]  # fmt: skip


def status(key: str) -> int:
    """Bytes, as the kernel counts them."""
    text = Path("/proc/self/status").read_text()
    return next(1024 * int(line.split()[1]) for line in text.splitlines() if line.startswith(key))


def train(line: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One run in this process."""
    import torch

    import fedloom
    from fedloom.runs.run import Observer, start

    torch.set_num_threads(1)
    causal, found = line["model"] != "minilm", {}

    class Watch(Observer):
        def assembled(self, e: Any) -> None:
            found.update(foretold=e.memory.total(line["cohort"]) - e.memory.base, parameters=e.parameters[1])
            auto = e.config.model_copy(update={"engine": e.config.engine.model_copy(update={"cohort": "auto"})})
            found["auto"] = replace(e, plan=replace(e.plan, config=auto)).cohort

        def round(self, record: dict[str, Any]) -> None:
            if record["round"] == 0:
                gc.collect()
                ctypes.CDLL("libc.so.6").malloc_trim(0)
                Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
                found["before"] = status("VmRSS")
            elif record["round"] == 1:
                found["measured"] = status("VmHWM") - found["before"]
                found["seconds_a_row"] = record["seconds"]["train"] / record["samples"]

    words = [" ".join(f"w{(i * 7 + j) % 1000}" for j in range(2 * line["length"])) for i in range(80)]
    rows = [{"prompt": "w1", "response": x} if causal else {"text": x, "label": i % 2} for i, x in enumerate(words)]
    data = folder / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    config = {
        "model": {"name": line["model"], "dtype": line["dtype"], "checkpointing": line.get("checkpointing", False)},
        "task": {"data": str(data), "max_length": line["length"], "eval_limit": 1}
        | ({"kind": "causal-lm"} if causal else {}),
        "clients": {"count": line["cohort"], "partition": "iid"},
        "method": {"name": "fedit"},
        "train": {"rounds": 2, "local_steps": 1, "batch_size": line["rows"], "evaluate_every": 0},
        "engine": {"cohort": line["cohort"]},
    }
    start(fedloom.RunConfig.model_validate(config), folder / "run", Watch())
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/training-memory"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    if asked.child:
        with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
            print(json.dumps(train(json.loads(asked.child), Path(folder))))
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    print(describe())
    print(
        "| model | clients x rows x tokens | foretold, MB | measured, MB | measured / foretold | s a row | auto picks |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for line in LINES:
        if asked.only not in line["model"]:
            continue
        child = [sys.executable, __file__, "--folder", str(asked.folder), "--child", json.dumps(line)]
        said = subprocess.run(child, check=True, capture_output=True, text=True).stdout
        found = json.loads(said.splitlines()[-1])
        name = f"{line['model']}, {line['dtype']}" + (", checkpointing" if line.get("checkpointing") else "")
        size = f"{line['cohort']} x {line['rows']} x {line['length']}"
        mb = [found[key] / 1e6 for key in ("foretold", "measured")]
        rest = f"{mb[1] / mb[0]:.2f} | {found['seconds_a_row']:.3f} | {found['auto']}"
        print(f"| {name} | {size} | {mb[0]:.0f} | {mb[1]:.0f} | {rest} |", flush=True)


if __name__ == "__main__":
    main()
