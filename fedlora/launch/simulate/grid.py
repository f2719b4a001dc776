"""LocalGrid: Flower's public `Grid` in one process, or with worker processes that share the base.

    run_local(server_app, client_app, config)

The ServerApp and ClientApp are the ones that a deployment runs; only what carries the messages
differs. With one worker a client's handler runs inside `push_messages`. With more, each is a
forked process, so the base model that was loaded before exists once in memory, and messages go
over pipes as Flower's own protobuf, never pickled. Replies come back as they are done. A node goes
to the worker that served it last where that does not wait: its tokens and the states of its frozen
layers are kept there.

On cards each worker has one of its own. The server's process is the first: clients train there on
the server's own base. Each further one is a fresh process with the only base on its card, since
what has used a card cannot be forked: card_worker.py. They are served while a client trains here.
"""

import os
import selectors
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedlora.errors import RoundError
from fedlora.federation.client.dispatch import as_bytes, message_of_bytes
from fedlora.federation.wire.codes import Code
from fedlora.federation.wire.same_machine import OWN_MACHINE
from fedlora.launch.simulate.workers import (
    CardWorker,
    WorkerProcess,
    answered,
    failed,
    given,
    live,
    read,
    write,
)
from fedlora.launch.simulate.workers import name as _name

FIRST_NODE = 1000
RUN_ID = 1
SETTLED = 0.1
"""Seconds after the last message was pushed: no more are likely to come before a reply does."""


