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
from typing import Any

from flwr.app import ArrayRecord
from torch import Tensor

from fedlora.config.reader import Config
from fedlora.errors import ProofError, UpdateError
from fedlora.federation.server.heard import heard
from fedlora.federation.wire.certificate import unpack_numbers
from fedlora.strategies.base import Client, Promise
from fedlora.training.certificate import (
    Gap,
    Numbers,
    Sizes,
    Witness,
    key_of,
    measure_as,
    names_of,
    round_gaps,
    shared_sizes,
    sizes,
    start_gaps,
)
from fedlora.training.model.model import Model


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
    agreed: dict[int, str] = field(default_factory=dict)
    """By round: the key that the members of a sum agreed on."""

    def key(self, round: int) -> str:
        drawn = key_of(self.config.run.seed, round, bool(self.config.round.buffer))
        return self.agreed.get(round, drawn)

    def open(self, round: int, cuts: Sequence[int]) -> None:
        """Measure the model that is loaded: what this round's clients are sent."""
        self.before[round] = self._measured(round, cuts)

    def forget(self, needed: Sequence[int]) -> None:
        """Keep the rounds of which somebody is still training, and no others."""
        self.before = {n: x for n, x in self.before.items() if n in needed}
        self.agreed = {n: x for n, x in self.agreed.items() if n in needed}

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
