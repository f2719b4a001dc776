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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedlora.errors import StrategyError
from fedlora.federation.server.exchange import POLL, SLOWEST_POLL, Gathered, ready
from fedlora.federation.server.synchronous import accept, read
from fedlora.federation.wire.codes import FailureKind, Refusal
from fedlora.federation.wire.messages import count_bytes
from fedlora.lora.lowrank import wide
from fedlora.strategies.base import Client, Round, Strategy, Upload
from fedlora.strategies.probing import factors, follows_the_mean, same, untrained, vector

if TYPE_CHECKING:
    from fedlora.federation.server.strategy import FederatedLora


@dataclass(slots=True, eq=False)
class Flight:
    """One client's work that has not counted yet."""

    client: Client
    round: Round
    """Of the state it was sent."""
    state: Any
    clock: float
    """Virtual seconds, when it was sent."""
    asked: float = 0.0
    """Real ones; 0: it has not been sent by this process."""
    bytes_down: int = 0
    done: tuple[Upload, dict[str, Any]] | None = None
    lands: float = 0.0
    """Virtual seconds, when its reply comes."""


@dataclass(slots=True)
class Buffer:
    """Who is training, whatever round that was asked for in."""

    flights: dict[int, Flight] = field(default_factory=dict)
    pending: dict[str, int] = field(default_factory=dict)
    """Message id to client, of the replies that are to come."""
    checked: bool = False

    def saved(self) -> dict[str, Any]:
        """For the checkpoint: (round, clock) by client, and each of those rounds' states once."""
        at = {i: [f.round.number, f.clock] for i, f in self.flights.items()}
        states = {f.round.number: f.state for f in self.flights.values()}
        return {"flights": at, "states": states}

    def restore(self, server: "FederatedLora", saved: Mapping[str, Any]) -> None:
        states, seed = saved["states"], server.config.run.seed
        self.flights = {
            i: Flight(server.client(i), Round(int(n), seed), states[n], clock)
            for i, (n, clock) in saved["flights"].items()
        }


def uploads(
    server: "FederatedLora",
    grid: Grid,
    clients: Sequence[Client],
    round: Round,
    gathered: Gathered,
) -> Iterator[Upload]:
    """The first round.buffer updates that count, each brought up to date.

    Raises:
        StrategyError: the strategy's algebra does not allow it; before anything is sent.
    """
    buffer, config = server.buffer, server.config.round
    for client in clients:
        buffer.flights[client.id] = Flight(client, round, server.state, server.clock)
    if not buffer.checked:
        check(server.strategy, server.state, [f.client for f in buffer.flights.values()], round)
        buffer.checked = True
    _send(server, grid, gathered)
    landings = _by_clock if server.planner.devices else _as_they_come
    left = config.buffer
    for flight in landings(server, grid, gathered):
        del buffer.flights[flight.client.id]
        assert flight.done is not None
        upload, facts = flight.done
        stale = round.number - flight.round.number
        if config.max_staleness and stale > config.max_staleness:
            reason = f"it is {stale} rounds old, round.max-staleness = {config.max_staleness}"
            refusal = Refusal(FailureKind.LATE, reason)
            server.refuse(flight.client.id, flight.round, refusal, gathered)
            continue
        if accept(server, upload, facts, flight.round, gathered) is None:
            continue
        gathered.stale[flight.client.id] = stale
        gathered.landed = flight.lands
        yield fresh(server, flight, upload, round, (1 + stale) ** -config.staleness_exponent)
        left -= 1
        if not left:
            return


def fresh(
    server: "FederatedLora", flight: Flight, upload: Upload, round: Round, weight: float
) -> Upload:
    """x_t + weight (x_i - x_then), tensor by tensor of what the client sent.

    The update itself where nothing has happened since it was asked for.
    """
    if flight.state is server.state and weight == 1.0:
        return upload
    client, strategy = flight.client, server.strategy
    now = vector(untrained(strategy, server.state, client, round).sent)
    then = vector(untrained(strategy, flight.state, client, flight.round).sent)
    moved = {
        key: (wide(now[key]) + weight * (wide(x) - wide(then[key]))).to(x.dtype)
        for key, x in vector(upload.sent).items()
    }
    return replace(upload, sent=factors(moved, upload.sent))


def check(strategy: Strategy[Any], state: Any, clients: Sequence[Client], round: Round) -> None:
    """Once a start, before anything is sent.

    Raises:
        StrategyError: a late update of this strategy cannot be brought up to date.
    """
    kinds = {tuple((m, x.rank) for m, x in c.layers.items()): c for c in clients}.values()
    later = replace(round, number=round.number + 1)
    still = not strategy.requires.moving_base and not strategy.requires.own_gauge
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


def _send(server: "FederatedLora", grid: Grid, gathered: Gathered) -> None:
    """Ask whoever this process has not asked: the new ones, and those of before a restart."""
    for i, flight in sorted(server.buffer.flights.items()):
        if flight.asked or i not in server.nodes:
            continue
        message = server.message(flight.client, flight.round, "train", state=flight.state)
        flight.bytes_down = gathered.down[i] = count_bytes(message.content)
        flight.asked = time.perf_counter()
        for mid in grid.push_messages([message]):
            server.buffer.pending[mid] = i


def _as_they_come(server: "FederatedLora", grid: Grid, gathered: Gathered) -> Iterator[Flight]:
    """Flights whose replies are here and right, waiting for them until their deadlines."""
    buffer, pause = server.buffer, POLL
    while buffer.pending:
        begun = time.perf_counter()
        found = next(ready(grid, buffer.pending), None)
        if found is None:
            _overdue(server, gathered)
            time.sleep(pause)
            pause = min(1.2 * pause, SLOWEST_POLL)
        gathered.waited += time.perf_counter() - begun
        if found is not None:
            pause = POLL
            i, reply = found
            if (flight := buffer.flights.get(i)) and _done(server, flight, reply, gathered):
                yield flight


def _by_clock(server: "FederatedLora", grid: Grid, gathered: Gathered) -> Iterator[Flight]:
    """All that is in flight in the order of the virtual clock, which no real one changes."""
    for flight in _as_they_come(server, grid, gathered):
        assert flight.done is not None
        spent = server.planner.spent(flight.client, flight.round.number, flight.done[1])
        assert spent is not None
        flight.lands = flight.clock + spent[0].total
    here = [f for f in server.buffer.flights.values() if f.done]
    yield from sorted(here, key=lambda f: (f.lands, f.client.id))


def _done(server: "FederatedLora", flight: Flight, reply: Message, gathered: Gathered) -> bool:
    """Keep a reply with its flight; one that is wrong ends it, with the reason on record."""
    flight.done = read(server, reply, flight.client, flight.round, flight.state, gathered)
    if flight.done is None:
        del server.buffer.flights[flight.client.id]
        return False
    facts = flight.done[1]
    facts["bytes_down"] = flight.bytes_down
    facts["elapsed_seconds"] = time.perf_counter() - flight.asked
    return True


def _overdue(server: "FederatedLora", gathered: Gathered) -> None:
    """Give up who has had round.deadline seconds."""
    limit, buffer = server.config.round.deadline, server.buffer
    for mid, i in list(buffer.pending.items()):
        flight = buffer.flights[i]
        if time.perf_counter() - flight.asked > limit:
            del buffer.pending[mid], buffer.flights[i]
            refusal = Refusal(FailureKind.LATE, f"no reply within {limit:g} s")
            server.refuse(i, flight.round, refusal, gathered)
