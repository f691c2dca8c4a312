"""A process that runs a configuration (a JSON file) in a directory; from round 1 on it may take few bytes more than it has."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch

import fedloom
from fedloom.runs.run import Observer, start

torch.set_num_threads(1)


class Limited(Observer):
    def __init__(self, more: int) -> None:
        self.more = more

    def round(self, record: dict[str, Any]) -> None:
        if record["round"] == 0 and self.more:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + self.more
            resource.setrlimit(resource.RLIMIT_AS, (most, most))


if __name__ == "__main__":
    config = fedloom.RunConfig.model_validate(json.loads(Path(sys.argv[1]).read_text()))
    start(config, Path(sys.argv[2]), Limited(int(sys.argv[3])))
