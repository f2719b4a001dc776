"""The server's disk, on which its SuperLink keeps messages on their way: said while there is time.

What all nodes are sent counts once there, and what comes back once a node. Flower uses the space
again, and keeps the file as large as it was until the run has ended and `host.shrink` gives it
back: about the bytes of one round, and as much again while it writes.
"""

import shutil
from collections.abc import Iterator
from contextlib import suppress

from fedlora.launch.deploy.plan import Plan
from fedlora.launch.deploy.scripts import DATABASE

FREE = 5e9
"""Bytes that are free on that disk, below which it is said."""
LARGE = 20e9
"""Bytes of the database, above which it is said."""


class Disk:
    """What there is to say of a disk: each thing once, and again where it comes back."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._said = plan, set[str]()

    def news(self) -> Iterator[str]:
        """What was not so when this was last asked."""
        now = dict(self._now())
        new = [text for what, text in now.items() if what not in self._said]
        self._said = {*now}
        yield from new

    def _now(self) -> Iterator[tuple[str, str]]:
        server = self._plan.server
        size = 0
        for name in (DATABASE, f"{DATABASE}-wal"):
            with suppress(FileNotFoundError):
                size += (server / name).stat().st_size
        free = shutil.disk_usage(server).free
        held = f"the SuperLink's database {server / DATABASE} holds {size / 1e9:.1f} GB"
        holds = "the messages on their way, about a round's"
        if free < FREE:
            room = f"{free / 1e9:.1f} GB are free on the disk of {server}"
            yield "free", f"warning: {room}; {held}, {holds}: make room, or the run stops"
        if size > LARGE:
            after = "`fedlora deploy run` gives the space back when the run has ended"
            yield "large", f"warning: {held}, {holds}: {after}"
