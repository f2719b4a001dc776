"""The stages around a strategy's aggregation, in their order.

    bounds         whose change no honest client can have is left out; counts     by default
                   are capped
    sum bound      the same of a sum, of which no part is known                   secure sums
    honesty        whose numbers are not its own is left out                      deployments
    screening      robust.method: which updates the strategy gets to see          if asked for
    privacy        privacy.level = "client": one clipped, noised mean             if asked for
    ranks          ranks.policy = "adaptive": the next round's, by module         if asked for
    proof          the aggregate is what the strategy promises, by its algebra
    certificate    the model moved by the mean of its clients', by its modules
    optimizer      server.optimizer: where to go, given the aggregate             if asked for
    clock          devices.classes: what the round would have taken               if asked for

Updates pass through them in this order, one at a time; then each closes the round in this order.
What cannot be is said before anything is sent: see preflight.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Protocol

from fedlora.federation.server.adaptive import AdaptiveRanks
from fedlora.federation.server.bounds import ClientBounds, SumBound
from fedlora.federation.server.certification import Certification
from fedlora.federation.server.exchange import Received
from fedlora.federation.server.honesty import Honesty
from fedlora.federation.server.journal import Saved
from fedlora.federation.server.proving import Proving
from fedlora.federation.server.run import Session, Setting, clients
from fedlora.federation.server.screening import Verdict, screen
from fedlora.strategies import server_optimizers
from fedlora.strategies.base import Client, Round, Upload


class Stage(Protocol):
    """One mechanism of a round, whatever the strategy."""

    def open(self, run: Saved, cohort: Sequence[Client], round: Round) -> None:
        """Before anything is sent to the cohort. Raises what must stop the round."""

    def uploads(
        self, uploads: Iterator[Upload], run: Saved, round: Round, received: Received
    ) -> Iterator[Upload]:
        """The updates as the next stage sees them; may release each that has passed."""

    def close(self, before: Saved, after: Saved, round: Round, received: Received) -> Saved:
        """The run after the round, given the one with the aggregate. Raises what must undo it."""

    def record(self) -> Mapping[str, Any]:
        """The stage's entries in the round's line of rounds.jsonl."""


def stages(setting: Setting, session: Session, stricter: float = 0.0) -> list[Stage]:
    """The stages of this run, in their order.

    stricter: the round.norm-bound of a round that is played again.
    """
    config, found = setting.config, list[Stage]()
    norm_bound = stricter or config.round.norm_bound
    if ClientBounds.applies(setting, session) and (norm_bound or config.round.count_bound):
        found.append(ClientBounds(setting, session, norm_bound))
    if config.secure.aggregation:
        found.append(SumBound(setting))
    if Honesty.applies(setting, session):
        found.append(Honesty(setting, session))
    if config.robust.method != "none":
        found.append(Screening(setting))
    if session.central:
        found.append(ClientPrivacy(setting, session))
    if config.ranks.policy == "adaptive":
        found.append(AdaptiveRanks(setting))
    found += [Proving(setting, session), Certification(setting, session)]
    if server_optimizers.build_optimizer(config.server):
        found.append(ServerOptimization(setting))
    if setting.planner.devices:
        found.append(DeviceClock(setting))
    return found


class Screening:
    """The uploads that robust.method lets count."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.verdict: Verdict | None = None

    def open(self, run: Saved, cohort: Sequence[Client], round: Round) -> None:
        self.verdict = None

    def uploads(
        self, uploads: Iterator[Upload], run: Saved, round: Round, received: Received
    ) -> Iterator[Upload]:
        if found := list(uploads):
            strategy, config = self.setting.strategy, self.setting.config
            kept, self.verdict = screen(found, strategy, run.state, round, config)
            received.verdict = self.verdict
            yield from kept

    def close(self, before: Saved, after: Saved, round: Round, received: Received) -> Saved:
        return after

    def record(self) -> Mapping[str, Any]:
        return {"robust": asdict(self.verdict)} if self.verdict else {}


class ClientPrivacy:
    """The one private mean in place of the uploads, and what it cost."""

    def __init__(self, setting: Setting, session: Session) -> None:
        assert session.central is not None
        self.setting, self.session, self.mechanism = setting, session, session.central

    def open(self, run: Saved, cohort: Sequence[Client], round: Round) -> None:
        """Check that the round can be private, and charge the budget for it.

        Raises:
            StrategyError: these clients, or this strategy, cannot be made private.
            BudgetSpent: the budget does not allow another round.
        """
        everyone, note = clients(self.setting, run), self.session.observer.note
        strategy = self.setting.strategy
        self.mechanism.open_round(strategy, run.state, everyone, round, run.token, note)

    def uploads(
        self, uploads: Iterator[Upload], run: Saved, round: Round, received: Received
    ) -> Iterator[Upload]:
        return self.mechanism.mean(uploads, round)

    def close(self, before: Saved, after: Saved, round: Round, received: Received) -> Saved:
        return replace(after, clip=self.mechanism.C)

    def record(self) -> Mapping[str, Any]:
        return {"privacy": self.mechanism.record()}


class ServerOptimization:
    """A step of server.optimizer from the state before toward the aggregate."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.cohort: Sequence[Client] = ()

    def open(self, run: Saved, cohort: Sequence[Client], round: Round) -> None:
        self.cohort = cohort

    def uploads(
        self, uploads: Iterator[Upload], run: Saved, round: Round, received: Received
    ) -> Iterator[Upload]:
        return uploads

    def close(self, before: Saved, after: Saved, round: Round, received: Received) -> Saved:
        optimizer = server_optimizers.build_optimizer(self.setting.config.server)
        assert optimizer is not None
        strategy = self.setting.strategy
        sent = (strategy.download(before.state, c, round).trainable for c in self.cohort)
        trained = frozenset[str]().union(*sent)
        moments = before.moments or server_optimizers.Moments()
        state, moments = server_optimizers.stepped(
            optimizer, moments, before.state, after.state, trained
        )
        return replace(after, state=state, moments=moments)

    def record(self) -> Mapping[str, Any]:
        return {}


class DeviceClock:
    """The virtual clock, moved on by what the round would have taken."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.found: Mapping[str, Any] = {}

    def open(self, run: Saved, cohort: Sequence[Client], round: Round) -> None:
        self.found = {}

    def uploads(
        self, uploads: Iterator[Upload], run: Saved, round: Round, received: Received
    ) -> Iterator[Upload]:
        return uploads

    def close(self, before: Saved, after: Saved, round: Round, received: Received) -> Saved:
        devices, config = self.setting.planner.devices, self.setting.config
        if devices is None or not received.virtual:
            return after
        spent = {i: s for i, (s, _) in received.virtual.items()}
        works = {i: w for i, (_, w) in received.virtual.items()}
        landed = received.landed if config.round.buffer else None
        found = devices.record(spent, works, before.clock, config.devices.deadline, landed)
        self.found = {"virtual": found}
        return replace(after, clock=found["clock"])

    def record(self) -> Mapping[str, Any]:
        return self.found
