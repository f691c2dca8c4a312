"""The audit of a finished run: attacks on its model, a check of its mechanism, and what one plain upload shows.

An audit finds faults, it proves no privacy: a bound from below says that epsilon is at least so large, and an attack that
fails says that this attack fails.
"""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from fedloom import checkpoint, methods, sampling
from fedloom.client import Client
from fedloom.core import Averaged, Mean, Round, State, Visit, Work
from fedloom.data.tokenize import Encoded
from fedloom.disk import write_json
from fedloom.errors import RunError
from fedloom.privacy.attack import Scores, attack, canary_guesses, epsilon_bound
from fedloom.privacy.client_level import ClientLevel
from fedloom.privacy.client_noise import noisy_terms
from fedloom.privacy.graph import survivors_and_colluding
from fedloom.privacy.ledger import Ledger
from fedloom.privacy.secure_visits import SecureSums
from fedloom.runs import canaries, export, inversion
from fedloom.runs import private as private_runs
from fedloom.runs.experiment import Experiment, experiment
from fedloom.runs.privacy_section import PrivacySection
from fedloom.runs.run_directory import RunDirectory

AT_MOST = 600
"""Rows of each kind that are scored."""
DIRECTIONS, NUMBERS = 1000, 20_000
"""Canary clients of the mechanism check, and the numbers that each sends."""

NOT_SHOWN = (
    "Not shown: attacks with shadow models or with every round's model, uploads of many local steps, and whether noise is half "
    "of what it should be (the bounds are loose; the tests measure the variance itself)."
)


def audit(path: Path) -> dict[str, Any]:
    """Every part that applies to the run; also written to audit.json. Raises RunError if it is not finished."""
    run = RunDirectory.open(path)
    if not (run.adapter / "adapter_config.json").is_file():
        raise RunError(f"{path} has no adapter yet: finish it with `fedloom resume {path}`")
    e = experiment(run.config())
    section = e.config.privacy
    planted = None
    if section is not None and section.canaries:
        planted = canaries.plant(path, e)
        e = replace(e, rows=replace(e.rows, canaries=planted))
    model = export.read(run.adapter)
    report: dict[str, Any] = {"claim": claim(path, section)}
    report["loss attack"] = loss_attack(e, model, planted)
    if planted is not None:
        report["canaries"] = canary_bound(e, model, planted, section.delta if section else 1e-5)
    if section is not None and section.unit == "client" and section.noise_multiplier != 0:
        report["mechanism"] = mechanism(e, section.delta)
    report["one plain upload"] = upload(run, e)
    report["verdict"] = verdict(report)
    report["note"] = NOT_SHOWN
    write_json(path / "audit.json", report)
    return report


def claim(path: Path, section: PrivacySection | None) -> dict[str, Any]:
    """What the run promises, to whom."""
    if section is None or section.unit is None:
        return {"epsilon": None, "promise": "none: without differential privacy the model may tell anything of a row"}
    found = Ledger(path / "privacy.jsonl").epsilon(section.delta)
    whom = "everybody outside the site"
    if section.unit == "client":
        whom = "whoever sees the models" + (
            "; the server is trusted" if section.noise == "server" else ", the server too"
        )
    finite = found if np.isfinite(found) else None
    return {"epsilon": finite, "delta": section.delta, "unit": section.unit, "against": whom}


def losses(e: Experiment, model: Work, rows: Encoded) -> Scores:
    """(n,) the model's loss on each row."""
    if rows.kind == "causal-lm":
        return np.asarray([e.trainer.evaluate(model, rows.select([i])).loss for i in range(len(rows))])
    found = e.trainer.evaluate(model, rows)
    assert found.logits is not None and rows.targets is not None
    wanted = torch.from_numpy(rows.targets)
    if rows.kind == "regression":
        return ((found.logits.squeeze(-1) - wanted) ** 2).numpy()
    return F.cross_entropy(found.logits.float(), wanted.long(), reduction="none").numpy()


