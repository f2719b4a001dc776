"""One request to a node's keeper, and its answer, over a local Unix socket.

Four bytes of length and JSON each way; one request a connection. No torch here: a node's record is
written by processes that have none.
"""

import json
import socket
import struct
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedlora.errors import BudgetSpent, PolicyError, PrivacyError

LONGEST = 2**20
"""Bytes of a request or an answer, without what follows it."""
SECONDS = 120.0
"""For an answer: another process may hold the ledger's lock."""
QUEUE = 30.0
"""Seconds to wait for a place in the keeper's queue."""


def ask(path: Path, what: str, more: Mapping[str, Any], data: bytes = b"") -> dict[str, Any]:
    """The keeper's answer.

    Raises:
        BudgetSpent, PolicyError, PrivacyError: it refuses, or there is none.
    """
    try:
        with socket.socket(socket.AF_UNIX) as there:
            there.settimeout(SECONDS)
            _connect(there, path)
            with suppress(BrokenPipeError, ConnectionResetError):  # refused before it was read
                put(there, {"ask": what, **more})
                there.sendall(data)
            answer = taken(there)
    except (OSError, ValueError) as e:
        raise PrivacyError.public(
            "the keeper of this node's ledger and record does not answer, so nothing can be "
            f"charged or put on record, and nothing is done ({type(e).__name__}); its operator "
            "starts it: fedlora node keeper node.toml"
        ) from e
    if "refused" in answer:
        said = str(answer["refused"])
        if answer.get("kind") == "PolicyError":
            raise PolicyError(said, [str(x) for x in answer.get("reasons", [])])
        kind = BudgetSpent if answer.get("kind") == "BudgetSpent" else PrivacyError
        raise kind.public(said) if answer.get("public") is True else kind(said)
    return answer


def _connect(there: socket.socket, path: Path) -> None:
    """Wait a little where others fill the queue before it, as any user of the machine may."""
    until = time.monotonic() + QUEUE
    while True:
        try:
            return there.connect(str(path))
        except BlockingIOError:
            if time.monotonic() > until:
                raise
            time.sleep(0.02)


def put(there: socket.socket, message: Mapping[str, Any]) -> None:
    data = json.dumps(message).encode()
    there.sendall(struct.pack(">I", len(data)) + data)


def taken(there: socket.socket) -> dict[str, Any]:
    """One message.

    Raises:
        ValueError: it is none, or too long.
        OSError: the other end is gone.
    """
    (size,) = struct.unpack(">I", exactly(there, 4))
    if size > LONGEST:
        raise ValueError("a message that is too long")
    found = json.loads(exactly(there, size))
    if not isinstance(found, dict):
        raise ValueError("a message that is none")
    return found


def exactly(there: socket.socket, size: int) -> bytes:
    """So many bytes."""
    parts, left = [], size
    while left:
        part = there.recv(min(left, 2**20))
        if not part:
            raise ConnectionError("the other end is gone")
        parts.append(part)
        left -= len(part)
    return b"".join(parts)
