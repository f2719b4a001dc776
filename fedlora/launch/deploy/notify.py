"""Tells systemd that a process is ready and alive: sd_notify, in the few lines that it takes.

The process says so from the loop that does its work, so one that hangs says nothing, and systemd
ends it after the unit's WatchdogSec. Where there is no NOTIFY_SOCKET nothing is said.
"""

import os
import socket
import time
from contextlib import suppress


class Notify:
    def __init__(self) -> None:
        """Takes the address out of the environment: no process that this one starts is meant."""
        address = os.environ.pop("NOTIFY_SOCKET", "")
        self.address = f"\0{address[1:]}" if address.startswith("@") else address
        self.every = int(os.environ.pop("WATCHDOG_USEC", "0")) / 4e6
        """Seconds between two words: four before systemd loses patience."""
        self._said = -float("inf")

    def alive(self) -> None:
        """Say so, unless it was said just now. The first time it means ready, too."""
        if not self.address or time.monotonic() - self._said < self.every:
            return
        with (
            suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out,
        ):
            out.setblocking(False)
            out.sendto(b"READY=1\nWATCHDOG=1", self.address)
            self._said = time.monotonic()
