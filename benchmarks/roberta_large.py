"""RoBERTa-large at its true shape on GLUE-shaped data, from a hub on loopback to an adapter in PEFT. One command:

    OMP_NUM_THREADS=1 python benchmarks/roberta_large.py [--folder /tmp/roberta-large]

Weights are random (bfloat16), the tokenizer is a byte-level BPE of the rows, the rows are VADER's movie snippets in the
layout of `nyu-mll/glue`, sst2. Every step is a process of its own, `fedloom ...` as a user types it; its peak is the kernel's
count, with the file's pages. The hub is stopped after the first run: all that follows has the cache alone.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import describe

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.loopback_hub import LoopbackHub

WORDS, POSITIONS = 50265, 514
# A benchmark in the background inherits an ignored SIGINT, which Python then leaves ignored: take it back.
COMMAND = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from fedloom.cli.main import main; main()"
)
IMPORTS = "import fedloom.runs.run, fedloom.models.huggingface, peft, datasets, transformers.models.roberta"
MODEL, DATA = "FacebookAI/roberta-large", "nyu-mll/glue"

RUN = """# The packaged recipe fslora-glue (fedloom recipes fslora-glue), with a larger model and fewer, shorter rounds
[model]
name = "FacebookAI/roberta-large"

[task]
data = "glue/sst2"
max_length = 128
eval_limit = 64

[lora]
rank = 64
alpha = 1.0
rslora = true
dropout = 0.1
targets = ["query", "value"]

[clients]
count = 20
fraction = 0.2
partition = "dirichlet"
alpha = 0.1
ranks = [8, 16, 32]

[method]
name = "fslora"

[train]
rounds = 3
local_steps = 2
batch_size = 16
lr = 5e-4
evaluate_every = 3
"""

CARD = """---
configs:
- config_name: sst2
  data_files:
  - {split: train, path: sst2/train-*}
  - {split: validation, path: sst2/validation-*}
---
"""


def rows() -> list[dict[str, Any]]:
    """Sentences with 0 (negative) or 1."""
    from fedloom.data import load

    found = load.load("vader-movies")
    labelled = zip(found["text"], found["label"], strict=True)
    return [{"sentence": x, "label": int(y == "pos"), "idx": i} for i, (x, y) in enumerate(labelled)]


def make(path: Path, sentences: list[str]) -> Path:
    """The model directory, as `FacebookAI/roberta-large` is laid out, unless it is there."""
    if (path / "model.safetensors").exists():
        return path
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaConfig, RobertaForMaskedLM, RobertaTokenizerFast

    path.mkdir(parents=True, exist_ok=True)
    bpe = ByteLevelBPETokenizer()
    marks = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe.train_from_iterator(sentences, vocab_size=WORDS, special_tokens=marks, show_progress=False)
    bpe.save_model(str(path))
    RobertaTokenizerFast.from_pretrained(path).save_pretrained(path)
    torch.manual_seed(0)
    sizes = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    marks_of = dict(bos_token_id=0, pad_token_id=1, eos_token_id=2)
    config = RobertaConfig(
        vocab_size=WORDS, max_position_embeddings=POSITIONS, type_vocab_size=1, layer_norm_eps=1e-5, **sizes, **marks_of
    )
    RobertaForMaskedLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


def served(folder: Path, hub: LoopbackHub) -> None:
    """Put model and data on the hub."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = rows()
    parts = {"train": found[:-1000], "validation": found[-1000:]}
    files = {"README.md": CARD.encode()}
    for name, part in parts.items():
        file = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(part), file)
        files[f"sst2/{name}-00000-of-00001.parquet"] = file.getvalue()
    hub.put("datasets", DATA, files)
    hub.put("models", MODEL, make(folder / "model", [x["sentence"] for x in found]))


def status(pid: int, key: str) -> int:
    """Bytes, as the kernel counts them; 0 of a process that has ended."""
    text = Path(f"/proc/{pid}/status").read_text()
    return next((1024 * int(line.split()[1]) for line in text.splitlines() if line.startswith(key)), 0)


class Steps:
    """Runs commands and prints a line of a table for each."""

    def __init__(self, folder: Path, url: str) -> None:
        home = folder / "home"
        shutil.rmtree(home, ignore_errors=True)
        own = {"HF_HOME": str(home), "FEDLOOM_CACHE": str(home / "fedloom"), "HF_HUB_DISABLE_XET": "1"}
        own |= {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "COLUMNS": "140"}
        self.environment = os.environ | own
        print(
            "| step | code | seconds | CPU s | peak, GB | of it no file's, GB |\n| --- | --- | --- | --- | --- | --- |"
        )

    def run(self, name: str, command: list[str], stop: Callable[[], bool] = lambda: False, code: int = 0) -> str:
        """What the command said; `stop` sends it Ctrl-C when it is true."""
        clock = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=self.environment
        )
        peak = anonymous = 0
        asked = False
        while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            peak, anonymous = max(peak, status(process.pid, "VmHWM")), max(anonymous, status(process.pid, "RssAnon"))
            if not asked and stop():
                process.send_signal(signal.SIGINT)
                asked = True
            time.sleep(0.02)
        assert process.stdout is not None
        said = process.stdout.read()
        _, ended, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(ended)
        seconds, cpu = time.perf_counter() - clock, used.ru_utime + used.ru_stime
        gb = f"{peak / 1e9:.2f} | {anonymous / 1e9:.2f}"
        print(f"| {name} | {process.returncode} | {seconds:.1f} | {cpu:.1f} | {gb} |", flush=True)
        assert process.returncode == code, said
        return said

    def fedloom(self, name: str, *words: str, **options: Any) -> str:
        return self.run(name, [sys.executable, "-c", COMMAND, *words], **options)


