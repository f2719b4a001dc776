"""Synchronous rounds: replies in the cohort's order; a client that fails to answer is left out.

`uploads` is one of three ways to fill a round; the others are `secure_rounds.uploads`, which
gives sums in place of single updates, and `asynchronous.uploads`, which waits for the first few.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedlora.errors import FedLoraError
from fedlora.federation.server import certification
from fedlora.federation.server.exchange import Limits, Received, check_norm, exchange, read_reply
from fedlora.federation.server.journal import Saved
from fedlora.federation.server.run import Session, Setting, base_number
from fedlora.federation.server.run import message as message_to
from fedlora.federation.wire.codes import FailureKind, Refusal, kind_of
from fedlora.federation.wire.messages import count_bytes
from fedlora.strategies.base import Client, Round, Upload

Read = tuple[Upload, dict[str, Any]]


def uploads(
    setting: Setting,
    session: Session,
    run: Saved,
    grid: Grid,
    cohort: Sequence[Client],
    round: Round,
    received: Received,
) -> Iterator[Upload]:
    """The round's accepted updates in the cohort's order, each as soon as its turn has come.

    Sums depend on their order, so a reply that overtakes another waits for it here. Who says that
    it lacks what moved its base is asked once more, with all of that.
    """

    def message(client: Client) -> Message:
        made = message_to(setting, session, run, client, round, "train")
        sent = received.down.get(client.id, 0)
        received.down[client.id] = sent + count_bytes(made.content)
        received.asked[client.id] = time.perf_counter()
        return made

    deadline = setting.config.round.deadline
    of_node = {session.nodes[c.id]: c for c in cohort}
    waiting = deque(c.id for c in cohort)
    here: dict[int, Upload | None] = {}
    again: deque[Message] = deque()
    answers = exchange(grid, map(message, cohort), deadline, again)
    while waiting:
        begun = time.perf_counter()
        node, reply = next(answers, (-1, None))
        received.waited += time.perf_counter() - begun
        if reply is None:
            break
        client = of_node[node]
        if lacks_base(reply) and client.id not in session.lacking:
            session.lacking.add(client.id)
            again.append(message(client))
            continue
        here[client.id] = one(setting, session, run, reply, client, round, received)
        del reply  # as large as the upload: neither is to be kept longer than it must
        while waiting and waiting[0] in here:
            if upload := here.pop(waiting.popleft()):
                yield upload
            del upload
    for i in waiting:
        if i not in here:
            refusal = Refusal(FailureKind.LATE, f"no reply within {deadline:g} s")
            received.refuse(i, round, refusal)
        elif upload := here[i]:
            yield upload


def lacks_base(reply: Message) -> bool:
    """Does a client ask for what moved its base so far?"""
    return reply.has_error() and kind_of(reply.error.code) == FailureKind.LACKS_BASE


def one(
    setting: Setting,
    session: Session,
    run: Saved,
    reply: Message,
    client: Client,
    round: Round,
    received: Received,
) -> Upload | None:
    """A reply as an upload that counts, or None with the reason on record."""
    if (found := read(setting, session, run, reply, client, round, run.state, received)) is None:
        return None
    upload, facts = found
    facts["bytes_down"] = received.down.get(client.id, 0)
    facts["elapsed_seconds"] = time.perf_counter() - received.asked.get(client.id, 0.0)
    return accept(setting, session, upload, facts, round, received)


def read(
    setting: Setting,
    session: Session,
    run: Saved,
    reply: Message,
    client: Client,
    round: Round,
    state: Any,
    received: Received,
) -> Read | None:
    """A reply to what `state` sent in `round`, decoded and checked, with what it says of itself."""
    try:
        schema = session.schemas.of(state, client, base_number(setting, run.state), round)
        limits = Limits.of(setting.config)
        strategy, came = setting.strategy, None
        if strategy.needs().client_choice:
            came = strategy.download(state, client, round)
        upload, facts = read_reply(reply, client, round, run.token, schema, received, limits, came)
        check_norm(setting.strategy, state, upload, round, setting.config.round.max_norm)
        facts["certificate"] = certification.read(
            setting, session, run, reply.content, upload, round
        )
    except FedLoraError as e:
        received.refuse(client.id, round, Refusal.of(e))
        return None
    return upload, facts


def accept(
    setting: Setting,
    session: Session,
    upload: Upload,
    facts: dict[str, Any],
    round: Round,
    received: Received,
) -> Upload | None:
    """Put an update on record; None where a device model says that it came too late."""
    client = upload.client
    if reason := _late(setting, client, round, facts, received):
        received.refuse(client.id, round, Refusal(FailureKind.LATE, reason))
        return None
    received.accepted.append(client.id)
    received.clients[client.id] = facts
    received.certificates[client.id] = (round.number, *facts.pop("certificate"))
    if setting.config.output.keep_updates:
        setting.journal.update(round.number, upload)
    session.observer.client_done(client.id, facts)
    return upload


def _late(
    setting: Setting, client: Client, round: Round, facts: dict[str, Any], received: Received
) -> str | None:
    """Note a reply's virtual seconds; the reason to refuse it, where they are too many."""
    if (found := setting.planner.spent(client, round.number, facts)) is None:
        return None
    received.virtual[client.id] = found
    limit, took = setting.config.devices.deadline, found[0].total
    if not limit or took <= limit:
        return None
    return f"{took:.3g} virtual seconds, devices.deadline = {limit:g}"
