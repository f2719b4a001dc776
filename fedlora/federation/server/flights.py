"""Which clients are still training, and since which round: what a buffered run remembers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedlora.strategies.base import Client, Round, Upload


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
class Flights:
    """The updates that are awaited, by client."""

    of: dict[int, Flight] = field(default_factory=dict)
    pending: dict[str, int] = field(default_factory=dict)
    """Message id to client, of the replies that are to come."""
    checked: bool = False
    """Was the strategy found to take late updates?"""

    def saved(self) -> Mapping[str, Any]:
        """For the checkpoint: (round, clock) by client, and each of those rounds' states once."""
        at = {i: [f.round.number, f.clock] for i, f in self.of.items()}
        states = {f.round.number: f.state for f in self.of.values()}
        return {"flights": at, "states": states}

    def restore(self, saved: Mapping[str, Any], clients: Mapping[int, Client], seed: int) -> None:
        """The inverse. A client that was training is asked again, with what it had been sent."""
        states = saved["states"]
        self.of = {
            i: Flight(clients[i], Round(int(n), seed), states[n], clock)
            for i, (n, clock) in saved["flights"].items()
        }