def logits(run: Path) -> None:
    """In a process of its own: the adapter in PEFT, as its users load it, against fedloom, both in float32."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # PEFT and transformers ask the hub five times over, else
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    from fedloom.data.batches import collate
    from fedloom.runs import export
    from fedloom.runs.config import parse
    from fedloom.runs.experiment import experiment
    from fedloom.runs.run_directory import RunDirectory

    values = RunDirectory.open(run).config().model_dump()
    values["model"]["dtype"] = "float32"
    e = experiment(parse(values, "run.toml"))
    ours = e.trainer.evaluate(export.read(run / "adapter"), e.rows.eval).logits
    assert ours is not None
    batch = collate([(e.rows.eval, torch.arange(len(e.rows.eval)).numpy())])
    del e
    fresh = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=2, dtype=torch.float32)
    model = PeftModel.from_pretrained(fresh, str(run / "adapter")).eval()
    with torch.no_grad():
        theirs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        bare = model.unload()
        base = bare(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    print(f"logits differ by {(ours - theirs).abs().max():.1e} at most, and from the bare model's by ", end="")
    print(f"{(base - theirs).abs().max():.2f}: {len(ours)} rows")
    assert (ours - theirs).abs().max() < 1e-4


def records(run: Path) -> list[dict[str, Any]]:
    file = run / "rounds.jsonl"
    return [json.loads(x) for x in file.read_text().splitlines()] if file.is_file() else []


def memory_said(said: str) -> str:
    found = re.search(r"^memory +(.*)$", said, re.M), re.search(r"^train +(.*)$", said, re.M)
    assert found[0] and found[1], said
    return f"{found[0][1]}; {found[1][1]}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/roberta-large"))
    parser.add_argument("--logits", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.logits:
        logits(asked.logits)
        return
    folder = asked.folder
    folder.mkdir(parents=True, exist_ok=True)
    file, first, second, together = (str(folder / x) for x in ("run.toml", "first", "second", "together"))
    Path(file).write_text(RUN)
    for x in (first, second, together):
        shutil.rmtree(x, ignore_errors=True)
    print(describe())
    with LoopbackHub() as hub:
        served(folder, hub)
        steps = Steps(folder, hub.url)
        steps.run("Python and its libraries", [sys.executable, "-c", IMPORTS])
        whole = steps.fedloom("download, run: 3 rounds of 4 clients", "run", file, "--out", first)
        got = sum(len(hub.large[what.rpartition("/")[2]]) for what, _ in hub.log if what.startswith("GET /large/"))
    told = steps.fedloom("offline from here: --dry-run", "run", file, "--dry-run")
    steps.fedloom(
        "run again, Ctrl-C after round 1", "run", file, "--out", second,
        stop=lambda: len(records(Path(second))) > 1, code=130,
    )  # fmt: skip
    steps.fedloom("resume", "resume", second)
    said = steps.fedloom("evaluate", "evaluate", first)
    steps.fedloom("verify", "verify", first)
    compared = steps.run("in PEFT, float32", [sys.executable, __file__, "--logits", first])
    apart = ["--set", "engine.cohort=4"]
    told_4 = steps.fedloom("cohort = 4: --dry-run", "run", file, *apart, "--dry-run")
    steps.fedloom("cohort = 4: run", "run", file, *apart, "--out", together)

    same = [(Path(x) / "adapter/adapter_model.safetensors").read_bytes() for x in (first, second)]
    assert same[0] == same[1], "resumed, and other bytes"
    print(
        f"\n{whole}\ndownloaded: {got / 1e9:.2f} GB; interrupted and resumed: the same bytes\n{compared.splitlines()[-1]}"
    )
    print(f"evaluate again: {said}")
    print(f"told beforehand: {memory_said(told)}\nwith cohort = 4: {memory_said(told_4)}")
    for name, path in (("auto", first), ("4", together)):
        rounds = [x for x in records(Path(path)) if x["round"] > 0]
        samples = sum(x["samples"] for x in rounds)
        print(f"cohort {name}: {sum(x['seconds']['train'] for x in rounds) / samples:.3f} s of training a row")


if __name__ == "__main__":
    main()
