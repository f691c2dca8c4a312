"""What a method is, seen from outside: its fields, and what it sends, keeps and starts from in three small rounds.

Nothing of this is written down by a method: it is watched through the loop and the simulator, two clients on two small layers
with training that adds noise. Only its heading, its paper and its docstrings are its own words.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Annotated, Any, Literal, cast, get_args, get_origin, get_type_hints

import annotated_types
import torch

from fedloom.core import Client, Each, Exchange, Failure, Method, Round, State, Trained, Work
from fedloom.engine import Answer, Job, Total
from fedloom.flows import Over
from fedloom.loop import federate
from fedloom.methods import build, get
from fedloom.rng import generator
from fedloom.simulation import LocalVisits, Simulation
from fedloom.spec import secret_sum_obstacle
from fedloom.state import Group, Sites

_SITES: Sites = {"first": (16, 24), "second": (20, 16)}
_RANK = 4
_HEAD = {"weight": torch.zeros(2, 20)}


@dataclass(frozen=True)
class Field:
    """A field of a method: a key of its table in a run file."""

    name: str
    type: str
    default: Any
    """None for `over`, which is FedIT by default, and for a field that must be given."""
    choices: tuple[Any, ...] = ()
    bounds: str = ""
    """Such as `above 0, at most 1`."""
    meaning: str = ""
    section: str = "method"
    """Where a run file sets it: `method`, or `lora` for what all methods share."""


@dataclass(frozen=True)
class Description:
    """One method with its defaults; a wrapper over FedIT."""

    name: str
    group: str
    summary: str
    paper: str
    wrapper: bool
    budgets: tuple[str, ...]
    """Which budgets of a client it follows: fields of `Client`."""
    down: tuple[str, ...]
    """Roles that clients receive, those of a later round after those of the first."""
    up: tuple[str, ...]
    """Roles that they send."""
    kept: tuple[str, ...]
    """Roles that stay with a client."""
    start: str
    """Where training starts from in a later round, role by role."""
    exchanges: int
    """In a round, at most."""
    secure_sum: str
    """`yes`, or why a secure sum cannot serve it."""
    personal: str
    """`no`, `yes`: clients end with models of their own, `after`: they train them after the last round."""
    proxy_data: bool
    """The server trains on rows of its own."""
    fields: tuple[Field, ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def describe(name: str) -> Description:
    """Everything about a method, by its name. Raises ConfigError if there is none.

    >>> describe("fedsa_lora").up, describe("fedsa_lora").kept, describe("fedsa_lora").secure_sum
    (('A',), ('B', 'head'), 'yes')
    """
    cls = get(name)
    method = build({"name": name}, {"rank": _RANK, "alpha": 8.0})
    seen = _watched(method)
    obstacle = next((why for why in seen.obstacles if why), None)
    return Description(
        name=name,
        group=cls.group,
        summary=_summary(cls),
        paper=cls.paper,
        wrapper=issubclass(cls, Over),
        budgets=tuple(sorted(cls.budgets)),
        down=tuple(seen.down),
        up=tuple(seen.up),
        kept=tuple(seen.kept),
        start=_start(seen),
        exchanges=seen.exchanges,
        secure_sum=obstacle or "yes",
        personal="after" if method.personal_phase else "yes" if method.personal_models else "no",
        proxy_data=method.needs_proxy_data,
        fields=tuple(_fields(cls)),
    )


def sum_obstacle(method: Method) -> str | None:
    """Why no secure sum can serve a method as it was made, or None: what three rounds of it exchange."""
    return next((why for why in _watched(method).obstacles if why), None)


def roles_up(method: Method) -> tuple[str, ...]:
    """The roles that clients of a method send, as it was made."""
    return tuple(_watched(method).up)


# watching


@dataclass
class _Seen:
    """What crossed in three rounds. Dictionaries are ordered sets."""

    down: dict[str, None] = field(default_factory=dict)
    up: dict[str, None] = field(default_factory=dict)
    kept: dict[str, None] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    """Role -> where what a later round trained of it came from."""
    obstacles: list[str | None] = field(default_factory=list)
    exchanges: int = 0


class _Noise:
    """A trainer that adds noise to everything."""

    def __init__(self) -> None:
        self.works: list[tuple[str, Work]] = []

    def fit(self, works: Sequence[tuple[Client, Work]], data: Sequence[None], t: int, part: int = 0) -> list[Trained]:
        self.works += [(client.id, work) for client, work in works]
        return [Trained(_noisy(work.train, t, part), steps=1, lr_sum=1.0, loss=0.0) for _, work in works]


def _noisy(train: State, t: int, part: int) -> State:
    return {
        role: {s: x + torch.randn(x.shape, generator=generator(t, part, role, s)) for s, x in group.items()}
        for role, group in train.items()
    }


class _Watch(Simulation[None]):
    """The simulator, taking notes."""

    def __init__(self, trainer: _Noise) -> None:
        server = Client("server", 1, _RANK)
        super().__init__(trainer, _SITES, lambda client: None, fresh={"head": _HEAD}, proxy=server, secret=0)
        self.seen, self.noise = _Seen(), trainer

    def visits(self, method: Method, round: Round) -> LocalVisits[None]:
        return _WatchedVisits(self, method, round)


class _WatchedVisits(LocalVisits[None]):
    count = 0

    def exchange(self, jobs: Iterable[Job], x: Exchange[Any]) -> Iterator[Answer | Failure | Total]:
        watch, pairs = cast(_Watch, self.engine), list(jobs)
        seen = watch.seen
        self.count += 1
        seen.exchanges = max(seen.exchanges, self.count)
        own = {client.id: watch.own(client.id) for client, _ in pairs}
        for client, received in pairs:
            seen.down |= dict.fromkeys(received)
            why = "the server reads every upload" if isinstance(x, Each) else None
            seen.obstacles.append(why or secret_sum_obstacle(x.expects(client, received)))
        watch.noise.works.clear()
        answers = list(super().exchange(pairs, x))
        seen.up |= dict.fromkeys(role for a in answers if isinstance(a, Answer) for role in a.state)
        if self.round.t > 1:
            for client, received in pairs[:1]:
                for work in (work for key, work in watch.noise.works if key == client.id):
                    for role, source in _sources(work.train, received, own[client.id]).items():
                        seen.sources.setdefault(role, source)
        return iter(answers)


def _watched(method: Method) -> _Seen:
    clients = [Client(k, 1, method.rank) for k in "ab"]
    watch = _Watch(_Noise())
    first = method.init(_SITES, generator("describe")) | {"head": _HEAD}
    federate(method, watch, first, clients, 3)
    for client in clients:
        watch.seen.kept |= dict.fromkeys(watch.client_states.get(client.id) or {})
    return watch.seen


def _sources(train: State, received: State, own: State) -> dict[str, str]:
    """Role -> `received`, `kept`, `new`, `zero`, or `new` for what is none of these."""

    def held(group: Group, state: State) -> bool:
        there = [x.flatten() for other in state.values() for x in other.values() if x.is_floating_point()]
        values = torch.cat([x.flatten() for x in group.values()])
        return bool(there) and bool(torch.isin(values[values != 0], torch.cat(there)).all())

    found = {}
    for role, group in train.items():
        if not any(bool(x.any()) for x in group.values()):
            found[role] = "zero"
        else:
            found[role] = "received" if held(group, received) else "kept" if held(group, own) else "new"
    return found


def _start(seen: _Seen) -> str:
    by_source: dict[str, list[str]] = {}
    for role, source in seen.sources.items():
        by_source.setdefault(source, []).append(role)
    if len(by_source) == 1:
        return next(iter(by_source))
    return ", ".join(f"{' '.join(roles)} {source}" for source, roles in by_source.items())


# words


def _summary(cls: type[Method]) -> str:
    """What stands after the name at the top of the method's file; of its siblings there, the start of the class's own words."""
    module = inspect.getmodule(cls)
    first = (inspect.getdoc(module) or "").split("\n\n")[0].replace("\n", " ")
    beside = [
        c for c in vars(module).values() if isinstance(c, type) and c.__module__ == cls.__module__ and "name" in vars(c)
    ]
    if len(beside) == 1 or cls.__module__.endswith(f".{cls.name}"):
        return (first.partition(": ")[2] or first).rstrip(".")
    own = re.sub(r"^[\w-]+: ", "", (inspect.getdoc(cls) or "").replace("\n", " "))
    return re.sub("^The ", "the ", re.split(r"[.:;] |\.$|  ", own, maxsplit=1)[0])


def _fields(cls: type[Method]) -> Iterator[Field]:
    hints, meanings = get_type_hints(cls, include_extras=True), _meanings(cls)
    shared = {f.name for f in fields(cast(Any, get("fedit")))}
    for f in fields(cast(Any, cls)):
        kind, choices, bounds = _annotation(hints[f.name])
        default = None if f.default is MISSING else f.default
        section = "lora" if f.name in shared else "method"
        yield Field(f.name, kind, default, choices, bounds, meanings.get(f.name, ""), section)


def _annotation(hint: Any) -> tuple[str, tuple[Any, ...], str]:
    """(type, choices, bounds) of a field's annotation."""
    bounds: list[str] = []
    if get_origin(hint) is Annotated:
        hint, *limits = get_args(hint)
        words = {annotated_types.Gt: "above", annotated_types.Ge: "at least", annotated_types.Lt: "below"}
        for limit in limits:
            word = words.get(type(limit), "at most")
            bounds.append(f"{word} {next(v for v in asdict(limit).values() if v is not None):g}")
    if get_origin(hint) is Literal:
        return "choice", get_args(hint), ""
    if isinstance(hint, type) and issubclass(hint, Method):
        return "table", (), ""
    return getattr(hint, "__name__", str(hint)), (), ", ".join(bounds)


def _meanings(cls: type) -> dict[str, str]:
    """Field -> the docstring that stands under it in the source."""
    found = {}
    for each in reversed(cls.__mro__[:-1]):
        try:
            source = inspect.getsource(each)
        except (OSError, TypeError):
            continue
        for match in re.finditer(r'^    (\w+): [^\n=]+= [^\n]+\n    """(.*?)"""', source, re.DOTALL | re.MULTILINE):
            found[match[1]] = " ".join(match[2].split())
    return found
