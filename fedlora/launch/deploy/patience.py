"""How much of the gate one address may hold, and for how long: strangers have no key to show.

    head     seconds until a connection's next request is there as a whole head
    whole    seconds until a request is answered, its body included
    each     connections of one address at a time

A connection that goes beyond any of them is dropped without a word. Else somebody who sends a byte
now and then holds connections, and what stands behind them, for as long as they like.
"""

import asyncio
from collections import Counter
from contextlib import suppress
from typing import Any, ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADERS = 32 << 10
"""Bytes of a request's head; httptools, which uvicorn would take, knows no such limit."""
FILES = 65_536
"""Connections of all addresses, where the system allows as many."""


class Patience(H11Protocol):
    """One connection of the gate."""

    head: ClassVar[float] = 30.0
    whole: ClassVar[float] = 300.0
    each: ClassVar[int] = 256
    here: ClassVar[Counter[str]] = Counter()
    """Connections by address."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.address = (self.client or ("?",))[0]
        self.here[self.address] += 1
        self.begun: Any = None
        self.since = self.loop.time()
        self.look = self.loop.call_later(self.head, self._look)
        if self.here[self.address] > self.each:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.look.cancel()
        self.here[self.address] -= 1
        if not self.here[self.address]:
            del self.here[self.address]
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not self.begun:
            self._again()

    def on_response_complete(self) -> None:
        self._again()
        super().on_response_complete()

    def _again(self) -> None:
        """Something came to an end: what comes next has all its time."""
        self.begun, self.since = self.cycle, self.loop.time()
        self.look.cancel()
        self.look = self.loop.call_later(self._left(), self._look)

    def _left(self) -> float:
        waiting = self.cycle is None or self.cycle.response_complete
        return self.since + (self.head if waiting else self.whole) - self.loop.time()

    def _look(self) -> None:
        if (left := self._left()) <= 0:
            self.transport.abort()
        else:
            self.look = self.loop.call_later(left, self._look)


def open_many() -> None:
    """Have this process open as many files as it may, up to FILES: each connection is one."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
