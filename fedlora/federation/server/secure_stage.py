"""One stage of a secure aggregation: a message to each, and the replies, each checked."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedlora.errors import FedLoraError, UpdateError
from fedlora.federation.server.exchange import Received, exchange, tag_of
from fedlora.federation.server.journal import Saved
from fedlora.federation.server.run import Session, Setting, message
from fedlora.federation.wire.codes import FailureKind, Refusal
from fedlora.federation.wire.messages import count_bytes
from fedlora.strategies.base import Client, Round

T = TypeVar("T")
LONGEST = 4096
"""Bytes of a key, a share or a signature: theirs have some hundreds."""


@dataclass(frozen=True, slots=True)
class Stages:
    """How the clients of one round are asked, stage by stage."""

    setting: Setting
    session: Session
    run: Saved
    grid: Grid
    client: Mapping[int, Client]
    round: Round
    received: Received
    up: dict[int, int] = field(default_factory=dict)
    """Bytes that came, by client."""

    def ask(
        self,
        name: str,
        asked: Mapping[int, ConfigRecord],
        read: Callable[[int, RecordDict], T],
        bare: bool = True,
        lost: str = "",
    ) -> dict[int, T]:
        """What was read from the replies that are as they must be; the others are refused.

        bare: without the download. lost: what a client that fails here loses, or does not.
        """
        c = self.setting.config
        seconds = min(c.secure.stage_deadline, c.round.deadline) if bare else c.round.deadline

        def messages() -> Iterable[Message]:
            for i, record in asked.items():
                made = message(
                    self.setting, self.session, self.run, self.client[i], self.round,
                    f"train.secagg_{name}", bare=bare, ttl=seconds,
                )  # fmt: skip
                made.content["secagg"] = record
                size = count_bytes(made.content)
                self.received.down[i] = self.received.down.get(i, 0) + size
                yield made

        begun = time.perf_counter()
        of_node = {self.session.nodes[i]: i for i in asked}
        found: dict[int, T] = {}
        failed: set[int] = set()
        for node, reply in exchange(self.grid, messages(), seconds):
            i = of_node[node]
            try:
                tag_of(reply, self.client[i], self.round, self.run.token, f"secagg_{name}")
                found[i] = read(i, reply.content)
                self.up[i] = self.up.get(i, 0) + count_bytes(reply.content)
            except (FedLoraError, KeyError, TypeError, AttributeError) as e:
                error = e if isinstance(e, FedLoraError) else UpdateError(f"the reply lacks {e}")
                failed.add(i)
                self.refuse(i, _at(name, Refusal.of(error), lost))
        for i in sorted(asked.keys() - found.keys() - failed):
            refusal = Refusal(FailureKind.LATE, f"no reply within {seconds:g} s")
            self.refuse(i, _at(name, refusal, lost))
        self.received.waited += time.perf_counter() - begun
        return dict(sorted(found.items()))

    def refuse(self, i: int, refusal: Refusal) -> None:
        self.received.refuse(i, self.round, refusal)


def _at(stage: str, refusal: Refusal, lost: str) -> Refusal:
    """A refusal that says at which stage, and what was lost with it."""
    told = "; ".join(filter(None, (f"{stage}: {refusal.reason}", lost)))
    return Refusal(refusal.kind, told)


def blobs(values: Any, n: int) -> list[bytes]:
    """n byte strings of a size that a key or a share can have."""
    if not isinstance(values, list) or len(values) != n:
        raise UpdateError(f"{n} keys or shares were asked for, and something else came")
    if any(not isinstance(x, bytes) or len(x) > LONGEST for x in values):
        raise UpdateError("a key or share is not of its kind")
    return values
