"""A round's replies in the order of its cohort: who is asked answers, or is left out.

`uploads` is one of three ways to fill a round; the others are `secure.rounds.uploads`, which
gives sums in place of single updates, and `buffered.uploads`, which waits for the first few.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedlora.errors import FedLoraError
from fedlora.federation.server import certifier
from fedlora.federation.server import options as compose
from fedlora.federation.server.exchange import Gathered, check_norm, exchange, read_reply
from fedlora.federation.wire.codes import FailureKind, Refusal
from fedlora.federation.wire.messages import count_bytes
from fedlora.strategies.base import Client, Round, Upload

if TYPE_CHECKING:
    from fedlora.federation.server.strategy import FederatedLora

Read = tuple[Upload, dict[str, Any]]


def uploads(
    server: "FederatedLora",
    grid: Grid,
    clients: Sequence[Client],
    round: Round,
    gathered: Gathered,
) -> Iterator[Upload]:
    """The round's accepted updates in the cohort's order, each as soon as its turn has come.

    Sums depend on their order, so a reply that overtakes another waits for it here.
    """

    def message(client: Client) -> Message:
        made = server.message(client, round, "train")
        gathered.down[client.id] = count_bytes(made.content)
        gathered.asked[client.id] = time.perf_counter()
        return made

    of_node = {server.nodes[c.id]: c for c in clients}
    waiting = deque(c.id for c in clients)
    here: dict[int, Upload | None] = {}
    answers = exchange(grid, map(message, clients), server.config.round.deadline)
    while waiting:
        begun = time.perf_counter()
        node, reply = next(answers, (-1, None))
        gathered.waited += time.perf_counter() - begun
        if reply is None:
            break
        client = of_node[node]
        here[client.id] = one(server, reply, client, round, gathered)
        del reply  # as large as the upload: neither is to be kept longer than it must
        while waiting and waiting[0] in here:
            if upload := here.pop(waiting.popleft()):
                yield upload
            del upload
    for i in waiting:
        if i not in here:
            reason = f"no reply within {server.config.round.deadline:g} s"
            server.refuse(i, round, Refusal(FailureKind.LATE, reason), gathered)
        elif upload := here[i]:
            yield upload


def one(
    server: "FederatedLora", reply: Message, client: Client, round: Round, gathered: Gathered
) -> Upload | None:
    """A reply as an upload that counts, or None with the reason on record."""
    if (found := read(server, reply, client, round, server.state, gathered)) is None:
        return None
    upload, facts = found
    facts["bytes_down"] = gathered.down.get(client.id, 0)
    facts["elapsed_seconds"] = time.perf_counter() - gathered.asked.get(client.id, 0.0)
    return accept(server, upload, facts, round, gathered)


def read(
    server: "FederatedLora",
    reply: Message,
    client: Client,
    round: Round,
    state: Any,
    gathered: Gathered,
) -> Read | None:
    """A reply to what `state` sent in `round`, decoded and checked, with what it says of itself."""
    try:
        schema = server.schemas.of(state, client, server.base_number(), round)
        upload, facts = read_reply(reply, client, round, server.token, schema, gathered)
        check_norm(server.strategy, state, upload, round, server.config.round.max_norm)
        facts["certificate"] = certifier.read(server, reply.content, upload, round)
    except FedLoraError as e:
        server.refuse(client.id, round, Refusal.of(e), gathered)
        return None
    return upload, facts


def accept(
    server: "FederatedLora",
    upload: Upload,
    facts: dict[str, Any],
    round: Round,
    gathered: Gathered,
) -> Upload | None:
    """Put an update on record; None where a device model says that it came too late."""
    client = upload.client
    if reason := compose.late(server, client, round, facts, gathered):
        server.refuse(client.id, round, Refusal(FailureKind.LATE, reason), gathered)
        return None
    gathered.accepted.append(client.id)
    gathered.clients[client.id] = facts
    gathered.certificates[client.id] = (round.number, *facts.pop("certificate"))
    if server.config.output.keep_updates:
        server.journal.update(round.number, upload)
    server.observer.client_done(client.id, facts)
    return upload
