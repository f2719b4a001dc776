"""A run as three values, and what every phase does with them.

    Setting    what is made once: config, strategy, model, data, planner, journal
    Saved      what a checkpoint holds: the strategy's state, the members, clocks (journal.py)
    Session    what this process alone knows: who is connected, what was asked of whom

A phase is a function of them: it takes a `Saved` and gives back the next one. Nothing but the
session changes in place, and nothing of the session outlives the process.
"""

import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedlora.config.reader import Config
from fedlora.errors import BudgetSpent, FedLoraError, RoundError
from fedlora.federation.server import proof_by_model
from fedlora.federation.server.certifier import Certifier
from fedlora.federation.server.exchange import Received, Schemas, error_of, exchange
from fedlora.federation.server.flights import Flights
from fedlora.federation.server.journal import Journal, Saved
from fedlora.federation.server.planning import Planner
from fedlora.federation.server.roster import Roster
from fedlora.federation.wire.codes import Refusal
from fedlora.federation.wire.job import Job
from fedlora.federation.wire.messages import pack_download, pack_pairs
from fedlora.privacy.central import CentralPrivacy
from fedlora.reports.console import Observer
from fedlora.strategies import forms
from fedlora.strategies.base import Client, Promise, Round, Strategy, whole_download
from fedlora.training import cache, named_metrics, user_code
from fedlora.training.data.corpus import Corpus
from fedlora.training.evaluate import evaluate, parts
from fedlora.training.model.model import Model


@dataclass(frozen=True, slots=True)
class Setting:
    """What is made once, before any client connects."""

    config: Config
    strategy: Strategy[Any]
    model: Model
    corpus: Corpus
    guarantee: Promise
    """What the strategy promises of this form of adapter."""
    planner: Planner
    journal: Journal
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the config that the clients' does not have so: see `Federation`."""

    @classmethod
    def of(cls, config: Config, changes: Mapping[str, Any] = {}) -> "Setting":
        """Loads the data and the model.

        Raises:
            FedLoraError: what is wrong with either.
        """
        was, config = config.flat(), with_kept_places(config)
        strategy, corpus = config.build_strategy(), cache.corpus(config)
        named_metrics.check(config, corpus)
        model = cache.model(config, corpus.labels)
        config = config.for_modules(len(model.shapes))
        changes = {**changes, **{k: v for k, v in config.flat().items() if v != was[k]}}
        guarantee = forms.guarantee(model.form, strategy)
        planner = Planner(config, model)
        journal = Journal(config)
        return cls(config, strategy, model, corpus, guarantee, planner, journal, changes)

    @property
    def labels(self) -> tuple[str, ...]:
        return self.corpus.labels

    @property
    def folds(self) -> bool:
        """Is what a client does not adapt folded into its base?"""
        return self.config.ranks.absent == "fold"

    @property
    def proves_by_model(self) -> bool:
        return proof_by_model.measures(self.model.form, self.guarantee)


def with_kept_places(config: Config) -> Config:
    """The same with the places of the run that it goes on with; without any, if it begins."""
    if not (config.lora.by_gradient or config.lora.places):
        return config
    begun = Journal(config).begun_config() if config.run.resume else {}
    return Config.read({**config.flat(), "lora.places": begun.get("lora.places", "")})


@dataclass(slots=True)
class Session:
    """What one process knows of a run; a resumed run begins with another."""

    observer: Observer
    certifier: Certifier
    schemas: Schemas
    roster: Roster
    simulated: bool = False
    """Are all clients this machine?"""
    central: CentralPrivacy | None = None
    """Client-level DP, where it is on."""
    nodes: dict[int, int] = field(default_factory=dict)
    """Client to Flower node, of those that are connected."""
    flights: Flights = field(default_factory=Flights)
    """Who is training, where there is a buffer."""
    lacking: set[int] = field(default_factory=set)
    """Who said that it lacks what moved its base, and has not answered since."""
    summable: set[Any] = field(default_factory=set)
    """What secure aggregation was found to go with."""
    start: Mapping[str, Any] | None = None
    """How good a start is that was made from data, weights or a gradient: lora/start_quality.py."""
    beforehand: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Bytes down and up before round 0, by client: see first_gradient.py."""
    incarnation: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    since: int = field(default_factory=lambda: int(time.time()))
    """When this incarnation began, in seconds since 1970."""
    started_at: float = field(default_factory=time.perf_counter)

    @classmethod
    def of(cls, setting: Setting, observer: Observer) -> "Session":
        certifier = Certifier(setting.config, setting.model, setting.guarantee)
        return cls(observer, certifier, Schemas(setting.strategy), Roster(observer.note))

    def received(self) -> Received:
        """An empty round's replies, which tell the observer of each refusal."""
        return Received(self.observer.client_failed, self.simulated)


def client(setting: Setting, run: Saved, i: int) -> Client:
    """A client as the strategy sees it now."""
    m = run.members[i]
    layers = setting.model.layers(setting.planner.ranks(m))
    return Client(i, layers, m.base_version, m.memory_round > 0)


def clients(setting: Setting, run: Saved, ids: Iterable[int] | None = None) -> list[Client]:
    """These clients, or all of the run's, in their order."""
    return [client(setting, run, i) for i in sorted(run.members if ids is None else ids)]


def connected(setting: Setting, session: Session, run: Saved) -> list[Client]:
    return clients(setting, run, (i for i in run.members if i in session.nodes))


