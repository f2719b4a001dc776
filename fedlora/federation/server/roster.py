"""The connected nodes, which may leave, return or come late, and which client each of them is."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedlora.errors import UpdateError
from fedlora.federation.server.exchange import POLL, SLOWEST_POLL, error_of, exchange
from fedlora.federation.wire.codes import Refusal
from fedlora.federation.wire.messages import configs_of
from fedlora.federation.wire.same_machine import SIMULATED
from fedlora.federation.wire.versions import differences


def is_simulated(grid: Grid) -> bool:
    """Do all the grid's clients run on this machine, as the grid or its environment says?"""
    return bool(getattr(grid, "simulated", False) or os.environ.get(SIMULATED))


Facts = Mapping[str, Any]
MOST_CLIENTS = 2**31
MOST_RANK = 65_536
TRIES = 3
"""How often a node that answers the question wrongly is asked."""


class Roster:
    def __init__(self, note: Callable[[str], None]) -> None:
        """`note` is told why a node was not taken in, and where its versions are others."""
        self.note = note
        self.there: set[int] = set()
        self.client_of: dict[int, int] = {}
        self._node_of: dict[int, int] = {}
        self._tries: dict[int, int] = {}
        self._given_up: set[int] = set()
        self.turned_away = ""
        """Why the last node that was not taken in was not."""

    @property
    def nodes(self) -> dict[int, int]:
        """Client to node, of the nodes that are connected."""
        return {c: n for n, c in self.client_of.items() if n in self.there}

    def look(self, grid: Grid, seconds: float) -> Iterator[tuple[int, Facts]]:
        """See who is connected, and ask those not met yet who they are: (client, facts) of each."""
        self.there = set(grid.get_node_ids())
        strangers = [
            n
            for n in sorted(self.there)
            if n not in self.client_of and self._tries.get(n, 0) < TRIES
        ]
        for node in strangers:
            self._tries[node] = self._tries.get(node, 0) + 1
        messages = [Message(RecordDict(), n, "query", ttl=seconds) for n in strangers]
        for node, reply in exchange(grid, messages, seconds):
            try:
                facts = read_facts(reply)
                odd = check_versions(facts)
                self._admit(node, int(facts["client"]))
            except UpdateError as e:
                self.turned_away = f"node {node} was not taken in: {Refusal.of(e).reason}"
                self.note(self.turned_away)
            else:
                if odd:
                    self.note(f"node {node}: {odd}")
                yield int(facts["client"]), facts

    def wait(self, seconds: float) -> Iterator[None]:
        """Wait for nodes that left to come back: each turn, look which are connected.

        Each is waited for once. So a network cut or a server's restart does not change a round's
        cohort, and a node that is gone for good delays the run once.
        """
        until = time.monotonic() + seconds
        pause = POLL
        while (missing := self._missing()) and time.monotonic() < until:
            time.sleep(pause)
            pause = min(2 * pause, SLOWEST_POLL)
            yield
        self._given_up = (self._given_up | missing) - self.there

    def _missing(self) -> set[int]:
        return set(self.client_of) - self.there - self._given_up

    def _admit(self, node: int, client: int) -> None:
        holder = self._node_of.get(client, node)
        if holder != node:
            if holder in self.there:
                raise UpdateError(f"it says that it is client {client}, which node {holder} is")
            del self.client_of[holder]  # it came back under another node id
        self.client_of[node] = client
        self._node_of[client] = node


def check_versions(facts: Facts) -> str:
    """What of a node's versions is other than the server's, where the two go together.

    Raises:
        UpdateError: they do not; with both versions.
    """
    refused, said = differences(facts)
    if refused:
        raise UpdateError("; ".join(refused))
    return "; ".join(said)


def read_facts(reply: Message) -> Facts:
    """What a node says of itself.

    Raises:
        UpdateError: it is an error, or no client number and rank.
    """
    if error := error_of(reply):
        raise error
    try:
        facts: Facts = configs_of(reply.content, "facts")
        client, rank, layers = facts["client"], facts["rank"], facts.get("layers", 0)
    except KeyError as e:
        raise UpdateError(f"its facts lack {e}") from None
    for name, value, most in (
        ("client", client, MOST_CLIENTS),
        ("rank", rank, MOST_RANK),
        ("layers", layers, MOST_RANK),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < most:
            raise UpdateError(f"its {name} is {value!r}: must be a whole number below {most}")
    cores = facts.get("cores", 1)
    if not isinstance(cores, int | float) or not 0 < cores < MOST_RANK:
        raise UpdateError(
            f"its cores are {cores!r}: must be a number above 0 and below {MOST_RANK}"
        )
    return facts
