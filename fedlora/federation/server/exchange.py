"""Replies: how they are waited for, and what is checked before one counts.

Whatever is wrong with a reply costs that reply alone: it is refused with the reason on record,
and the round goes on with the others.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedlora.config.reader import Config
from fedlora.errors import ClientError, TrainingCheckError, UpdateError
from fedlora.federation.server.client_words import MOST_SCORE, check_metrics, facts_of
from fedlora.federation.wire.codes import FailureKind, Refusal
from fedlora.federation.wire.messages import (
    Shapes,
    arrays_of,
    configs_of,
    count_bytes,
    metrics_of,
    unpack_chosen,
    unpack_factors,
)
from fedlora.federation.wire.replies import REPLIES
from fedlora.lora.adapter import Factors
from fedlora.lora.lowrank import norm
from fedlora.strategies import chosen
from fedlora.strategies.base import Client, Download, Round, Strategy, Upload, travelling

POLL, SLOWEST_POLL = 0.05, 1.0
"""Seconds between two looks for replies: at first, and after a while without one."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a client may send, whatever its update is."""

    dtype: str = "float32"
    """wire.dtype: a number of another type is none of this run's."""
    examples: int = 1_000_000
    """round.max-examples."""

    @classmethod
    def of(cls, config: Config) -> "Limits":
        return cls(config.wire.dtype, config.round.max_examples)


@dataclass
class Received:
    """One round's replies as they come in."""

    failed: Callable[[int, str], None] = lambda _, __: None
    """Told who is refused, and why."""
    simulated: bool = False
    """Are all clients this machine?"""
    accepted: list[int] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    clients: dict[int, dict[str, Any]] = field(default_factory=dict)
    down: dict[int, int] = field(default_factory=dict)
    """Bytes sent, by client."""
    asked: dict[int, float] = field(default_factory=dict)
    """When each message was sent."""
    virtual: dict[int, Any] = field(default_factory=dict)
    """(Spent, Work) of each client, where there is a device model."""
    verdict: Any = None
    """What robust.method did."""
    waited: float = 0.0
    """Seconds spent waiting for clients."""
    loss: float | None = None
    """The mean training loss, where the clients' own are not told."""
    stale: dict[int, int] = field(default_factory=dict)
    """Rounds that passed since an accepted client was asked, where there is a buffer."""
    landed: float = 0.0
    """Virtual seconds, when the buffer was full."""
    certificates: dict[int, tuple[int, Any, Any]] = field(default_factory=dict)
    """By client: the round it was asked in, and its numbers at the start and at the end."""
    summed: Any = None
    """Of a secure aggregation: (the mean change of all of them, the errors of any of the factors'
    and of the certificate's numbers, what the latter were divided by)."""
    uncertified: str = ""
    """Why its sum has no certificate, where it has none."""
    secure: Mapping[str, Any] | None = None
    """The outcome of a secure aggregation."""
    diverged: set[int] = field(default_factory=set)
    """Who told a training loss that is no finite number, whether or not the update counts."""

    def refuse(self, i: int, round: Round, refusal: Refusal) -> None:
        """Put on record why a client's reply does not count.

        Raises:
            TrainingCheckError: in a simulation, where every client is this machine: nothing that
                it computes can be believed.
        """
        kind, reason = refusal.kind, refusal.reason
        if self.simulated and kind == FailureKind.UNTRAINED:
            raise TrainingCheckError(f"round {round.number}, client {i}: {reason}")
        entry = {"client": i, "round": round.number, "kind": kind.value, "reason": reason}
        self.failures.append(entry)
        self.failed(i, reason)

    def take_back(self, i: int, round: Round, refusal: Refusal) -> None:
        """Refuse what was accepted before: the client's numbers do not count either."""
        self.accepted.remove(i)
        del self.clients[i], self.certificates[i]
        self.stale.pop(i, None)
        self.refuse(i, round, refusal)

    @property
    def spent(self) -> bool:
        """Did spent budgets, and nothing else, keep clients from answering?

        By the kinds of their failures: any of another kind makes it False, so that one client's
        word never explains what befell another. Who was left out as alone does not count.
        """
        kinds = {f["kind"] for f in self.failures} - {FailureKind.ONLY_OF_ITS_RANKS}
        return kinds == {FailureKind.BUDGET}


