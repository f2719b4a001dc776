"""The server's side of the certificate: what it measures, what it reads, and its verdict.

    open     measure the server's own model before the round
    read     one client's numbers, with its reply
    close    measure it after the aggregation, before any stage that moves the mean on purpose

Strategies are not asked for anything. What cannot be held against the equations is named in the
record, "not certified".
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord, RecordDict
from torch import Tensor

from fedlora.config.reader import Config
from fedlora.errors import ProofError, UpdateError
from fedlora.federation.server.exchange import Gathered
from fedlora.federation.server.heard import heard
from fedlora.federation.wire.certificate import unpack_numbers
from fedlora.strategies.base import Client, Promise, Round, Upload, top_ranks
from fedlora.training.certificate import (
    Gap,
    Numbers,
    Sizes,
    Witness,
    key_of,
    measure_as,
    names_of,
    quantised,
    round_gaps,
    shared_sizes,
    sizes,
    start_gaps,
)
from fedlora.training.model.model import Model

if TYPE_CHECKING:
    from fedlora.federation.server.strategy import FederatedLora


@dataclass(frozen=True, slots=True)
class Certificate:
    """One round's verdict."""

    promise: Promise
    starts: Mapping[int, float]
    """By client, how far it began from what it was sent, of the size of its own change."""
    deviation: float
    """How far the server's change is from the mean of the clients', of their size."""
    layers: Mapping[str, float]
    starts_excess: Mapping[int, float]
    """By client, the gap over what rounding explains: above 1 it is a fault."""
    excess: float
    worst: str
    silent: Sequence[str]
    """What is not certified."""
    heard: Mapping[int, float] = field(default_factory=dict)
    """By client, how much it counted over how much it should: see heard.py."""

    def record(self) -> dict[str, Any]:
        return {
            "start": {str(i): x for i, x in self.starts.items()},
            "start_excess": max(self.starts_excess.values(), default=None),
            "deviation": self.deviation,
            "excess": self.excess,
            "worst": self.worst,
            "layers": dict(self.layers),
            "heard": {str(i): x for i, x in self.heard.items()},
            "not_certified": list(self.silent),
        }

    def enforce(self, strategy: str, round: int) -> None:
        """Raises ProofError where an exact strategy misses an equation by more than rounding."""
        if self.promise == "approximate":
            return
        if wrong := [i for i, x in self.starts_excess.items() if not x <= 1]:
            worst = max(wrong, key=lambda i: self.starts_excess[i])
            raise ProofError(
                f"round {round}: {_clients(wrong)} did not begin from the model that {strategy} "
                f"sent: what they measured of it is {self.starts_excess[worst]:.1e} times farther "
                f"off than rounding explains (certificate). {KEPT}"
            )
        if not self.excess <= 1:
            raise ProofError(
                f"round {round}: {strategy} promises an exact aggregation, but its model did not "
                f"move by the mean of what the clients' models moved by: {self.excess:.1e} times "
                f"what rounding explains, most in {self.worst} (certificate). {KEPT}"
            )


KEPT = (
    "The state before this round is in the checkpoint; nothing of this round was kept. "
    "proof.enforce = false goes on regardless."
)


def _clients(ids: Sequence[int]) -> str:
    some = ", ".join(str(i) for i in ids[:5])
    more = f" and {len(ids) - 5} more" if len(ids) > 5 else ""
    return f"client{'s' if len(ids) > 1 else ''} {some}{more}"


@dataclass
class Certifier:
    """What the server knows of the rounds whose clients may still answer."""

    config: Config
    model: Model
    promise: Promise
    before: dict[int, tuple[Numbers, Sizes]] = field(default_factory=dict)
    """By the round of asking: the model that its clients were sent."""

    def key(self, round: int) -> str:
        return key_of(self.config.run.seed, round, bool(self.config.round.buffer))

    def open(self, round: int, cuts: Sequence[int]) -> None:
        """Measure the model that is loaded: what this round's clients are sent."""
        self.before[round] = self._measured(round, cuts)

    def forget(self, needed: Sequence[int]) -> None:
        """Keep the rounds of which somebody is still training, and no others."""
        self.before = {n: x for n, x in self.before.items() if n in needed}

    def _measured(self, round: int, cuts: Sequence[int]) -> tuple[Numbers, Sizes]:
        model = self.model
        shapes, others = model.shapes, [] if cuts else [*model.live()["other"]]
        numbers = measure_as(model, self.key(round), dict.fromkeys(shapes, 0), others, cuts)
        size = shared_sizes(model, numbers) if cuts else sizes(model, shapes, others)
        return numbers, size

    def read(
        self,
        record: ArrayRecord,
        client: Client,
        asked: int,
        others: Sequence[str],
        cuts: Sequence[int],
        times: int = 2,
    ) -> list[Numbers]:
        """A client's numbers at its start and, if both are asked for, its end.

        Raises:
            WireError, UpdateError: they are not what was asked for.
        """
        ranks = {m: layer.rank for m, layer in client.layers.items()}
        found = unpack_numbers(record, names_of(ranks, others, cuts), times)
        mine = self.before[asked][0]
        for numbers in found:
            for name, x in numbers.items():
                if bool(mine[name].isfinite().all()) and not bool(x.isfinite().all()):
                    raise UpdateError(f"its certificate's numbers of {name} are NaN or Inf")
        return found

    def close(
        self,
        round: int,
        starts: Mapping[int, tuple[int, Numbers]],
        witnesses: Mapping[int, Witness],
        ranks: Mapping[str, int],
        cuts: Sequence[int],
        silent: Sequence[str] = (),
        room: Mapping[str, float] = MappingProxyType({}),
    ) -> Certificate:
        """The verdict, with the model loaded as it is after the aggregation.

        starts: by client, the round it was asked in, and its numbers then. witnesses: by client, or
        one that stands for a sum. ranks: the largest of each module. silent: what is not certified;
        where there is any, the round's equation is not held against it. room: what else than
        rounding explains, by name.
        """
        wire, dtype = self.config.wire.dtype, self.config.model.dtype
        before, size = self.before[round]
        after, after_size = self._measured(round, cuts)
        gaps: dict[str, Gap] = {}
        if not silent:
            both = (size, after_size)
            here = [*witnesses.values()]
            gaps = round_gaps(before, after, both, here, ranks, wire, dtype)
            gaps = {m: replace(g, bound=g.bound + room.get(m, 0.0)) for m, g in gaps.items()}
        begun = {i: start_gaps(*self.before[n], x, wire, dtype) for i, (n, x) in starts.items()}
        known = {m: g for m, g in gaps.items() if not math.isnan(g.found)}
        worst = max(known, key=lambda m: known[m].excess, default="")
        moved = [w.change(m) for w in witnesses.values() for m in w.start]
        mean = _size(moved) / max(len(witnesses), 1) ** 0.5
        if self.config.privacy.by_client:  # it depends on the clients, and no noise covers it
            mean = 0.0
        return Certificate(
            self.promise,
            {i: _share(found.values(), mean) for i, found in begun.items()},
            _share(known.values(), mean),
            {m: _share([g], _size([w.change(m) for w in witnesses.values() if m in w.start])
                       / max(len(witnesses), 1) ** 0.5) for m, g in known.items()},
            {i: max((g.excess for g in x.values() if not math.isnan(g.found)), default=0.0)
             for i, x in begun.items()},
            known[worst].excess if worst else 0.0,
            worst,
            [*silent, *(f"{m}: not linear in its input" for m in gaps if m not in known)],
            {} if silent else heard(before, after, witnesses),
        )  # fmt: skip