class LocalGrid(Grid):
    """A federation of `nodes` clients. Use as a context manager: it stops its workers."""

    simulated = True
    """Its clients are all this machine."""

    def __init__(
        self,
        client_app: ClientApp,
        nodes: int,
        run_config: Mapping[str, Any],
        workers: int = 1,
        node_configs: Mapping[int, Mapping[str, Any]] | None = None,
        cards: Sequence[CardWorker] = (),
    ) -> None:
        """cards: the further workers, where clients train on cards; `workers` is then 1."""
        self.client_app = client_app
        TaskIdentity.task_id = TaskIdentity.run_id = RUN_ID  # what Message() reads its run from
        TaskIdentity.node_id = 1
        self._run = Run.create_empty(run_id=RUN_ID)
        shared = dict(run_config)
        self.contexts = {
            FIRST_NODE + i: Context(
                run_id=RUN_ID,
                node_id=FIRST_NODE + i,
                node_config={
                    "partition-id": i,
                    "num-partitions": nodes,
                    OWN_MACHINE: True,
                    **(node_configs or {}).get(i, {}),
                },
                state=RecordDict(),
                run_config=shared,
            )
            for i in range(nodes)
        }
        self.cards = [*cards][: nodes - 1]
        self.wanted_workers = len(self.cards) or min(workers, nodes)
        self.workers: list[WorkerProcess] = []
        self._queue: deque[Message] = deque()
        self._served: dict[int, int] = {}  # node to the place of the worker that served it last
        self._done: dict[str, Message] = {}
        self._pushed = 0.0
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> "LocalGrid":
        """On cards the workers start now: they import what they need while the server loads."""
        if self.cards:
            self._dispatch()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- Flower's Grid ------------------------------------------------------------------------

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            _name(message)
            ids.append(message.metadata.message_id)
            if self.cards or self.wanted_workers > 1:
                self._queue.append(message)
                self._pushed = time.monotonic()
                self._dispatch()
            else:
                context = self._context(message)
                try:
                    reply = given(self.client_app(message, context))
                except Exception as e:  # an app without a guard of its own
                    reply = failed(e, message)
                self._keep(message, reply)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        if self.workers:
            self._collect(0.0)
        if self.cards:
            self._answer_here()
        return [self._done.pop(i) for i in list(message_ids) if i in self._done]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        waiting = set(self.push_messages(messages))
        until = time.monotonic() + (timeout or float("inf"))
        replies: list[Message] = []
        while waiting and time.monotonic() < until:
            found = list(self.pull_messages(waiting))
            waiting -= {m.metadata.reply_to_message_id for m in found}
            replies += found
            if waiting and not found:
                self._collect(0.05)
        return replies

    # -- the work -----------------------------------------------------------------------------

    def _keep(self, message: Message, reply: Message) -> None:
        _name(reply)
        self._done[message.metadata.message_id] = reply

    def _context(self, message: Message) -> Context:
        return self.contexts[message.metadata.dst_node_id]

    def _dispatch(self) -> None:
        """Give idle workers what is waiting; a worker that died is replaced."""
        while len(self.workers) < self.wanted_workers:
            self._hire(len(self.workers))
        for n, worker in enumerate(self.workers):
            if not self._queue:
                return
            if worker.idle:
                message = self._next(n)
                try:
                    worker.give(message, self._context(message))
                except OSError:
                    self._lost(n, message)

    def _answer_here(self) -> None:
        """On cards: a client on the server's, once each other worker has what it does next."""
        waiting, quiet = len(self._queue), time.monotonic() - self._pushed
        if waiting > len(self.workers) or (waiting and quiet > SETTLED):
            message = self._next(len(self.workers))
            with self._serving():
                reply = answered(self.client_app, message, self._context(message))
            self._keep(message, reply)

    @contextmanager
    def _serving(self) -> Iterator[None]:
        """Within it, a thread takes in what other workers have done, and gives them more."""
        over, failed = threading.Event(), list[BaseException]()

        def serve() -> None:
            try:
                while not over.is_set():
                    self._collect(0.05)
            except BaseException as e:
                failed.append(e)

        thread = threading.Thread(target=serve, name="fedlora-cards")
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
        if failed:
            raise failed[0]

    def _next(self, n: int) -> Message:
        """What worker n does next: for a node that it, or nobody, has served; else the oldest."""
        nodes = [m.metadata.dst_node_id for m in self._queue]
        at = next((i for i, node in enumerate(nodes) if self._served.get(node, n) == n), 0)
        self._served[nodes[at]] = n
        message = self._queue[at]
        del self._queue[at]
        return message

    def _hire(self, n: int) -> None:
        """Start the n-th worker."""
        worker = self.cards[n].start() if self.cards else WorkerProcess.fork(self._serve)
        self.workers.insert(n, worker)
        self._selector.register(worker.inbox, selectors.EVENT_READ, worker)

    def _serve(self, inbox: int, outbox: int) -> None:
        """The life of a forked worker."""

        def work() -> None:
            for other in self.workers:
                os.close(other.outbox)
                os.close(other.inbox)
            while (data := read(inbox)) is not None:
                message = message_of_bytes(data)
                reply = answered(self.client_app, message, self._context(message))
                write(outbox, as_bytes(reply))

        live(work)

    def _lost(self, n: int, message: Message | None) -> None:
        """A worker's process ended: its message gets an error reply, its place a new worker."""
        worker = self.workers.pop(n)  # first: the new one closes what the others have open
        self._selector.unregister(worker.inbox)
        status = worker.stop()
        if not worker.ready:
            where = self.cards[n].device
            raise RoundError(f"a worker for {where} ended with status {status} before it began")
        if message is not None:
            reason = f"the worker process ended with status {status} while it held this message"
            self._keep(message, Message(Error(Code.WORKER_LOST, reason), reply_to=message))
        self._hire(n)

    def _collect(self, timeout: float) -> None:
        """Take in what workers have finished, and give them more."""
        for key, _ in self._selector.select(timeout):
            worker: WorkerProcess = key.data
            message = worker.message
            if not worker.ready:
                if not worker.greeted():
                    self._lost(self.workers.index(worker), None)
                continue
            reply = worker.take()
            if reply is None or message is None:
                self._lost(self.workers.index(worker), message)
            else:
                self._keep(message, reply)
        self._dispatch()

    def close(self) -> None:
        """Stop the workers. Safe to call twice."""
        for worker in self.workers:
            worker.stop()
        self.workers = []
        self._selector.close()


def run_local(
    server_app: ServerApp,
    client_app: ClientApp,
    run_config: Mapping[str, Any],
    nodes: int,
    workers: int = 1,
    node_configs: Mapping[int, Mapping[str, Any]] | None = None,
) -> None:
    """Run both apps to the end in this process."""
    with LocalGrid(client_app, nodes, run_config, workers, node_configs) as grid:
        state = RecordDict()
        context = Context(
            run_id=RUN_ID, node_id=0, node_config={}, state=state, run_config=dict(run_config)
        )
        server_app(grid, context)
