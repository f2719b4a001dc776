"""What comes before round 1: meeting the clients, the first state, baselines and round 0."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from flwr.serverapp import Grid

from fedlora.config.reader import Config
from fedlora.errors import RoundError, StrategyError
from fedlora.federation.server.admission import problems as problems_of
from fedlora.federation.server.exchange import POLL, Gathered
from fedlora.federation.server.first_gradient import survey
from fedlora.federation.server.journal import Member
from fedlora.federation.server.proof import Target, kinds, outputs, probes
from fedlora.lora.adapter import Factors
from fedlora.privacy.rehearsal import check_first
from fedlora.strategies.base import Client, Round, Start, Strategy, whole_download
from fedlora.training import cache as site
from fedlora.training.calibration import first_factors
from fedlora.training.model.layers import taken_out

if TYPE_CHECKING:
    from fedlora.federation.server.strategy import FederatedLora


def meet(server: "FederatedLora", grid: Grid) -> None:
    """Ask every node who it is, until the clients the config counts on are there."""
    want = server.config.clients.count
    until = time.monotonic() + server.config.round.wait_for_clients
    while True:
        look(server, grid)
        if len(server.nodes) >= want:
            break
        if time.monotonic() > until:
            raise RoundError(
                f"{len(server.nodes)} of clients.count = {want} nodes are connected after "
                f"{server.config.round.wait_for_clients:g} s; start more nodes (with `flwr run`: "
                f"--federation-config 'num-supernodes={want}'), or lower clients.count"
            )
        time.sleep(POLL)
    clients = [server.client(i) for i in sorted(server.members)]
    if problems := list(problems_of(server.config, server.strategy, clients)):
        raise StrategyError("\n".join(problems))
    server.summary()


def look(server: "FederatedLora", grid: Grid) -> None:
    """See which nodes are there, and take in those that are new."""
    for i, facts in server.roster.look(grid, server.config.round.wait_for_clients or 1.0):
        _welcome(server, i, facts)
    server.nodes = {i: n for i, n in server.roster.nodes.items() if i in server.members}


def _welcome(server: "FederatedLora", i: int, facts: Mapping[str, Any]) -> None:
    if i in server.members:
        return
    member = server.planner.welcome(i, facts)
    if server.state is not None and (reason := _too_late(server, member)):
        server.observer.note(f"client {i} came after the start and is left out: {reason}")
        return
    server.members[i] = member


def _too_late(server: "FederatedLora", member: Member) -> str:
    """Why a client cannot join a run that has begun; empty if it can."""
    if server.config.privacy.by_client:
        return "privacy.level = 'client' is calibrated to the clients of the start"
    most = server.planner.widest(list(server.members.values()))
    if any(rank > most.get(m, 0) for m, rank in server.planner.ranks(member).items()):
        return f"its rank {member.rank} is above the largest the run began with"
    server.members[member.id] = member
    clients = [server.client(i) for i in sorted(server.members)]
    del server.members[member.id]
    return "; ".join(server.strategy.problems(clients))


def begin(server: "FederatedLora", grid: Grid) -> None:
    """The first state, the baselines, and the model before any training: round 0."""
    begun = time.perf_counter()
    clients = [server.client(i) for i in sorted(server.members)]
    members = [server.members[c.id] for c in clients]
    whole = Client(-1, server.model.layers(server.planner.widest(members)))
    factors = first_factors(server.model, whole, server.config, server.corpus)
    start = Start(factors, clients, server.model.weights(), server.config.run.seed)
    server.origin = taken_out(server.config, factors, server.model.weights())
    server.state = server.strategy.init(start)
    if factors.adapter() and server.config.lora.init != "default":
        check_begins(server.config, server.strategy, server.state, clients, factors)
    if getattr(server.strategy, "wants_gradient", False):
        server.state = server.strategy.from_gradient(server.state, survey(server, grid, clients))  # type: ignore[attr-defined]
    if server.config.evaluate.baselines:
        _baselines(server)
    check_model(server, 1)
    server.load(server.strategy.effective(server.state))
    record = server.record(0, Gathered(), [], None, server.evaluate(0))
    record["seconds"] = {"total": time.perf_counter() - begun}
    server.commit(0, record)
    server.observer.round_done(record)


def check_model(server: "FederatedLora", round: int) -> None:
    """Does the server's own model train as it must, at the state there is?

    On a client's rows where this process has them, as in a simulation.

    Raises:
        TrainingCheckError: it does not; before anything is aggregated.
    """
    client = replace(server.client(min(server.members)), base_version=0, has_memory=False)
    config, corpus = server.config, server.corpus
    here = not config.data.node_path and any(len(c.train) for c in corpus.clients)
    rows = site.encoded("train", client.id, config, server.labels) if here else None
    server.load(server.strategy.effective(server.state))
    check_first(server.model, server.strategy, server.state, client, rows, config, round)


def check_begins(
    config: Config, strategy: Strategy[Any], state: Any, clients: Sequence[Client], factors: Factors
) -> None:
    """Every kind of client must begin with the B A that lora.init made, wherever it lies.

    Where B = 0, with rows of A that are of those it made.

    Raises:
        StrategyError: the strategy begins otherwise, so a client would not start from W0.
    """
    round = Round(1, config.run.seed)
    want = factors.adapter()
    target = Target(probes(clients, 1, round.seed, 0))
    target.add(want, 1)
    for client in kinds(clients):
        came = whole_download(strategy, state, client, round, fold_absent=True)
        loaded = strategy.start(came, Factors(), client, round)
        for m, y in outputs(target, came.base, loaded.adapter(), came.fold).items():
            size = want[m].scale * float(want[m].A.norm() * want[m].B.norm())
            same = float((y - target.mean(m)).norm()) <= 1e-4 * size
            if not same or (m in loaded.A and not size and not _within(loaded.A[m], want[m].A)):
                init, name = config.lora.init, config.strategy.name
                raise StrategyError(
                    f"lora.init = {init!r}: {name} begins with factors of its own, or cuts "
                    "these where ranks differ, so clients would not start from the base model; use "
                    "fedavg, ffa, fedex or rolora, or lora.init = 'default'"
                )


def _within(A: torch.Tensor, whole: torch.Tensor) -> bool:
    """Do the rows of A (r, k) lie in the space of those of `whole`?"""
    Q = torch.linalg.qr(whole.double().T)[0]  # (k, rank)
    rows = A.double()
    return float((rows - rows @ Q @ Q.T).norm()) <= 1e-4 * float(rows.norm())


def _baselines(server: "FederatedLora") -> None:
    from fedlora.training import baselines
    from fedlora.training.features import frozen_features

    trainable = any(len(c.train) for c in server.corpus.clients) and len(server.corpus.test)
    if server.config.model.task != "classification" or not trainable:
        return
    found: dict[str, Callable[[], Mapping[str, float]]] = {
        "majority class": lambda: baselines.majority(server.corpus),
        "TF-IDF + logistic regression": lambda: baselines.tfidf(server.corpus),
        "trained head only": lambda: baselines.trained_head(
            server.corpus, lambda texts: frozen_features(server.model, texts, server.config)
        ),
    }
    for name, compute in found.items():
        server.baselines[name] = compute()
        server.observer.baseline(name, server.baselines[name])
