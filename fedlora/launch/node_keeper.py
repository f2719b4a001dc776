"""`fedlora node keeper`: the one process that writes a node's ledger and record.

    fedlora node keeper /etc/fedlora/node.toml --user fedlora-node

It runs under a user of its own, which owns the ledger's directory and audit.jsonl; the node's
processes, under another, can neither write these nor the policy, where that is a third user's. It
answers on the socket of privacy.keeper, to the users that it was told of alone (SO_PEERCRED), and
knows four requests:

    reserve    a charge; its delta and the limit of all runs are the policy's, whatever is asked
    read       what was spent
    append     a line of the record
    secure     may the node take part in a secure round, and count one

What it is told of a charge (q, sigma, steps, whose rows) is the node's word: a process of the node
that lies can spend too little. It cannot take back what was charged.
"""

import math
import os
import pwd
import signal
import socket
import socketserver
import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import typer

MOST = 2**63 - 1
LONGEST_WORD = 1000
"""Of a charge: what a line says must be read again, for good."""
PEER = "3i"
"""pid, uid, gid: what SO_PEERCRED gives."""


def keep(policy: Path, user: Sequence[str]) -> None:
    """Keep the ledger and the record of a policy for these users, until it is ended.

    Raises:
        DeployError: the policy names no socket, or there is no such user.
    """
    from fedlora.config.policy import Policy
    from fedlora.errors import DeployError

    if not (place := Policy.load(policy).privacy.keeper):
        raise DeployError(f"{policy}: privacy.keeper names no socket; set it, and start this again")
    allowed = {number_of(x) for x in user}
    with Keeper(Path(place), policy, allowed) as serving:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        typer.echo(f"{place}: keeps the ledger and the record of {policy} for {', '.join(user)}")
        if os.getuid() in allowed:
            typer.echo("The users are one: a process of the node can write both by itself.")
        serving.serve_forever()


def number_of(user: str) -> int:
    """Of a user by name or number.

    Raises:
        DeployError: there is none.
    """
    from fedlora.errors import DeployError

    try:
        return int(user) if user.isdigit() else pwd.getpwnam(user).pw_uid
    except KeyError:
        raise DeployError(f"--user {user}: this machine has no such user") from None


class Keeper(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """Serves one socket, which it makes anew."""

    daemon_threads = True
    request_queue_size = 1024
    """Of connections that were not looked at yet: any user may make some."""

    def __init__(self, place: Path, policy: Path, allowed: set[int]) -> None:
        self.place, self.policy, self.allowed = place, policy, allowed
        place.unlink(missing_ok=True)
        super().__init__(str(place), _Request)
        place.chmod(0o666)  # who may ask is looked at in each connection


class _Request(socketserver.BaseRequestHandler):
    server: Keeper

    def handle(self) -> None:
        from fedlora.privacy.keeper_socket import SECONDS, put

        there: socket.socket = self.request
        there.settimeout(SECONDS)
        with suppress(OSError):  # whoever asked is gone, and what was written stays
            put(there, self._answer(there))

    def _answer(self, there: socket.socket) -> dict[str, Any]:
        from fedlora.errors import FedLoraError, PolicyError
        from fedlora.privacy.keeper_socket import taken

        if peer(there) not in self.server.allowed:
            return {"refused": "this user may ask nothing of the keeper", "public": True}
        try:
            return answered(self.server.policy, there, taken(there))
        except FedLoraError as e:
            said = {"kind": type(e).__name__, "public": e.may_leave}
            reasons = [*e.reasons] if isinstance(e, PolicyError) else []
            return {"refused": str(e), "reasons": reasons, **said}
        except (KeyError, TypeError, ValueError, ArithmeticError, RecursionError) as e:
            return {"refused": f"no request that the keeper knows: {e!r:.200}", "public": False}
        except OSError as e:  # the other end, or the disk
            why = f"the keeper could not do it: {type(e).__name__}: {e.strerror or e}"
            typer.echo(why, err=True)
            return {"refused": why, "public": False}


def peer(there: socket.socket) -> int:
    """The user at the other end, by the system's word."""
    size = struct.calcsize(PEER)
    _, uid, _ = struct.unpack(PEER, there.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return int(uid)


def answered(path: Path, there: socket.socket, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to a request, after what it asks for is on disk.

    Raises:
        FedLoraError: it is refused.
        KeyError, TypeError, ValueError: it is none.
    """
    known: dict[str, Callable[..., dict[str, Any]]] = {
        "reserve": _reserved,
        "read": _read,
        "append": _appended,
        "secure": _secure,
    }
    if asked["ask"] not in known:
        raise ValueError(str(asked["ask"])[:40])
    from fedlora.config.policy import Policy

    return known[asked["ask"]](Policy.load(path), there, asked)


def _reserved(policy: Any, there: socket.socket, asked: Mapping[str, Any]) -> dict[str, Any]:
    from fedlora.privacy.charges import Charge
    from fedlora.privacy.keeper import units_of
    from fedlora.privacy.ledger import Acknowledged, Ledger
    from fedlora.privacy.units import ALL

    own: dict[str, Any] = {"delta": policy.privacy.delta, "units": ALL, "reading": ""}
    charge = replace(Charge.read(dict(asked["charge"])), **own)
    spend, budget = charge.spend, float(asked["budget"])
    numbers = 0 <= spend.q <= 1 and 0 <= spend.sigma < math.inf and 0 < spend.steps <= MOST
    whole = all(abs(n) <= MOST for n in (charge.round, charge.client)) and budget >= 0
    words = (charge.unit, charge.adjacency, charge.run, charge.noise)
    plain = all(isinstance(x, str) and len(x) <= LONGEST_WORD for x in words)
    if not (numbers and whole and plain and math.isfinite(charge.clip)):
        raise ValueError("a charge that is none")
    limits = [x for x in (budget, policy.privacy.max_epsilon) if x]
    known = Acknowledged(**asked["acknowledged"]) if "acknowledged" in asked else None
    units = units_of(there, asked)
    ledger = Ledger(policy.ledger, opens=False)
    return {"receipt": asdict(ledger.reserve(charge, min(limits, default=0.0), units, known))}


def _read(policy: Any, _: socket.socket, __: Mapping[str, Any]) -> dict[str, Any]:
    from fedlora.privacy.ledger import Ledger

    ledger, delta = Ledger(policy.ledger, opens=False), policy.privacy.delta
    found = ledger.epsilon(delta)
    return {"epsilon": found, "delta": delta, "charges": len(ledger.read().charges)}


def _appended(policy: Any, _: socket.socket, asked: Mapping[str, Any]) -> dict[str, Any]:
    from fedlora.federation.client import audit

    more = {k: v for k, v in asked["more"].items() if k not in ("time", "what")}
    audit.append(policy.audit, str(asked["what"]), **more)
    return {"written": True}


def _secure(policy: Any, _: socket.socket, asked: Mapping[str, Any]) -> dict[str, Any]:
    from fedlora.federation.client.secure_book import STEPS, SecureBook

    since, step = asked["since"], asked["step"]
    if type(since) is not int or step not in STEPS:
        raise ValueError("not a secure round")
    book, limit = SecureBook(policy.ledger), policy.secure.max_rounds
    return {"rounds": book.enter(since, limit, step)}
