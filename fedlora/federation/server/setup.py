"""What comes before round 1: meeting the clients, the first state, baselines and round 0."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from flwr.serverapp import Grid

from fedlora.config.reader import Config
from fedlora.errors import RoundError, StrategyError
from fedlora.federation.server.admission import problems as problems_of
from fedlora.federation.server.exchange import POLL
from fedlora.federation.server.first_gradient import first_rate, survey
from fedlora.federation.server.journal import Member, Saved, check_kept
from fedlora.federation.server.proof import Target, kinds, outputs, probes
from fedlora.federation.server.run import Session, Setting, client, clients, load
from fedlora.lora import start_quality
from fedlora.lora.adapter import Factors
from fedlora.lora.start_quality import Quality
from fedlora.privacy.rehearsal import check_first
from fedlora.strategies.base import Client, Round, Start, Strategy, begins, whole_download
from fedlora.training import cache
from fedlora.training.calibration import first_factors
from fedlora.training.model.layers import taken_out
from fedlora.training.precision import described


def meet(setting: Setting, session: Session, run: Saved, grid: Grid) -> Saved:
    """Ask every node who it is, until the clients the config counts on are there.

    Raises:
        RoundError: they are not, in time.
        StrategyError: the strategy cannot do what the config asks of these clients.
    """
    config = setting.config
    want, seconds = config.clients.count, config.round.wait_for_clients
    until = time.monotonic() + seconds
    run = look(setting, session, run, grid)
    while len(session.nodes) < want:
        if time.monotonic() > until:
            away = session.roster.turned_away
            raise RoundError(
                f"{len(session.nodes)} of clients.count = {want} nodes are connected after "
                f"{seconds:g} s; start more nodes (with `flwr run`: --federation-config "
                f"'num-supernodes={want}'), or lower clients.count" + (f"\n{away}" if away else "")
            )
        time.sleep(POLL)
        run = look(setting, session, run, grid)
    everyone = clients(setting, run)
    if problems := list(problems_of(config, setting.strategy, everyone)):
        raise StrategyError("\n".join(problems))
    ranks = sorted({m.rank for m in run.members.values()})
    session.observer.note(
        f"{config.strategy.name} ({setting.guarantee}), {len(run.members)} clients of ranks "
        f"{ranks}, {config.run.rounds} rounds"
    )
    session.observer.note(described(config.train.precision, setting.model.device))
    if setting.model.start.told:
        session.observer.note(setting.model.start.told)
    for line in (*setting.corpus.account.lines(), *setting.corpus.account.warnings()):
        session.observer.note(line)
    return run


def look(setting: Setting, session: Session, run: Saved, grid: Grid) -> Saved:
    """See which nodes are there, and take in those that are new."""
    members = dict(run.members)
    seconds = setting.config.round.wait_for_clients or 1.0
    for i, facts in session.roster.look(grid, seconds):
        if i in members:
            continue
        member = setting.planner.welcome(i, facts)
        reason = _too_late(setting, replace(run, members=members), member)
        if reason:
            session.observer.note(f"client {i} came after the start and is left out: {reason}")
        else:
            members[i] = member
    session.nodes = {i: n for i, n in session.roster.nodes.items() if i in members}
    return replace(run, members=members)


def _too_late(setting: Setting, run: Saved, member: Member) -> str:
    """Why a client cannot join a run that has begun; empty if it can, or if it has not begun."""
    if run.state is None:
        return ""
    if setting.config.privacy.by_client:
        return "privacy.level = 'client' is calibrated to the clients of the start"
    most = setting.planner.widest(list(run.members.values()))
    if any(rank > most.get(m, 0) for m, rank in setting.planner.ranks(member).items()):
        return f"its rank {member.rank} is above the largest the run began with"
    with_it = replace(run, members={**run.members, member.id: member})
    return "; ".join(setting.strategy.problems(clients(setting, with_it)))


def begin(setting: Setting, session: Session, run: Saved, grid: Grid) -> Saved:
    """The first state and the baselines: the run as it is before round 1.

    Raises:
        StrategyError: the strategy would not begin from the base model.
        TrainingCheckError: the server's own model does not train as it must.
        StrategyError: the strategy's state could not be read from a checkpoint again.
    """
    config, strategy, model = setting.config, setting.strategy, setting.model
    everyone = clients(setting, run)
    whole = Client(-1, model.layers(setting.planner.widest([*run.members.values()])))
    made: dict[str, Quality] = {}
    factors = first_factors(model, whole, config, setting.corpus, made)
    tell(session, f"lora.init = {config.lora.init!r}", made)
    if start_quality.nothing_learned(made):
        raise StrategyError(
            f"lora.init = {config.lora.init!r}: what it is made from is zero in every module, so "
            "its directions are arbitrary; name other rows in lora.calibration, or use 'default'"
        )
    start = Start(factors, everyone, model.weights(), config.run.seed)
    base_offset = taken_out(config, factors, model.weights())
    run = replace(run, state=strategy.init(start), base_offset=base_offset)
    if factors.adapter() and config.lora.init != "default":
        check_begins(config, strategy, run.state, everyone, factors)
    check_head(strategy, run.state, everyone, factors, Round(1, config.run.seed))
    if beginner := begins(strategy):
        found = survey(setting, session, run, grid, everyone)
        rate = first_rate(config, found.steps) if strategy.needs().first_rate else 1.0
        step = {m: replace(p, scale=rate * p.scale) for m, p in found.mean.items()}
        tell(session, f"{config.strategy.name}, the first gradient", found.quality)
        run = replace(run, state=beginner.from_gradient(run.state, step))
    check_kept(strategy, run.state)
    if config.evaluate.baselines:
        run = replace(run, baselines=_baselines(setting, session))
    check_model(setting, session, run, 1)
    return run


def tell(session: Session, what: str, found: Mapping[str, Quality]) -> None:
    """Say how good a start is, and keep it for round 0's line."""
    if found:
        session.start = start_quality.record(what, found)
        for line in start_quality.lines(what, found):
            session.observer.note(line)


