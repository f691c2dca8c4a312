"""The visits of one round on other machines under secure sums: uploads come masked, and a second message opens their sum."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fedloom.client import Client, Failure
from fedloom.core import Exchange, Method, Round
from fedloom.engine import Answer, Job, Total
from fedloom.errors import RoundError, VoidRound
from fedloom.flower import answers, sum_wire
from fedloom.flower.message import WireError, printable
from fedloom.flower.pending import Say
from fedloom.flower.remote_sums import Begun, RemoteSums
from fedloom.flower.remote_visits import RemoteVisits
from fedloom.privacy.exchange import Aggregator, Shares, shares_size
from fedloom.privacy.sum_plan import SumPlan, planned

if TYPE_CHECKING:
    from fedloom.flower.coordinator import Coordinator


class SecureRemoteVisits(RemoteVisits):
    """A round's visits, whose uploads come as one sum an exchange.

    Raises VoidRound, for a round that must not be done again, once clients may have opened one of its sums.
    """

    def __init__(self, coordinator: Coordinator, method: Method, round: Round, sums: RemoteSums) -> None:
        super().__init__(coordinator, method, round)
        self._sums = sums
        sums.forget_before(round.t)

    def _results(self, jobs: list[Job], x: Exchange[Any]) -> Iterator[Answer | Failure | Total]:
        part, t = self._exchanges - 1, self._round.t
        clients = {client.id: client for client, _ in jobs}
        begun = self._sums.begun(t, part)
        if begun is not None:
            at = self._gone_on(begun, x, clients, part)
            yield from (Failure(clients[key], why) for key, why in begun.failures if key in clients)
        else:
            without = self._without_key(jobs)
            yield from without
            there = [job for job in jobs if job[0].id in self._sums.keys]
            at = _OneSum(self._planned(x, [client for client, _ in there], part), self._sums)
            failures = [(one.client.id, one.reason) for one in without]
            for result in self._answers(there, at.say):
                failed = result if isinstance(result, Failure) else at.take(result)
                if failed is not None:
                    failures.append((failed.client.id, failed.reason))
                    yield failed
            self._require_enough(at, failures)
            self._sums.begin(at.server, self._sums.keys, failures, self._waiting)
        yield self._opened(at, clients)

    def _planned(self, x: Exchange[Any], clients: list[Client], part: int, begun: Begun | None = None) -> SumPlan:
        sums, t = self._sums, self._round.t
        if not clients:
            raise RoundError(f"round {t}: no client announced a key for secure sums. Start the nodes, then resume")
        keys = {client.id: (begun.keys if begun else sums.keys)[client.id][0] for client in clients}
        attempt = begun.attempt if begun else None
        return planned(self._method, x, clients, self._round.sites, sums.rule, sums.run, t, part, keys, attempt)

    def _gone_on(self, begun: Begun, x: Exchange[Any], clients: dict[str, Client], part: int) -> _OneSum:
        """The sum that was begun before the server was started again."""
        there = [client for key, client in clients.items() if key in begun.keys]
        at = _OneSum(self._planned(x, there, part, begun), self._sums, begun)
        self._waiting = set(begun.waiting)
        self._coordinator.note(f"went on with the sum of {', '.join(at.server.present)}, which was begun before")
        return at

    def _without_key(self, jobs: list[Job]) -> list[Failure]:
        """Who has no key, though its node was asked: on one machine nodes announce nothing by themselves."""
        at, keys = self._coordinator, self._sums.keys
        reasons: dict[str, str] = {}
        for one in at.ask("keys", [(client, {}) for client, _ in jobs if client.id not in keys], self._round.t):
            if isinstance(one, Failure):
                reasons[one.client.id] = one.reason
                continue
            try:
                self._sums.announce([client for client, _ in one.asked.jobs], one.header.get("keys"))
            except (WireError, RoundError) as error:
                reasons |= {client.id: printable(error) for client, _ in one.asked.jobs}
        absent = [client for client, _ in jobs if client.id not in keys]
        return [Failure(client, reasons.get(client.id, "announced no key for secure sums")) for client in absent]

    def _require_enough(self, at: _OneSum, failures: list[tuple[str, str]]) -> None:
        try:
            at.server.require_enough()
        except RoundError as error:
            why = f"{error} ({'; '.join(f'{key}: {why}' for key, why in failures[:5])})"
            raise self._failed(why) from None

    def _failed(self, why: str) -> RoundError:
        return VoidRound(why) if self._sums.may_be_open(self._round.t) else RoundError(why)

    def _opened(self, at: _OneSum, clients: dict[str, Client]) -> Total:
        """The second message. Raises VoidRound if too few gave shares, or wrong ones."""
        t, server, to = self._round.t, at.server, self._coordinator
        present = server.present
        jobs = [(clients[i], sum_wire.boxes_state(server.boxes_for(i))) for i in present]
        to.wait_for_places(present, server.threshold)
        given: dict[str, Shares] = {}
        missing: list[str] = []
        for one in to.ask("unmask", jobs, t, self._exchanges + 1, say=at.say_open(present)):
            for result in [one] if isinstance(one, Failure) else [r for r, _ in answers.results(one, "raw")]:
                try:
                    if isinstance(result, Failure):
                        raise WireError(result.reason)
                    given[result.client.id] = sum_wire.read_shares(
                        result.state, result.client.id, server.terms, present
                    )
                except WireError as error:
                    missing.append(f"{result.client.id}: {printable(error)}")
        try:
            words = server.open(given)
        except RoundError as error:
            why = f" ({'; '.join(missing[:5])})" if missing else ""
            raise self._failed(f"round {t} is void: {error}{why}") from None
        for what in missing:
            to.note(f"the sum was opened without shares of {what}")
        sizes = {i: at.plan.sizes() | {"masks": server.overhead(i) + shares_size(given.get(i, {}))} for i in present}
        return Total(tuple(clients[i] for i in present), at.plan.state(words), sizes)


class _OneSum:
    """One exchange's sum at the server."""

    def __init__(self, plan: SumPlan, sums: RemoteSums, begun: Begun | None = None) -> None:
        self.plan, self.server = plan, Aggregator(plan.terms)
        if begun is not None:
            begun.restore(self.server, sums.path(plan.terms.t, plan.terms.part))
        header = sum_wire.header(plan, begun.keys if begun else sums.keys)
        self.say = Say({"sum": header}, sum_wire.thin_part(plan))

    def say_open(self, present: list[str]) -> Say:
        """Whose sum is to be opened."""
        return Say({**self.say.header, "present": present}, self.say.parts)

    def take(self, answer: Answer) -> Failure | None:
        """Add one client's masked words; or why they are not used."""
        try:
            masked = sum_wire.read_masked(answer.state, answer.client.id, self.plan.terms, len(self.plan.thin))
            self.server.take(answer.client.id, masked)
        except (WireError, RoundError) as error:
            return Failure(answer.client, f"answer refused: {printable(error)}")
        return None
