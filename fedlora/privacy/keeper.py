"""A ledger that another process keeps: what is asked of it, over a local Unix socket.

    node's process                          keeper's process, under a user of its own
    {"ask": "reserve", "charge": ...}  ->   writes the charge
                       <- {"receipt": ...}  on disk
    first step of training

After a request of `reserve` come the units' digests, 16 bytes each. There is no request that
changes what is written. The keeper's half is fedlora/launch/node_keeper.py.
"""

import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from fedlora.privacy.charges import Charge
from fedlora.privacy.keeper_socket import ask, exactly
from fedlora.privacy.ledger import Acknowledged, Receipt
from fedlora.privacy.units import Units
from fedlora.training.data.row_units import SIZE

MOST_UNITS = 2**24


class Payer(Protocol):
    """Where a round is paid for: a ledger of this process's own, or a keeper's."""

    def reserve(
        self,
        charge: Charge,
        budget: float = 0.0,
        units: Units | None = None,
        acknowledged: Acknowledged | None = None,
    ) -> Receipt: ...


@dataclass(frozen=True, slots=True)
class KeptLedger:
    """The ledger behind a keeper's socket."""

    socket: Path

    def reserve(
        self,
        charge: Charge,
        budget: float = 0.0,
        units: Units | None = None,
        acknowledged: Acknowledged | None = None,
    ) -> Receipt:
        """As `Ledger.reserve`; the delta, and the limit of all runs, are the keeper's policy's.

        Raises:
            BudgetSpent, PrivacyError: as there; or the keeper gives no receipt.
        """
        asked: dict[str, Any] = {"charge": charge.record(), "budget": budget}
        if acknowledged:
            asked["acknowledged"] = asdict(acknowledged)
        digests = b""
        if units:
            digests = b"".join(sorted(units.digests))
            asked |= {"reading": units.reading, "most": units.most, "units": len(units.digests)}
        return Receipt(**ask(self.socket, "reserve", asked, digests)["receipt"])


def units_of(there: socket.socket, asked: Mapping[str, Any]) -> Units | None:
    """The units of a request; None where it names none.

    Raises:
        ValueError: there are too many, or what is said of them is none.
    """
    if "units" not in asked:
        return None
    n, most, reading = asked["units"], asked["most"], asked["reading"]
    if not (type(n) is type(most) is int and 0 <= n <= MOST_UNITS and most > 0):
        raise ValueError("not a number of units")
    data = exactly(there, n * SIZE)
    digests = frozenset(data[i : i + SIZE] for i in range(0, len(data), SIZE))
    return Units(str(reading), digests, most)
