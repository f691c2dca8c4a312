"""Bad and odd data files and models: what became of each.

    python benchmarks/campaigns.py [--campaigns data,models] [--only WORD] [--processes 20]

Each is a `fedloom run` of one round, in this process; some of them once more in processes of their own, and with them the chat
template that never ends. It should train, or end with one message of at most 400 characters and leave nothing.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from machine import describe

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.bad import data, models
from tests.bad.campaign import Case, Run, apart, here, tried

CAMPAIGNS = {"data": data.cases, "models": models.cases}


def played(cases: list[Case], folder: Path, run: Run, show: bool) -> tuple[Counter[str], int]:
    """What became of them, and the longest message; faults are printed."""
    count, longest = Counter[str](), 0
    for i, case in enumerate(cases):
        start = time.perf_counter()
        outcome, faults = tried(case, folder / str(i), run)
        count["trained" if outcome.code == 0 else "refused" if outcome.code == 2 else "neither"] += 1
        count["failed"] += bool(faults)
        if outcome.code == 2:
            longest = max(longest, len(outcome.said.partition("error: ")[2].replace(str(folder / str(i)), "")))
        for fault in faults:
            print(f"  {case.name}: {fault}", file=sys.stderr, flush=True)
        if show:
            said = outcome.said.replace(str(folder / str(i)), "")
            line = f"{outcome.code} {time.perf_counter() - start:5.1f} s  {case.name}: "
            print(line + (said.strip().replace("\n", " ")[-420:] if outcome.code else "trained"), flush=True)
    return count, longest


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--campaigns", default=",".join(CAMPAIGNS))
    parser.add_argument("--only", default="", help="cases whose names have this word")
    parser.add_argument("--show", action="store_true", help="say of each what it said")
    parser.add_argument("--processes", type=int, default=10, help="cases that run in processes of their own, too")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable()
    warnings.simplefilter("ignore")
    print(describe())
    lines, failed = [], 0
    for name in asked.campaigns.split(","):
        with tempfile.TemporaryDirectory(prefix="bad-") as folder:
            cases = [case for case in CAMPAIGNS[name]() if asked.only in case.name]
            start = time.process_time()
            count, longest = played(cases, Path(folder) / "here", here, asked.show)
            seconds = time.process_time() - start
            chosen = cases[:: max(1, len(cases) // asked.processes)] if asked.processes else []
            chosen = (
                [*chosen, data.ENDLESS] if chosen and name == "data" and asked.only in data.ENDLESS.name else chosen
            )
            others, _ = played(chosen, Path(folder) / "apart", apart, asked.show)
            became = f"{count['trained']} | {count['refused']} | {longest} | {count['failed']}"
            lines.append(f"| {name} | {len(cases)} | {became} | {seconds:.0f} | {len(chosen)} | {others['failed']} |")
            failed += count["failed"] + others["failed"]
    print(
        "| campaign | tried | trained | refused with one message | longest | failed | CPU s | as processes | failed |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(lines))
    raise SystemExit(int(failed > 0))


if __name__ == "__main__":
    main()