def check_model(setting: Setting, session: Session, run: Saved, round: int) -> None:
    """Does the server's own model train as it must, at the state there is?

    On a client's rows where this process has them, as in a simulation.

    Raises:
        TrainingCheckError: it does not; before anything is aggregated.
    """
    first = replace(client(setting, run, min(run.members)), base_version=0, has_memory=False)
    config, corpus = setting.config, setting.corpus
    here = not config.data.node_path and any(len(c.train) for c in corpus.clients)
    rows = cache.encoded("train", first.id, config, setting.labels) if here else None
    load(setting, session, run, run.state)
    check_first(setting.model, setting.strategy, run.state, first, rows, config, round)


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
    for one in kinds(clients):
        came = whole_download(strategy, state, one, round, fold_absent=True)
        loaded = strategy.start(came, Factors(), one, round)
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


def check_head(
    strategy: Strategy[Any], state: Any, clients: Sequence[Client], factors: Factors, round: Round
) -> None:
    """A head that nobody trains must not be zero: no gradient would pass it.

    Raises:
        StrategyError: it is, so nothing could be learned.
    """
    trained = strategy.download(state, clients[0], round).trainable
    zero = [name for name, x in factors.other.items() if x.ndim > 1 and not bool(x.any())]
    if zero and "other" not in trained:
        raise StrategyError(
            f"{zero[0]} begins at zero and is not trained, so no gradient passes it and nothing "
            "would be learned; use a head that is drawn (model.pooling = 'default'), or train it "
            "(strategy.fedsvd.head = 'trained')"
        )


def _within(A: torch.Tensor, whole: torch.Tensor) -> bool:
    """Do the rows of A (r, k) lie in the space of those of `whole`?"""
    Q = torch.linalg.qr(whole.double().T)[0]  # (k, rank)
    rows = A.double()
    return float((rows - rows @ Q @ Q.T).norm()) <= 1e-4 * float(rows.norm())


def _baselines(setting: Setting, session: Session) -> dict[str, Mapping[str, float]]:
    from fedlora.training.features import frozen_features

    corpus, config, model = setting.corpus, setting.config, setting.model
    if not (any(len(c.train) for c in corpus.clients) and len(corpus.test)):
        return {}
    # a model of the user's own may name no head
    features = (lambda rows: frozen_features(model, rows, config)) if model.heads else None
    wanted = model.task.baselines(corpus, features)
    found = {}
    for name, compute in wanted.items():
        found[name] = compute()
        session.observer.baseline(name, found[name])
    return found
