"""Does a node's worker still answer? Asked from outside, since what hangs cannot tell.

A worker that is stopped, or in native code that never lets go of Python, answers nobody: neither
its own watchdog's thread runs, nor a message's deadline ends it. Its health service needs a
moment of Python only, so one that trains answers all the while.
"""

import threading
import time
from pathlib import Path

SILENT = 40.0
"""Seconds without an answer after which a worker is given up. Less than the 60 s in which a
supervisor promises another."""
STARTS = 300.0
"""Seconds that the first answer may take, on a slow machine too: the libraries are imported."""
EVERY = 4.0
"""Seconds between two questions, and that an answer may take."""


class Pulse:
    """Listens to one worker process, in a thread of its own, for as long as it is wanted."""

    def __init__(self, pid: int, socket: str = "worker.sock") -> None:
        """pid: of the worker. socket: relative to its working directory."""
        self.path = Path(f"/proc/{pid}/cwd", socket)  # a socket's own path may be too long
        self.heard: float | None = None
        self.begun = time.monotonic()
        self._over = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def lost(self) -> bool:
        """Did it not answer for SILENT seconds, or never in STARTS?"""
        if self.heard is None:
            return time.monotonic() - self.begun > STARTS
        return time.monotonic() - self.heard > SILENT

    def end(self) -> None:
        """Ask no more."""
        self._over.set()

    def _listen(self) -> None:
        while not self._over.wait(EVERY):
            if self._answers():
                self.heard = time.monotonic()

    def _answers(self) -> bool:
        import grpc
        from grpc_health.v1 import health_pb2, health_pb2_grpc

        options = [("grpc.enable_http_proxy", 0)]
        with grpc.insecure_channel(f"unix:{self.path}", options) as channel:
            try:
                ask = health_pb2_grpc.HealthStub(channel).Check
                ask(health_pb2.HealthCheckRequest(), timeout=EVERY)
            except grpc.RpcError:
                return False
        return True
