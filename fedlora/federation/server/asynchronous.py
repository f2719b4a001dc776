"""FedBuff: buffered asynchronous aggregation, in which nobody waits for the slowest.

Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022,
https://arxiv.org/abs/2106.06639

    Delta_i = x_i - x_{t - tau_i}            what client i changed of what it got tau_i rounds ago
    x_{t+1} = x_t + sum_i p_i s(tau_i) Delta_i,    s(tau) = (1 + tau)^-a,  a = 1/2 in the paper

A round is one buffer: it ends with the round.buffer-th update that counts. Who is still training
goes on and counts in a later round; who is done is asked again in the next.

The strategy stays unaware. It is given x_t + s Delta_i in place of x_i, and the mean of those is
the line above, so the proof of a round holds as ever. It is right where the model is the mean of
what clients send and means the same in every round: `check` measures that, and refuses the rest.

Differs from the paper: p_i = n_i / sum of n_j over the buffer, where the paper has 1 / K, so that
a buffer as large as the cohort is the plain round, bit for bit. The server's rate is server.lr.

In which order replies count: under a device model in that of its virtual clock, so that a
simulation ends in the same bits on any number of workers and after any number of restarts. Else
as they come, and then no two runs are alike. A resumed run asks again, with what it had sent
then, whoever was training.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedlora.errors import StrategyError
from fedlora.federation.server.exchange import POLL, SLOWEST_POLL, Received, ready
from fedlora.federation.server.flights import Flight
from fedlora.federation.server.journal import Saved
from fedlora.federation.server.run import Session, Setting, message
from fedlora.federation.server.synchronous import accept, read
from fedlora.federation.wire.codes import FailureKind, Refusal
from fedlora.federation.wire.messages import count_bytes
from fedlora.lora.lowrank import wide
from fedlora.strategies.base import Client, Round, Strategy, Upload
from fedlora.strategies.probing import factors, follows_the_mean, same, untrained, vector


def uploads(
    setting: Setting,
    session: Session,
    run: Saved,
    grid: Grid,
    cohort: Sequence[Client],
    round: Round,
    received: Received,
) -> Iterator[Upload]:
    """The first round.buffer updates that count, each brought up to date.

    Raises:
        StrategyError: the strategy's algebra does not allow it; before anything is sent.
    """
    flights, config = session.flights, setting.config.round
    for client in cohort:
        flights.of[client.id] = Flight(client, round, run.state, run.clock)
    if not flights.checked:
        check(setting.strategy, run.state, [f.client for f in flights.of.values()], round)
        flights.checked = True
    _send(setting, session, run, grid, received)
    landings = _by_clock if setting.planner.devices else _as_they_come
    left = config.buffer
    for flight in landings(setting, session, run, grid, received):
        del flights.of[flight.client.id]
        assert flight.done is not None
        upload, facts = flight.done
        stale = round.number - flight.round.number
        if config.max_staleness and stale > config.max_staleness:
            reason = f"it is {stale} rounds old, round.max-staleness = {config.max_staleness}"
            refusal = Refusal(FailureKind.LATE, reason)
            received.refuse(flight.client.id, flight.round, refusal)
            continue
        if accept(setting, session, upload, facts, flight.round, received) is None:
            continue
        received.stale[flight.client.id] = stale
        received.landed = flight.lands
        weight = (1 + stale) ** -config.staleness_exponent
        yield fresh(setting.strategy, run.state, flight, upload, round, weight)
        left -= 1
        if not left:
            return


def fresh(
    strategy: Strategy[Any], state: Any, flight: Flight, upload: Upload, round: Round, weight: float
) -> Upload:
    """x_t + weight (x_i - x_then), tensor by tensor of what the client sent.

    The update itself where nothing has happened since it was asked for.
    """
    if flight.state is state and weight == 1.0:
        return upload
    client = flight.client
    now = vector(untrained(strategy, state, client, round).sent)
    then = vector(untrained(strategy, flight.state, client, flight.round).sent)
    moved = {
        key: (wide(now[key]) + weight * (wide(x) - wide(then[key]))).to(x.dtype)
        for key, x in vector(upload.sent).items()
    }
    return replace(upload, sent=factors(moved, upload.sent))


def check(strategy: Strategy[Any], state: Any, clients: Sequence[Client], round: Round) -> None:
    """Check that late updates can be brought up to date: once a start, before anything is sent.

    Raises:
        StrategyError: a late update of this strategy cannot be brought up to date.
    """
    kinds = {tuple((m, x.rank) for m, x in c.layers.items()): c for c in clients}.values()
    later = replace(round, number=round.number + 1)
    still = not strategy.needs().moving_base and not strategy.needs().own_gauge
    for client in kinds:
        alike = still and same(
            untrained(strategy, state, client, round).sent,
            untrained(strategy, state, client, later).sent,
        )
        if not (alike and follows_the_mean(strategy, state, client, round)):
            raise StrategyError(
                f"round.buffer: {type(strategy).__name__} cannot take a late update: its model is "
                "not the mean of what clients send, or what they send means another thing in "
                "another round (a base that moved, other coordinates, a sketch, a turn); use "
                "fedavg, ffa, fedsa, fedsb or ravan, or round.buffer = 0"
            )


def _send(setting: Setting, session: Session, run: Saved, grid: Grid, received: Received) -> None:
    """Ask each client that this process has not: new ones, and those from before a restart."""
    for i, flight in sorted(session.flights.of.items()):
        if flight.asked or i not in session.nodes:
            continue
        args = (flight.client, flight.round, "train")
        made = message(setting, session, run, *args, state=flight.state)
        flight.bytes_down = received.down[i] = count_bytes(made.content)
        flight.asked = time.perf_counter()
        for mid in grid.push_messages([made]):
            session.flights.pending[mid] = i


def _as_they_come(
    setting: Setting, session: Session, run: Saved, grid: Grid, received: Received
) -> Iterator[Flight]:
    """Flights whose replies are here and right, waiting for them until their deadlines."""
    flights, pause = session.flights, POLL
    while flights.pending:
        begun = time.perf_counter()
        found = next(ready(grid, flights.pending), None)
        if found is None:
            _overdue(setting, session, received)
            time.sleep(pause)
            pause = min(1.2 * pause, SLOWEST_POLL)
        received.waited += time.perf_counter() - begun
        if found is not None:
            pause = POLL
            i, reply = found
            flight = flights.of.get(i)
            if flight and _done(setting, session, run, flight, reply, received):
                yield flight


def _by_clock(
    setting: Setting, session: Session, run: Saved, grid: Grid, received: Received
) -> Iterator[Flight]:
    """All that is in flight in the order of the virtual clock, which no real one changes."""
    for flight in _as_they_come(setting, session, run, grid, received):
        assert flight.done is not None
        spent = setting.planner.spent(flight.client, flight.round.number, flight.done[1])
        assert spent is not None
        flight.lands = flight.clock + spent[0].total
    here = [f for f in session.flights.of.values() if f.done]
    yield from sorted(here, key=lambda f: (f.lands, f.client.id))


def _done(
    setting: Setting,
    session: Session,
    run: Saved,
    flight: Flight,
    reply: Message,
    received: Received,
) -> bool:
    """Keep a reply with its flight; one that is wrong ends it, with the reason on record."""
    args = (reply, flight.client, flight.round, flight.state, received)
    flight.done = read(setting, session, run, *args)
    if flight.done is None:
        del session.flights.of[flight.client.id]
        return False
    facts = flight.done[1]
    facts["bytes_down"] = flight.bytes_down
    facts["elapsed_seconds"] = time.perf_counter() - flight.asked
    return True


def _overdue(setting: Setting, session: Session, received: Received) -> None:
    """Give up who has had round.deadline seconds."""
    limit, flights = setting.config.round.deadline, session.flights
    for mid, i in list(flights.pending.items()):
        flight = flights.of[i]
        if time.perf_counter() - flight.asked > limit:
            del flights.pending[mid], flights.of[i]
            refusal = Refusal(FailureKind.LATE, f"no reply within {limit:g} s")
            received.refuse(i, flight.round, refusal)