def loss_attack(e: Experiment, model: Work, planted: canaries.Canaries | None) -> dict[str, Any]:
    """Rows that were trained on have a smaller loss: how much smaller, by itself and against the model before training."""
    special = set() if planted is None else set(planted.rows.tolist())
    used = sorted({i for rows in e.partition.values() for i in rows} - special)
    members = e.rows.train.select(used[:: max(1, len(used) // AT_MOST)][:AT_MOST])
    others = e.rows.eval.select(list(range(min(AT_MOST, len(e.rows.eval)))))
    before = e.global_model(e.initial_state())
    mine, theirs = losses(e, model, members), losses(e, model, others)
    plain = attack(-mine, -theirs)
    against = attack(losses(e, before, members) - mine, losses(e, before, others) - theirs)
    return {
        "members": len(members),
        "others": len(others),
        **{name: round(value, 4) for name, value in asdict(plain).items()},
        "auc_against_base": round(against.auc, 4),
    }


def canary_bound(e: Experiment, model: Work, planted: canaries.Canaries, delta: float) -> dict[str, Any]:
    """The smallest epsilon that the run can have, with 95 % confidence, from guesses about its coins."""
    rows = e.rows.train.select(planted.rows.tolist())
    before = e.global_model(e.initial_state())
    scores = losses(e, before, rows) - losses(e, model, rows)
    guesses, right = canary_guesses(scores, planted.coins)
    auc = attack(scores[planted.coins], scores[~planted.coins]).auc if 0 < planted.coins.sum() < len(scores) else 0.5
    bound = epsilon_bound(len(scores), guesses, right, delta)
    return {
        "canaries": len(scores),
        "guesses": guesses,
        "right": right,
        "auc": round(auc, 4),
        "epsilon_at_least": bound,
    }


def mechanism(e: Experiment, delta: float, method: ClientLevel | None = None) -> dict[str, Any]:
    """Canary clients of random directions through the run's own clipping and noise, each in by a coin, all in one round."""
    from fedloom.privacy.accountant import Release, epsilon

    private = method or e.method
    assert isinstance(private, ClientLevel)
    # Over a method whose shared space is what clients send; clipping and noise are the run's own code.
    private = replace(private, over=methods.build({"name": "fedit"}, {"rank": private.rank}), clipping="fixed")
    rng = np.random.default_rng()
    coins = rng.random(DIRECTIONS) < 0.5
    directions = torch.from_numpy(rng.normal(size=(DIRECTIONS, NUMBERS)).astype(np.float32))
    zero: State = {"A": {"canary": torch.zeros(NUMBERS)}}
    visit = Visit(1, Client("canary", 1, private.rank), {})
    total = torch.zeros(NUMBERS)
    for one in directions[torch.from_numpy(coins)]:
        long = {"A": {"canary": one * (10 * private.clip)}}
        total += private._clipped(zero, long, visit, private.clip)[0]["A"]["canary"]
    if private.noise == "clients":
        told = _with_shares(e, private, total)
    else:
        everybody = (visit.client,) * DIRECTIONS
        answer = Averaged({"A": {"canary": total / DIRECTIONS}}, everybody, float(DIRECTIONS))
        noised = private._noised(answer, Mean(lambda client: zero), Round(1, everybody, DIRECTIONS, {}))
        told = noised.state["A"]["canary"]
    scores = (directions @ told.to(directions.dtype)).numpy()
    guesses, right = canary_guesses(scores, coins)
    claimed = epsilon([Release(private.noise_multiplier, grid=private_runs.grid(e.config))], delta)
    return {
        "claimed_a_round": claimed,
        "guesses": guesses,
        "right": right,
        "epsilon_at_least": epsilon_bound(DIRECTIONS, guesses, right, delta),
    }


def _with_shares(e: Experiment, private: ClientLevel, total: torch.Tensor) -> torch.Tensor:
    """A sum with the shares of as few of the run's clients as a sum is opened for, less those who may collude."""
    section = e.config.privacy
    assert section is not None
    sums = SecureSums(least=section.min_clients, limit=section.limit, bits=section.bits)
    asked = e.clients[: sampling.count(e.config.clients.fraction, len(e.clients))]
    plain = sums.terms("audit", 1, 0, sums.public(asked), bytes(16), b"")
    everywhere = torch.ones(NUMBERS, dtype=torch.bool)
    terms, shares = noisy_terms(plain, private.noise_multiplier, private.clip, everywhere)
    words = terms.fixed.encode(total)
    for _ in range(terms.least - survivors_and_colluding(len(asked))[1]):
        words = words + shares.draw(words, os.urandom(32))
    return terms.fixed.decode(words)


def upload(run: RunDirectory, e: Experiment) -> dict[str, Any]:
    """Tokens of a client's rows that can be read off one upload of one step, by who sees it alone."""
    section = e.config.privacy
    if section is not None and section.secure_aggregation:
        return {"seen_by_server": "sums alone; this is what a single upload would have shown"} | _read(run, e)
    return {"seen_by_server": "every upload"} | _read(run, e)


def _read(run: RunDirectory, e: Experiment) -> dict[str, Any]:
    _, state, _, _ = checkpoint.load(run.checkpoint)
    return inversion.tokens_found(e, state)


def verdict(report: dict[str, Any]) -> str:
    """Whether what was found can be true of what is claimed."""
    claimed = report["claim"]["epsilon"]
    broken = "mechanism" in report and report["mechanism"]["epsilon_at_least"] > report["mechanism"]["claimed_a_round"]
    if broken:
        return "FAIL: the mechanism adds less noise than it claims"
    if claimed is None:
        return "no claim"
    bound = report.get("canaries", {}).get("epsilon_at_least", 0.0)
    if bound > claimed:
        return f"FAIL: epsilon is at least {bound:.4g}, the run claims {claimed:.4g}"
    return f"PASS: nothing found contradicts epsilon {claimed:.4g}"