def base_number(setting: Setting, state: Any) -> int:
    """The number of the newest base change in a state; 0 where the base never moved, or there is
    no state yet."""
    base = () if state is None else setting.strategy.effective(state).base
    return base[-1].number if base else 0


def cuts(setting: Setting, run: Saved) -> tuple[int, ...]:
    """All clients' ranks, where A alone is shared; else none."""
    if setting.guarantee != "shared":
        return ()
    return tuple(sorted({x.rank for c in clients(setting, run) for x in c.layers.values()}))


def load(setting: Setting, session: Session, run: Saved, state: Any) -> None:
    """Load the effective model of a state into the server's own model."""
    effective = setting.strategy.effective(state)
    setting.model.rebase(f"{run.token}/{session.incarnation}", effective.base, run.base_offset)
    setting.model.load(effective.factors)


def score(setting: Setting, part: str = "central") -> dict[str, float] | None:
    """The loaded model on the central test rows, or the "central validation" rows; None where
    there are none."""
    rows = cache.encoded(part, -1, setting.config, setting.labels)
    scores = evaluate(setting.model, rows, setting.config, generate=True)
    return scores and {**scores, "examples": len(rows)}


def keep_parts(setting: Setting, name: str) -> None:
    """Write what a report shows of the central test rows, by the loaded model, to `name`.json.

    Answers are of validation rows where there are any: whoever reads them chooses by them. These
    rows are the server's own: nothing of a client's is in it.
    """
    read = setting.model.task.answers and len(setting.corpus.validation)
    part = "central validation" if read else "central"
    rows = cache.encoded(part, -1, setting.config, setting.labels)
    if found := parts(setting.model, rows, setting.config):
        setting.journal.summary({**found, **({"of": "validation"} if read else {})}, name)


def seconds(session: Session, run: Saved) -> float:
    """Wall time the run has taken, over all its starts."""
    return run.seconds + time.perf_counter() - session.started_at


def message(
    setting: Setting,
    session: Session,
    run: Saved,
    client: Client,
    round: Round,
    kind: str,
    *,
    bare: bool = False,
    ttl: float | None = None,
    state: Any = None,
    rows: str = "",
) -> Message:
    """One client's message: its job and, unless it is bare, its download of `state`.

    Who lacks what moved its base gets all of that again.

    ttl: seconds; by default round.deadline. state: by default the run's newest. rows: which of the
    client's own an evaluation is of, "validation"; by default its test rows.
    """
    member, config = run.members[client.id], setting.config
    job = Job(
        round=round.number,
        token=run.token,
        incarnation=session.incarnation,
        client=client.id,
        ranks={m: layer.rank for m, layer in client.layers.items()},
        memory_round=member.memory_round,
        base_number=base_number(setting, run.state),
        fingerprint=setting.model.fingerprint,
        labels=setting.labels,
        last_round=member.last_round,
        cuts=cuts(setting, run),
        code=user_code.identity(config),
        config=config.identity(),
        changes=setting.changes,
        microbatch=member.microbatch,
        ledger=member.ledger,
        charges=member.charges,
        since=session.since if config.secure.aggregation else 0,
    )
    content = RecordDict()
    lacks = client.id in session.lacking
    if not bare:
        given = run.state if state is None else state
        client = replace(client, base_version=0) if lacks else client
        download = whole_download(setting.strategy, given, client, round, setting.folds)
        content = pack_download(download, config.wire.dtype)
        if run.base_offset and (lacks or not member.last_round):  # once: it keeps it
            content["base-offset"] = pack_pairs(run.base_offset, "float32")
    content["job"] = job.record()
    if rows:
        content["rows"] = ConfigRecord({"part": rows})
    node, group = session.nodes[client.id], str(round.number)
    return Message(content, node, kind, ttl=ttl or config.round.deadline, group_id=group)


def answers(
    setting: Setting, session: Session, grid: Grid, messages: Iterable[Message]
) -> Iterator[tuple[int, Message]]:
    """(client, reply) of those that answered; the others are noted."""
    of_node = {node: i for i, node in session.nodes.items()}
    for node, reply in exchange(grid, messages, setting.config.round.deadline):
        if error := error_of(reply):
            session.observer.client_failed(of_node[node], Refusal.of(error).reason)
        else:
            yield of_node[node], reply


def too_few(setting: Setting, what: str, round: Round, received: Received) -> FedLoraError:
    """The error of a round in which too few counted: BudgetSpent where that is the only cause.

    Only under example-level DP has a client a budget; elsewhere one that says so lies.
    """
    ends = setting.config.privacy.by_example and received.spent
    return (BudgetSpent if ends else RoundError)(told(setting, what, round, received))


def told(setting: Setting, what: str, round: Round, received: Received) -> str:
    """What went wrong with a round, all its failures, and what to do."""
    reasons = "; ".join(f"client {f['client']}: {f['reason']}" for f in received.failures)
    return (
        f"round {round.number}: {what}. {reasons}. The state before it is in "
        f"{setting.journal.directory / 'checkpoint'}; mend the cause and resume."
    )


def weighted(rows: Iterable[Mapping[str, Any]], key: str) -> float | None:
    """The mean of what clients reported, weighted by examples; None where nobody did."""
    told = [(counted(r), r[key]) for r in rows if r.get(key) is not None]
    total = sum(n for n, _ in told)
    return sum(n * x for n, x in told) / total if total else None


def counted(facts: Mapping[str, Any]) -> int:
    """The examples that a client counts as: what it claims, or the cap on that."""
    n: int = facts.get("counted", facts["examples"])
    return n
