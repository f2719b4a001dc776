"""What the certificate costs of a round and of its bytes, and the training check of a client's run.

The functions themselves are timed where a round calls them, one process and one thread, so that
each figure is a share of the same round's CPU time.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from flwr.app import Context, Message, RecordDict

from benchmarks.engine import federation, quickstart
from benchmarks.measure import Clock, Row
from fedlora.config.reader import Config
from fedlora.federation.client import handlers as client
from fedlora.federation.client import job, witness
from fedlora.federation.server import certifier
from fedlora.federation.wire.messages import count_bytes

LIMIT = 1500
"""Rows of the quickstart's data for the strategies beside its own; 500 of them are the test set."""
TINY: Mapping[str, Mapping[str, str]] = {
    "fedsb": {"strategy.name": "fedsb"},
    "ravan": {"strategy.name": "ravan"},
    "fedavg on VeRA": {"strategy.name": "fedavg", "lora.form": "vera"},
    "fedsa on VeRA": {"strategy.name": "fedsa", "lora.form": "vera"},
}
"""Those whose uploads are small beside the certificate."""


@dataclass
class Meter:
    """Seconds spent within some functions; a call within a call counts once."""

    clock: Clock = time.process_time
    spent: float = 0.0
    inside: bool = False

    def of(self, work: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(work)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return work(*args, **kwargs)
            self.inside, begun = True, self.clock()
            try:
                return work(*args, **kwargs)
            finally:
                self.spent += self.clock() - begun
                self.inside = False

        return timed


@dataclass(frozen=True)
class Visit:
    """One client's training in one round."""

    client: int
    seconds: float
    """From the message to the reply."""
    check: float
    """Of them in the training check."""
    step: float
    """One step of `train.fit`, on average."""
    down: int
    """Bytes of the message."""
    up: int
    numbers: int
    """Of the bytes up those of the certificate."""


@dataclass
class Meters:
    """What is timed, and where it is called from."""

    certificate: Meter
    check: Meter
    fit: Meter
    clock: Clock

    @classmethod
    def by(cls, clock: Clock) -> "Meters":
        return cls(Meter(clock), Meter(clock), Meter(clock), clock)

    def install(self, stack: ExitStack) -> None:
        for meter, place, name in (
            (self.certificate, certifier.Certifier, "open"),
            (self.certificate, certifier.Certifier, "read"),
            (self.certificate, certifier.Certifier, "close"),
            (self.certificate, witness, "numbers"),
            (self.certificate, client, "pack_numbers"),
            (self.check, job.ClientJob, "check"),
            (self.fit, job, "fit"),
        ):
            stack.enter_context(patch.object(place, name, meter.of(getattr(place, name))))

    def visit(
        self, answer: Callable[[Message], Message], message: Message
    ) -> tuple[Message, Visit]:
        """A train message's reply, and what making it took."""
        check, fit, begun = self.check.spent, self.fit.spent, self.clock()
        reply = answer(message)
        seconds = self.clock() - begun
        up = count_bytes(reply.content)
        bare = RecordDict({k: x for k, x in reply.content.items() if k != "certificate"})
        steps = reply.content.metric_records["metrics"]["steps"]
        assert isinstance(steps, int)
        return reply, Visit(
            message.metadata.dst_node_id, seconds, self.check.spent - check,
            (self.fit.spent - fit) / steps, count_bytes(message.content), up,
            up - count_bytes(bare),
        )  # fmt: skip


@dataclass
class Ran:
    """What each round of a run took; the first makes what is made at first use."""

    rounds: list[float] = field(default_factory=list)
    """Seconds of each."""
    certificates: list[float] = field(default_factory=list)
    """Of them in the certificate."""
    visits: list[list[Visit]] = field(default_factory=list)

    def later(self) -> list[Visit]:
        return [visit for visits in self.visits[1:] for visit in visits]


def measured(config: Config, rounds: int, clock: Clock = time.process_time) -> Ran:
    """These rounds of a federation in this process, by CPU time where no other clock is given."""
    meters, ran = Meters.by(clock), Ran()
    with ExitStack() as stack:
        server, grid = stack.enter_context(federation(config))
        meters.install(stack)
        app = grid.client_app

        def answered(message: Message, context: Context) -> Message:
            def answer(message: Message) -> Message:
                return app(message, context)

            if not message.metadata.message_type.startswith("train"):
                return answer(message)
            reply, visit = meters.visit(answer, message)
            ran.visits[-1].append(visit)
            return reply

        stack.enter_context(patch.object(grid, "client_app", answered))
        for number in range(1, rounds + 1):
            ran.visits.append([])
            spent, begun = meters.certificate.spent, clock()
            server.round(grid, number)
            ran.rounds.append(clock() - begun)
            ran.certificates.append(meters.certificate.spent - spent)
    assert all(ran.certificates), "timed where it is called from"
    assert all(ran.visits), "every round's clients are seen"
    assert all(v.check for v in ran.visits[0]), "timed where it is called from"
    return ran


def rows(quick: bool) -> Iterator[Row]:
    torch.set_num_threads(1)
    small = {"clients.count": 2, "train.steps": 2, "data.limit": LIMIT}
    with tempfile.TemporaryDirectory() as d:
        own = measured(quickstart(d, **(small if quick else {})), 2 if quick else 4)
        setting = "the quickstart, nothing evaluated, from the second round on"
        yield from _certificate("fedex", own, setting, ("<= 0.02", "<= 0.03"))
        for name, changes in TINY.items():
            changes = {"clients.ranks": "8", "data.limit": LIMIT, **changes}
            changes |= {"run.name": name.replace(" ", "-"), **(small if quick else {})}
            setting = (
                f"as above, but rank 8, and {LIMIT} rows, 500 of them the test set, so that a "
                "round is about a fifth as long"
            )
            ran = measured(quickstart(d, **changes), 2 if quick else 3)
            yield from _certificate(name, ran, setting, ("", ""))
        yield from _check(own)


def _certificate(name: str, ran: Ran, setting: str, targets: tuple[str, str]) -> Iterator[Row]:
    """Its share of the time, of what clients send, and of all that travels."""
    shares = [x / whole for x, whole in zip(ran.certificates, ran.rounds, strict=True)][1:]
    ms, seconds = 1e3 * statistics.median(ran.certificates[1:]), statistics.median(ran.rounds[1:])
    yield Row(
        f"certificate, {name}: share of a round's time", statistics.median(shares), targets[0],
        f"CPU time, {ms:.0f} ms of {seconds:.1f} s: measured on {len(ran.visits[-1])} clients at "
        f"start and end and on the server before and after, loaded, read and judged; {setting}",
    )  # fmt: skip
    later = ran.later()
    numbers, up = (statistics.mean([getattr(v, x) for v in later]) for x in ("numbers", "up"))
    both = up + statistics.mean([v.down for v in later])
    how = f"{numbers:.0f} bytes a client of {up:.0f} up, {both:.0f} up and down; {setting}"
    yield Row(f"certificate, {name}: share of the bytes up", numbers / up, targets[1], how)
    yield Row(f"certificate, {name}: share up and down", numbers / both, targets[1], how)


def _check(ran: Ran) -> Iterator[Row]:
    """Once a client and run."""
    clients = sorted({v.client for v in ran.visits[0]})
    mine = [[v for visits in ran.visits for v in visits if v.client == c] for c in clients]
    spent = [sum(v.check for v in visits) for visits in mine]
    whole = [sum(v.seconds for v in visits) for visits in mine]
    shares = [x / y for x, y in zip(spent, whole, strict=True)]
    yield Row(
        "training check: share of a client's run", sum(spent) / sum(whole), "",
        f"CPU time, {statistics.mean(spent):.2f} s of {statistics.mean(whole):.1f} s a client, by "
        f"client {min(shares):.3f} to {max(shares):.3f}; the quickstart's {len(ran.rounds)} rounds "
        "with fedex, nothing evaluated",
    )  # fmt: skip
    step = statistics.median(v.step for v in ran.later())
    yield Row(
        "training check: in training steps", statistics.median(spent) / step, "",
        f"its CPU time over that of one step of 16 rows, {1e3 * step:.0f} ms, the frozen layers' "
        "states kept; the check's passes are many, of four rows each",
    )  # fmt: skip
