"""A node's warm worker: it holds the model and the data, and answers the messages it is handed.

    python -m fedlora.launch.deploy.worker --socket worker.sock
        --idle-release 600     after so many seconds without a message it lets go of the base, and
                               its card's memory is others' to use; the next message loads it again
        --metrics-port 9110    /metrics on the node's loopback: see worker_figures.py

gRPC with its health service on a Unix socket that only its owner can open. One message at a
time. When the process that asked is gone (its deadline passed, or it was killed), nobody can use
the answer, but the training cannot be interrupted. It gets the time that it has taken so far once
more, so that a node that is merely slow stays warm for its next message. If that is not enough,
this process exits, and its supervisor starts another.
"""

import argparse
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import grpc
from flwr.app import Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fedlora.federation.client.dispatch import METHOD, OPTIONS, as_bytes, unpack
from fedlora.federation.client.frames import assembled, frames
from fedlora.federation.server.allocator import give_freed_memory_back
from fedlora.launch.deploy.notify import Notify
from fedlora.launch.deploy.worker_figures import WorkerFigures, served

ABANDONED = 75
"""Exit status after abandoned work was given its time once more and was still not done."""
LOOK = 1.0
"""Seconds between two words to systemd, where it listens."""
MERCY = 5.0
"""The fewest seconds that abandoned work is given."""


class Worker:
    """Answers one message at a time."""

    def __init__(self, idle_release: float = 0.0) -> None:
        """idle_release: seconds after the last message until the base is let go of; 0: never."""
        self.busy = threading.Lock()
        self.run = -1
        self.figures = WorkerFigures()
        self.idle_release = idle_release
        self.ended = time.monotonic()
        """When the last message was answered."""
        self._timer = threading.Timer(0.0, self.release_if_idle)

    def answer(self, stream: Iterator[bytes], call: Any) -> Iterator[bytes]:
        """The frames of the reply to the message whose frames these are."""
        if answered := self._answered(stream, call):
            yield from frames(answered, as_bytes)

    def _answered(self, stream: Iterator[bytes], call: Any) -> Message | None:
        done = threading.Event()

        def over() -> None:
            threading.Thread(target=wait, daemon=True).start()

        def wait() -> None:
            if not done.wait(max(MERCY, time.monotonic() - begun)):
                os._exit(ABANDONED)

        with self.busy:
            begun = time.monotonic()
            if not call.add_callback(over):
                return None  # nobody waits for it any more
            try:
                with self.figures.working():
                    return self._reply(stream)
            finally:
                done.set()
                self._rest()

    def _rest(self) -> None:
        """From now on nothing is to do; if that lasts, the base is let go of."""
        self.ended = time.monotonic()
        give_freed_memory_back()
        if self.idle_release:
            self._timer.cancel()
            self._timer = threading.Timer(self.idle_release, self.release_if_idle)
            self._timer.daemon = True
            self._timer.start()

    def release_if_idle(self) -> None:
        """Let go of the base, unless a message came in the meantime."""
        with self.busy:
            if time.monotonic() - self.ended >= self.idle_release:
                from fedlora.training import cache

                cache.forget_model()

    def _reply(self, stream: Iterator[bytes]) -> Message:
        from flwr.supercore.task_identity import TaskIdentity

        from fedlora.launch.client_reply import reply
        from fedlora.training import cache

        kind, message, context = assembled(stream, unpack, lambda whole: whole[1])
        TaskIdentity.task_id = 0  # what Message() reads its run and node from
        TaskIdentity.run_id, TaskIdentity.node_id = context.run_id, context.node_id
        if context.run_id != self.run:  # its operator may have changed the data in between
            cache.forget_data()
            self.run = context.run_id
        answered = reply(kind, message, context)
        self.figures.loaded = cache.loaded
        if (model := cache.loaded()) is not None:
            self.figures.device = model.device
        self.figures.answered(kind, answered.has_error())
        return answered


def serve(socket: Path, worker: Worker | None = None) -> grpc.Server:
    """Listen, and say so once the slow imports are done."""
    socket.unlink(missing_ok=True)
    worker, state = worker or Worker(), health.HealthServicer()
    server = grpc.server(ThreadPoolExecutor(4), options=OPTIONS)
    handler = grpc.stream_stream_rpc_method_handler(worker.answer)
    service, _, method = METHOD.strip("/").partition("/")
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, {method: handler}),)
    )
    health_pb2_grpc.add_HealthServicer_to_server(state, server)
    state.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    before = os.umask(0o177)
    try:
        if not server.add_insecure_port(f"unix:{socket}"):
            raise OSError(f"{socket} cannot be listened on")
    finally:
        os.umask(before)
    server.start()

    from fedlora.training.quiet import quiet_libraries

    quiet_libraries()
    state.set("", health_pb2.HealthCheckResponse.SERVING)
    return server


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--idle-release", type=float, default=0.0)
    parser.add_argument("--metrics-port", type=int, default=0)
    given = parser.parse_args()
    if given.idle_release < 0:
        parser.error("--idle-release: must be 0 (never) or more seconds")
    socket, worker = given.socket, Worker(given.idle_release)
    over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    signal.signal(signal.SIGINT, lambda *_: over.set())
    server, notify = serve(socket, worker), Notify()
    with served(worker.figures, given.metrics_port) if given.metrics_port else nullcontext():
        while not over.wait(LOOK):
            notify.alive()
    server.stop(grace=1.0).wait()
    socket.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
