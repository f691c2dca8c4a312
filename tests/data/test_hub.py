"""Models and data through the hub's own clients, from a hub on loopback: what they find, and one message for each failure."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ..conftest import WORDS, _tokenizer
from ..loopback_hub import Fault, LoopbackHub

TOKEN = "hf_" + "s3cret" * 6


def parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def glue(count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(count)
    texts = [" ".join(rng.choice(WORDS, size=6)) for _ in range(count)]
    return [{"sentence": text, "label": int("king" in text), "idx": i} for i, text in enumerate(texts)]


CARD = """---
configs:
- config_name: cola
  data_files:
  - {split: train, path: cola/train-*}
  - {split: validation, path: cola/validation-*}
- config_name: mnli
  data_files:
  - {split: train, path: mnli/train-*}
  - {split: validation_matched, path: mnli/validation_matched-*}
  - {split: validation_mismatched, path: mnli/validation_mismatched-*}
---
"""


def instructions(n: int) -> bytes:
    rows = [{"instruction": f"who is {i}", "context": "", "response": "king", "category": "qa"} for i in range(n)]
    return "\n".join(map(json.dumps, rows)).encode()


def roberta(path: Path, shards: str = "5GB") -> Path:
    """A random RoBERTa of two layers with its tokenizer, as `FacebookAI/roberta-base` is laid out."""
    from transformers import RobertaConfig, RobertaForMaskedLM

    marks = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = _tokenizer(**marks, cls_token="<s>", sep_token="</s>", mask_token="<mask>")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = RobertaConfig(vocab_size=64, max_position_embeddings=66, **sizes)
        RobertaForMaskedLM(config).save_pretrained(path, max_shard_size=shards)
    tokenizer.save_pretrained(path)
    return path


class Client:
    """The process that loads."""

    def __init__(self, hub: LoopbackHub, home: Path) -> None:
        own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "FEDLOOM_CACHE": str(home / "fedloom"), "HF_TOKEN": TOKEN}
        own |= {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-W", "ignore", str(Path(__file__).parents[1] / "hub_client.py")]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | own, cwd=home
        )

    def ask(self, call: str, *args: Any) -> Any:
        found = self._asked(call, *args)
        assert "result" in found, found
        return found["result"]

    def error(self, call: str, *args: Any) -> tuple[str, str]:
        """(class, message)"""
        found = self._asked(call, *args)
        assert "error" in found, found
        assert "\n" not in found["message"] and TOKEN not in found["message"]
        return found["error"], found["message"]

    def _asked(self, call: str, *args: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps({"call": call, "args": args}), file=self.process.stdin, flush=True)
        return dict(json.loads(self.process.stdout.readline()))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LoopbackHub, Client]]:
    home = tmp_path_factory.mktemp("home")
    with LoopbackHub() as hub:
        files = {"README.md": CARD.encode()}
        files |= {f"cola/{split}-00000-of-00001.parquet": parquet(glue(n)) for split, n in SIZES.items()}
        for i, split in enumerate(["train", "validation_matched", "validation_mismatched"]):
            rows = [{"premise": "who", "hypothesis": "is", "label": i}] * 3
            files[f"mnli/{split}-00000-of-00001.parquet"] = parquet(rows)
        hub.put("datasets", "nyu-mll/glue", files)
        hub.put("datasets", "databricks/databricks-dolly-15k", {"databricks-dolly-15k.jsonl": instructions(30)})
        hub.put("datasets", "us/two", {"data.jsonl": instructions(2)}, ref="v1")
        hub.put("datasets", "us/two", {"data.jsonl": instructions(5), "README.md": b"# More rows"})
        hub.put("models", "FacebookAI/roberta-base", roberta(tmp_path_factory.mktemp("roberta")))
        client = Client(hub, home)
        yield hub, client
        client.process.communicate(timeout=30)


SIZES = {"train": 300, "validation": 40}


@pytest.fixture
def hub(served: tuple[LoopbackHub, Client]) -> Iterator[LoopbackHub]:
    """The hub, without faults again afterwards."""
    yield served[0]
    served[0].faults, served[0].down = [], False
    served[1].ask("ask_again")


@pytest.fixture
def client(served: tuple[LoopbackHub, Client]) -> Client:
    return served[1]


RUN = """
[model]
name = "FacebookAI/roberta-base"
dtype = "float32"
[task]
data = "glue/cola"
limit = 60
[lora]
rank = 2
[clients]
count = 2
[method]
name = "fedit"
[train]
rounds = 1
local_steps = 2
batch_size = 4
"""


def test_a_run_from_the_hub_and_again_without_it(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    """RoBERTa on GLUE by their own names; the token goes to the hub alone."""
    file = tmp_path / "run.toml"
    file.write_text(RUN)
    hub.log.clear()
    first = client.ask("command", "run", str(file), "--out", str(tmp_path / "first"))
    assert first["code"] == 0 and "60 training rows, 40 held out" in first["said"], first["said"]
    assert ", matthews " in first["said"]
    large = [who for what, who in hub.log if "/large/" in what]
    assert len(large) >= 2 and not any(large)  # weights and rows came by the redirect, whose host gets no token
    assert {who for what, who in hub.log if "/large/" not in what and what != "HEAD /"} == {f"Bearer {TOKEN}"}

    hub.down = True
    client.ask("ask_again")
    hub.log.clear()
    second = client.ask("command", "run", str(file), "--out", str(tmp_path / "second"))
    assert second["code"] == 0, second["said"]
    assert hub.log == []
    again = client.ask("command", "evaluate", str(tmp_path / "first"))
    assert again["code"] == 0, again["said"]
    runs = [
        {x.relative_to(run): x.read_bytes() for x in run.rglob("*") if x.is_file()}
        for run in tmp_path.iterdir()
        if run.is_dir()
    ]
    assert len(runs) == 2
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert runs[0][Path(name)] == runs[1][Path(name)]
    assert (
        json.loads(runs[0][Path("adapter/adapter_config.json")])["base_model_name_or_path"] == "FacebookAI/roberta-base"
    )
    for said in (first["said"], second["said"], again["said"]):
        assert TOKEN not in said
    assert not any(TOKEN.encode() in data for run in runs for data in run.values())


def test_splits_and_configurations(client: Client) -> None:
    assert client.ask("rows", "glue/mnli")["label"] == [0] * 3
    assert client.ask("rows", "glue/mnli", "validation")["label"] == [1] * 3
    assert client.ask("rows", "glue/mnli#validation_mismatched")["label"] == [2] * 3
    assert len(client.ask("rows", "nyu-mll/glue:cola#validation")["label"]) == 40
    assert len(client.ask("rows", "databricks/databricks-dolly-15k")["response"]) == 30
    kind, message = client.error("rows", "databricks/databricks-dolly-15k#test")
    assert kind == "DataError" and "test" in message and "train" in message


def test_a_revision_is_what_it_says_with_the_hub_and_without(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    old = hub.repos["datasets", "us/two"].refs["v1"]
    other = hub.put("models", "us/model", roberta(tmp_path / "old"), ref="v1")
    hub.put("models", "us/model", {"config.json": b"{}", "model.safetensors": b""})
    for _ in ("with the hub", "without"):
        assert len(client.ask("rows", "us/two@v1")["response"]) == 2
        assert len(client.ask("rows", "us/two")["response"]) == 5
        assert len(client.ask("rows", f"us/two@{old}")["response"]) == 2
        for revision in ("v1", other):
            found = client.ask("model", f"us/model@{revision}")
            assert (found["name"], found["revision"]) == ("us/model", revision)
        hub.down = True
        client.ask("ask_again")
    assert client.error("rows", "us/two@v2")[0] == "HubError"
    assert client.error("rows", "us/never")[0] == "HubError"
    assert client.error("model", "us/model@v2")[0] == "HubError"


def test_a_model_in_shards(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    whole = hub.put("models", "us/shards", roberta(tmp_path / "shards", "5KB"))
    names = hub.repos["models", "us/shards"].commits[whole]
    assert len([name for name in names if name.endswith(".safetensors")]) > 2
    extra = {"pytorch_model.bin": b"other", "onnx/model.onnx": b"other", "modeling_x.py": b"1/0"}
    hub.put("models", "us/shards", names | extra)
    hub.log.clear()
    assert client.ask("model", "us/shards")["family"] == "roberta"
    assert not [what for what, _ in hub.log if any(name in what for name in extra)]  # nothing that is not read


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (Fault("api/", 429), "HubError", "asks for fewer requests .429"),
        (Fault("api/", 503), "HubError", "answers with an error of its own .503.: try again later"),
        (Fault("api/", 401), "E", "is refused by http://127.0.0.1:.* .401.: check your token, `hf auth login`"),
        (Fault("api/", 404), "E", "has not what it asked for .404., is it a hub"),
        (Fault("GET /.*/resolve/", 500), "HubError", "answers with an error of its own .500"),
        (Fault("HEAD /$", 502), "HubError", "is not on this machine, and http://127.0.0.1:.* cannot be reached"),
    ],
)
def test_a_failing_hub_is_one_message(
    hub: LoopbackHub, client: Client, tmp_path: Path, fault: Fault, kind: str, message: str
) -> None:
    name = f"us/fault-{abs(hash((fault.pattern, fault.status)))}"
    hub.put("datasets", name, {"data.jsonl": instructions(3)})
    hub.put("models", name, {"config.json": b"{}", "model.safetensors": b"x" * 10})
    hub.faults = [fault]
    client.ask("ask_again")
    for call, error in (("rows", "DataError"), ("model", "ModelError")):
        found, said = client.error(call, name)
        assert found == (error if kind == "E" else kind), said
        assert re.search(message, said) and name in said and len(said) < 400


def test_what_there_is_not(hub: LoopbackHub, client: Client) -> None:
    hub.put("datasets", "us/gated", {"data.jsonl": instructions(3)}, gated=True)
    hub.put("models", "us/gated", {"config.json": b"{}", "model.safetensors": b"x"}, gated=True)
    hub.put("datasets", "us/private", {"data.jsonl": instructions(3)}, token="another")
    hub.put("models", "us/private", {"config.json": b"{}", "model.safetensors": b"x"}, token="another")
    hub.put("models", "us/adapter", {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"})
    for call, kind, what in (("rows", "DataError", "data set"), ("model", "ModelError", "model")):
        for name, message in {
            "us/nothing": f"there is no {what} 'us/nothing' on the hub",
            "us/private": f"there is no {what} 'us/private' on the hub, and no such path here: check its name (owner/name); "
            "if it is private, log in",
            "us/gated": f"{what} 'us/gated' needs permission on the hub: accept its terms",
            (
                "us/two@v9" if call == "rows" else "FacebookAI/roberta-base@v9"
            ): "is on the hub, but not with this revision",
        }.items():
            found, said = client.error(call, name)
            assert found == kind and message in said, said
    assert "is no model of transformers" in client.error("model", "us/adapter")[1]


def test_a_transfer_that_is_cut_goes_on_where_it_was(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    hub.put("models", "us/cut", roberta(tmp_path / "cut"))
    hub.put("datasets", "us/cut", {"train.parquet": parquet(glue(301))})
    for call in ("model", "rows"):
        hub.faults = [Fault("GET /large/", None, 4000, times=2)]
        hub.log.clear()
        client.ask(call, "us/cut")
        assert len([what for what, _ in hub.log if what.startswith("GET /large/")]) == 3


def test_a_transfer_that_never_ends_well_is_one_message(hub: LoopbackHub, client: Client) -> None:
    hub.put("models", "us/never", {"config.json": b"{}", "model.safetensors": b"y" * 5000})
    hub.faults = [Fault("GET /large/", None, 0)]
    assert client.error("model", "us/never") == (
        "HubError",
        "model 'us/never' could not be got: the transfer was cut off. Try again: what is here already stays.",
    )


def test_a_busy_hub_and_what_is_here_already(hub: LoopbackHub, client: Client) -> None:
    client.ask("rows", "us/two")
    client.ask("model", "FacebookAI/roberta-base")
    for status in (429, 500):
        hub.faults = [Fault("api/|resolve/", status)]
        assert len(client.ask("rows", "us/two")["response"]) == 5
        assert client.ask("model", "FacebookAI/roberta-base")["family"] == "roberta"
