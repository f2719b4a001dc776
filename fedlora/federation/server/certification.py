"""The certificate as a stage of every round: measured before it, read with replies, then judged.

It holds for the round's mean as the strategy makes it. What moves that mean on purpose comes after
it in the list of stages, or is named as not certified.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flwr.app import ArrayRecord, RecordDict

from fedlora.config.reader import Config
from fedlora.federation.server.certifier import Certificate
from fedlora.federation.server.exchange import Received
from fedlora.federation.server.journal import Saved
from fedlora.federation.server.run import Session, Setting, clients, counted, cuts, load
from fedlora.federation.wire.messages import arrays_of
from fedlora.strategies.base import Client, Round, Upload, top_ranks
from fedlora.training.certificate import Numbers, Witness, quantised


class Certification:
    """The `Stage` that measures, by the model's own modules, what is sent and what results."""

    def __init__(self, setting: Setting, session: Session) -> None:
        self.setting, self.session = setting, session
        self.found: Certificate | None = None

    def open(self, run: Saved, cohort: Sequence[Client], round: Round) -> None:
        self.found = None
        if not self.setting.config.secure.aggregation:  # there the probes are agreed on first
            measure(self.setting, self.session, run, round.number, run.state)

    def uploads(
        self, uploads: Iterator[Upload], run: Saved, round: Round, received: Received
    ) -> Iterator[Upload]:
        return uploads

    def close(self, before: Saved, after: Saved, round: Round, received: Received) -> Saved:
        """Judge the round.

        Raises:
            ProofError: the strategy promises to be exact and was not, unless proof.enforce is off.
        """
        setting, session, config = self.setting, self.session, self.setting.config
        load(setting, session, after, after.state)
        came = sorted(received.certificates.items())  # sums are the same whoever was first
        starts = {i: (n, x) for i, (n, x, _) in came if i in received.clients}
        summed, model = received.summed, setting.model
        witnesses = {-1: summed[0]} if summed else witnesses_of(config, received)
        errors: tuple[float, float] = summed[1] if summed else (0.0, 0.0)
        if received.uncertified:
            witnesses = {}
        self.found = session.certifier.close(
            round.number,
            starts,
            witnesses,
            top_ranks(clients(setting, before)),
            cuts(setting, before),
            silent_of(config, received),
            quantised(model, *errors, summed[0].start, summed[2]) if summed else {},
        )
        session.certifier.forget([f.round.number for f in session.flights.of.values()])
        if config.proof.enforce:
            self.found.enforce(config.strategy.name, round.number)
        return after

    def record(self) -> Mapping[str, Any]:
        return {"certificate": self.found and self.found.record()}


def measure(setting: Setting, session: Session, run: Saved, number: int, state: Any) -> None:
    """Load and measure what the clients of this round are sent."""
    load(setting, session, run, state)
    session.certifier.open(number, cuts(setting, run))


def read(
    setting: Setting,
    session: Session,
    run: Saved,
    content: RecordDict,
    upload: Upload,
    asked: Round,
) -> list[Numbers]:
    """The numbers that came with an upload: at its start and its end.

    Raises:
        WireError, UpdateError: they are not what was asked for.
    """
    if asked.number not in session.certifier.before:  # of before a restart
        flight = session.flights.of.get(upload.client.id)
        measure(setting, session, run, asked.number, flight.state if flight else run.state)
    record = arrays_of(content, "certificate") if "certificate" in content else ArrayRecord()
    others = [*upload.sent.other]
    cut = cuts(setting, run)
    return session.certifier.read(record, upload.client, asked.number, others, cut)


def witnesses_of(config: Config, received: Received) -> dict[int, Witness]:
    """The numbers of each client whose update counts, weighted as it counts.

    Capped counts, robust methods that leave clients out or weigh them, and a stale update's
    weight, are factors of these.
    """
    verdict, found = received.verdict, {}
    for i, (_, start, end) in sorted(received.certificates.items()):
        if i not in received.clients or (verdict and i in verdict.dropped):
            continue
        weight = 1.0 if verdict else float(counted(received.clients[i]))
        if verdict and verdict.method == "median":
            weight = verdict.factors[i]
        late = (1 + received.stale.get(i, 0)) ** -config.round.staleness_exponent
        brought = {name: start[name] + late * (x - start[name]) for name, x in end.items()}
        found[i] = Witness(weight, start, brought if late != 1 else end)
    return found


def silent_of(config: Config, received: Received) -> list[str]:
    """The stages of this round that move the mean on purpose, and not by a factor."""
    found = []
    if config.privacy.by_client:
        found.append("client-level privacy: the mean is clipped and noised")
    if received.verdict and received.verdict.method == "norm-bound" and received.verdict.factors:
        found.append("robust.method = 'norm-bound': changes were shortened factor by factor")
    if received.uncertified:
        found.append(received.uncertified)
    return found