def exchange(
    grid: Grid, messages: Iterable[Message], seconds: float, more: deque[Message] | None = None
) -> Iterator[tuple[int, Message]]:
    """Send one by one, and give back (node, reply) as each comes, until the deadline.

    more: what its user adds to it meanwhile is sent as well.

    The node is the one that was asked: an error reply made on its behalf has another sender.
    No message is held here once it was sent, and no reply once it was given.
    """
    until = time.monotonic() + seconds
    pending: dict[str, int] = {}
    looked = 0.0
    for message in messages:
        sent = dict.fromkeys(grid.push_messages([message]), message.metadata.dst_node_id)
        del message
        yield from ready(grid, sent)  # of a simulation: else its replies would gather here
        pending |= sent
        if time.monotonic() - looked > POLL:  # not after each: that takes them times them looks
            yield from ready(grid, pending)
            looked = time.monotonic()
    pause, more = POLL, deque() if more is None else more
    while (pending or more) and time.monotonic() < until:
        while more:
            message = more.popleft()
            pending |= dict.fromkeys(grid.push_messages([message]), message.metadata.dst_node_id)
            del message
        before = len(pending)
        yield from ready(grid, pending)
        if len(pending) < before:
            pause = POLL
        if pending:
            time.sleep(min(pause, max(0.0, until - time.monotonic())))
            pause = min(1.2 * pause, SLOWEST_POLL)


def ready(grid: Grid, pending: dict[str, int]) -> Iterator[tuple[int, Message]]:
    """(node, reply) of each answered message, which is then no longer in `pending`."""
    for mid in list(pending):
        came = list(grid.pull_messages([mid]))
        while came:
            if (node := pending.pop(mid, None)) is None:
                break
            yield node, came.pop(0)


def passing(uploads: Iterator[Upload], look: Callable[[Upload], None]) -> Iterator[Upload]:
    """The uploads, each shown to `look` first and released before the next is asked for."""
    for upload in uploads:
        look(upload)
        yield upload
        del upload


def read_reply(
    reply: Message,
    client: Client,
    round: Round,
    token: str,
    schema: tuple[Shapes, Mapping[str, float]],
    received: Received,
    limits: Limits,
    came: Download | None = None,
) -> tuple[Upload, dict[str, Any]]:
    """A reply to a train message, decoded, with what it says of itself.

    came: what the client was sent, where it chooses which ranks of it to send back; the others
    are completed from it.

    A training loss that is no finite number is noted in `received` first: where training diverged
    the factors are none either, and the reply is refused.

    Raises:
        UpdateError, WireError: what is wrong with it. Nothing of a declared size was allocated.
    """
    tag = tag_of(reply, client, round, token, "train")
    content = reply.content
    try:
        metrics: Mapping[str, Any] = metrics_of(content, "metrics")
        record = arrays_of(content, "sent")
        keeps, n = tag["keeps"], metrics["num-examples"]
    except KeyError as e:
        raise UpdateError(f"the reply lacks {e}") from None
    check_count(n, limits)
    check_metrics(metrics)
    if not abs(metrics.get("loss", 0.0)) <= MOST_SCORE:  # NaN is not, either
        received.diverged.add(client.id)
    shapes, scale = schema
    if came is None:
        upload = Upload(client, unpack_factors(record, scale, shapes, limits.dtype), n)
    else:
        sent, mine = _with_unchosen(content, record, client, schema, limits.dtype, came)
        upload = Upload(client, sent, n, mine)
    return upload, facts_of(client, round, bool(keeps), metrics, count_bytes(content))


def _with_unchosen(
    content: RecordDict,
    record: ArrayRecord,
    client: Client,
    schema: tuple[Shapes, Mapping[str, float]],
    dtype: str,
    came: Download,
) -> tuple[Factors, chosen.Chosen]:
    """The factors of all ranks, of those that the client chose and sent; and which it chose.

    Raises:
        UpdateError, WireError: what is wrong with its choice, or with what it sent.
    """
    shapes, scale = schema
    try:
        said = unpack_chosen(configs_of(content, "chosen"))
    except KeyError as e:
        raise UpdateError(f"the reply lacks {e}: which ranks it sends") from None
    budget = sum(layer.rank for layer in client.layers.values())
    mine = chosen.check(said, chosen.ranks(came.send), budget)
    if came.block:
        chosen.check_blocks(mine, came.block, client)
    sent = unpack_factors(record, scale, chosen.narrowed(shapes, mine), dtype)
    return chosen.completed(sent, mine, came.send), mine