def _size(changes: Iterable[Tensor]) -> float:
    """The root of the summed mean squares."""
    return math.sqrt(sum(float(c.nan_to_num().square().mean()) for c in changes))


def _share(gaps: Iterable[Gap], size: float) -> float:
    """The gaps' size over this one; the gaps' own where that is zero."""
    gap = math.sqrt(sum(g.found**2 for g in gaps if not math.isnan(g.found)))
    return gap / size if size else gap


# -- in a round -----------------------------------------------------------------------------------


def cuts(server: "FederatedLora") -> tuple[int, ...]:
    """All clients' ranks, where A alone is shared; else none."""
    if server.promise != "shared":
        return ()
    ranks = {x.rank for i in server.members for x in server.client(i).layers.values()}
    return tuple(sorted(ranks))


def begin(server: "FederatedLora", number: int, state: Any) -> None:
    """Load and measure what the clients of this round are sent."""
    server.load(server.strategy.effective(state))
    server.certifier.open(number, cuts(server))


def read(
    server: "FederatedLora", content: RecordDict, upload: Upload, asked: Round
) -> list[Numbers]:
    """The numbers that came with an upload: at its start and its end.

    Raises:
        WireError, UpdateError: they are not what was asked for.
    """
    if asked.number not in server.certifier.before:  # of before a restart
        flight = server.buffer.flights.get(upload.client.id)
        begin(server, asked.number, flight.state if flight else server.state)
    record = content.array_records.get("certificate", ArrayRecord())
    others = [*upload.sent.other]
    return server.certifier.read(record, upload.client, asked.number, others, cuts(server))


def end(server: "FederatedLora", gathered: Gathered, number: int) -> None:
    """The round's certificate, with the model loaded as it is after the aggregation.

    Raises:
        ProofError: the strategy promises to be exact and was not, unless proof.enforce is off.
    """
    came = sorted(gathered.certificates.items())  # sums are the same whoever was first
    starts = {i: (n, x) for i, (n, x, _) in came if i in gathered.clients}
    summed = gathered.summed
    gathered.certificate = found = server.certifier.close(
        number,
        starts,
        {-1: summed[0]} if summed else witnesses_of(server.config, gathered),
        top_ranks(server.client(i) for i in server.members),
        cuts(server),
        silent_of(server.config, gathered),
        quantised(server.model, summed[1], summed[0].start, summed[2]) if summed else {},
    )
    server.certifier.forget([f.round.number for f in server.buffer.flights.values()])
    if server.config.proof.enforce:
        found.enforce(server.config.strategy.name, number)


def witnesses_of(config: Config, gathered: Gathered) -> dict[int, Witness]:
    """By client whose update counts, its numbers as they count.

    Robust methods that leave clients out or weigh them, and a stale update's weight, are factors
    of these.
    """
    verdict, found = gathered.verdict, {}
    for i, (_, start, end) in sorted(gathered.certificates.items()):
        if i not in gathered.clients or (verdict and i in verdict.dropped):
            continue
        weight = float(gathered.clients[i]["examples"])
        if verdict and verdict.method == "median":
            weight = verdict.factors[i]
        late = (1 + gathered.stale.get(i, 0)) ** -config.round.staleness_exponent
        counted = {name: start[name] + late * (x - start[name]) for name, x in end.items()}
        found[i] = Witness(weight, start, counted if late != 1 else end)
    return found


def silent_of(config: Config, gathered: Gathered) -> list[str]:
    """The stages of this round that move the mean on purpose, and not by a factor."""
    found = []
    if config.privacy.by_client:
        found.append("client-level privacy: the mean is clipped and noised")
    if gathered.verdict and gathered.verdict.method == "norm-bound" and gathered.verdict.factors:
        found.append("robust.method = 'norm-bound': changes were shortened factor by factor")
    return found