def check_count(n: Any, limits: Limits) -> None:
    """Raises UpdateError where a count of examples is none, or more than round.max-examples."""
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise UpdateError(f"num-examples = {n!r}: must be a positive whole number")
    if n > limits.examples:
        raise UpdateError(
            f"num-examples = {n}: must be at most round.max-examples = {limits.examples}; its "
            "update does not count, and the round's mean is over the others"
        )


def tag_of(
    reply: Message, client: Client, round: Round, token: str, kind: str
) -> Mapping[str, Any]:
    """The tag of a reply, checked to be that of the message it should answer.

    Raises:
        ClientError: it is an error reply.
        UpdateError: it is of another client, round or run, or has records that no reply to a
            message of this kind has.
    """
    if error := error_of(reply):
        raise error
    if strange := [name for name in reply.content if name not in REPLIES[kind]]:
        raise UpdateError(f"the reply has records that nobody asked for: {strange[0][:40]!r}")
    try:
        tag: Mapping[str, Any] = configs_of(reply.content, "reply")
        said = (tag["round"], tag["token"], tag["client"])
    except KeyError as e:
        raise UpdateError(f"the reply lacks {e}") from None
    if said != (round.number, token, client.id):
        raise UpdateError(
            f"the reply is client {said[2]}'s of round {said[0]}"
            + ("" if said[1] == token else " of another run")
            + f", not client {client.id}'s of round {round.number}"
        )
    return tag


def error_of(reply: Message) -> ClientError | None:
    """The error in an error reply; None for any other reply."""
    if not reply.has_error():
        return None
    return ClientError(reply.error.code, reply.error.reason or "no reason given")


def check_norm(
    strategy: Strategy[Any], state: Any, upload: Upload, round: Round, most: float
) -> None:
    """Refuse an update that is far too large, however it is factored. 0 lets any pass.

    Raises:
        UpdateError: with the norm found.
    """
    if not most:
        return
    adapter = strategy.trained(state, upload, round)
    other = (float(x.double().norm()) for x in upload.sent.other.values())
    for what, found in (
        ("adapter", math.hypot(*(float(norm(p)) for p in adapter.values()))),
        ("other tensors", math.hypot(*other)),
    ):
        if not found <= most:
            raise UpdateError(f"the norm of its {what} is {found:.3g}, round.max-norm = {most:g}")


class Schemas:
    """The exact tensors each kind of client must send, and their scales.

    Found by running the client's half on a newcomer's download: no second list to keep.
    """

    def __init__(self, strategy: Strategy[Any]) -> None:
        self.strategy = strategy
        self._known: dict[Any, tuple[Shapes, Mapping[str, float]]] = {}

    def of(
        self, state: Any, client: Client, base_version: int, round: Round
    ) -> tuple[Shapes, Mapping[str, float]]:
        """The schema of a client of these layers in a round of this kind."""
        asked = self.strategy.download(state, client, round)
        key = (
            tuple((m, layer.rank) for m, layer in client.layers.items()),
            tuple((column, name, tuple(x.shape)) for column, name, x in asked.send.items()),
            asked.trainable,  # a strategy may take turns, or prune a client's ranks
        )
        if key not in self._known:
            new = replace(client, has_memory=False, base_version=base_version)
            came = self.strategy.download(state, new, round)
            started = self.strategy.start(came, Factors(), new, round)
            sent = travelling(self.strategy.upload(started, Factors())[0], came.trainable)
            shapes = {(column, name): tuple(x.shape) for column, name, x in sent.items()}
            self._known[key] = shapes, sent.scale
        return self._known[key]

    def columns(self) -> list[str]:
        """Which columns of the factors clients have been asked for so far."""
        return sorted({column for shapes, _ in self._known.values() for column, _ in shapes})
