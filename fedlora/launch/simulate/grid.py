"""LocalGrid: Flower's public `Grid` in one process, or with worker processes that share the base.

    run_local(server_app, client_app, config)

The ServerApp and ClientApp are the ones that a deployment runs; only what carries the messages
differs. With one worker a client's handler runs inside `push_messages`. With more, each is a
forked process, so the base model that was loaded before exists once in memory, and messages go
over pipes as Flower's own protobuf, never pickled. Replies come back as they are done. A node goes
to the worker that served it last where that does not wait: its tokens and the states of its frozen
layers are kept there.
"""

import os
import selectors
import signal
import struct
import time
import traceback
import uuid
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedlora.federation.wire.codes import Code, code_of
from fedlora.federation.wire.same_machine import OWN_MACHINE

FIRST_NODE = 1000
RUN_ID = 1


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
    ) -> None:
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
        self.wanted_workers = min(workers, nodes)
        self.workers: list[_Worker] = []
        self._queue: deque[Message] = deque()
        self._served: dict[int, int] = {}  # node to the place of the worker that served it last
        self._done: dict[str, Message] = {}
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> "LocalGrid":
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
            if self.wanted_workers > 1:
                self._queue.append(message)
                self._dispatch()
            else:
                context = self.contexts[message.metadata.dst_node_id]
                try:
                    reply = given(self.client_app(message, context))
                except Exception as e:  # an app without a guard of its own
                    reply = failed(e, message)
                self._keep(message, reply)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        if self.workers:
            self._collect(0.0)
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

    def _answer(self, message: Message) -> Message:
        """In a worker: as `push_messages` does where there is none."""
        try:
            return given(self.client_app(message, self.contexts[message.metadata.dst_node_id]))
        except Exception as e:
            return failed(e, message)

    def _keep(self, message: Message, reply: Message) -> None:
        _name(reply)
        self._done[message.metadata.message_id] = reply

    def _dispatch(self) -> None:
        """Give idle workers what is waiting; a worker that died is replaced."""
        while len(self.workers) < self.wanted_workers:
            self.workers.append(self._hire())
        for n, worker in enumerate(self.workers):
            if not self._queue:
                return
            if worker.message is None:
                message = self._next(n)
                try:
                    worker.give(message)
                except OSError:
                    self._lost(n, message)

    def _next(self, n: int) -> Message:
        """What worker n does next: for a node that it, or nobody, has served; else the oldest."""
        nodes = [m.metadata.dst_node_id for m in self._queue]
        at = next((i for i, node in enumerate(nodes) if self._served.get(node, n) == n), 0)
        self._served[nodes[at]] = n
        message = self._queue[at]
        del self._queue[at]
        return message

    def _hire(self) -> "_Worker":
        worker = _Worker.fork(self)
        self._selector.register(worker.inbox, selectors.EVENT_READ, worker)
        return worker

    def _lost(self, n: int, message: Message | None) -> None:
        """A worker's process ended: its message gets an error reply, its place a new worker."""
        worker = self.workers.pop(n)  # first: the new one closes what the others have open
        self._selector.unregister(worker.inbox)
        status = worker.stop()
        if message is not None:
            reason = f"the worker process ended with status {status} while it held this message"
            self._keep(message, Message(Error(Code.WORKER_LOST, reason), reply_to=message))
        self.workers.insert(n, self._hire())

    def _collect(self, timeout: float) -> None:
        """Take in what workers have finished, and give them more."""
        for key, _ in self._selector.select(timeout):
            worker: _Worker = key.data
            message = worker.message
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


def given(reply: Message | None) -> Message:
    """The app's reply; raises ValueError where it gave none."""
    if reply is None:
        raise ValueError("the ClientApp gave no reply")
    return reply


def failed(error: Exception, message: Message) -> Message:
    """An error reply that says what went wrong."""
    return Message(Error(code_of(error), f"{type(error).__name__}: {error}"), reply_to=message)


@dataclass(eq=False)
class _Worker:
    """A forked process that answers messages one at a time."""

    pid: int
    inbox: int
    outbox: int
    message: Message | None = None
    buffer: bytearray = field(default_factory=bytearray)

    @classmethod
    def fork(cls, grid: LocalGrid) -> "_Worker":
        from fedlora.training.devices import check_fork

        check_fork()
        down_read, down_write = os.pipe()
        up_read, up_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(down_write)
            os.close(up_read)
            _serve(grid, down_read, up_write)
        os.close(down_read)
        os.close(up_write)
        return cls(pid, up_read, down_write)

    def give(self, message: Message) -> None:
        self.message = message
        _write(self.outbox, message_to_proto(message).SerializeToString())

    def take(self) -> Message | None:
        """The reply that is coming in; None if the process ended instead."""
        data = _read(self.inbox)
        self.message = None
        return None if data is None else message_from_proto(ProtoMessage.FromString(data))

    def stop(self) -> int:
        for fd in (self.outbox, self.inbox):
            os.close(fd)
        for sent in (None, signal.SIGTERM, signal.SIGKILL):
            if sent:
                os.kill(self.pid, sent)
            for _ in range(20 if sent is None else 100):
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    return status
                time.sleep(0.01)
        return -1


def _serve(grid: LocalGrid, inbox: int, outbox: int) -> None:
    """A worker's life. Ends when its pipe does; never returns into the parent's code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    code = 0
    try:
        import torch

        torch.set_num_threads(1)  # a forked process has no OpenMP pool to share
        for other in grid.workers:
            os.close(other.outbox)
            os.close(other.inbox)
        while (data := _read(inbox)) is not None:
            message = message_from_proto(ProtoMessage.FromString(data))
            reply = grid._answer(message)
            _name(reply)
            _write(outbox, message_to_proto(reply).SerializeToString())
    except BrokenPipeError:
        pass
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)


def _name(message: Message) -> None:
    """Give a message its id, which Flower's link state would."""
    message.metadata.__dict__["_message_id"] = uuid.uuid4().hex


def _write(fd: int, data: bytes) -> None:
    view = memoryview(struct.pack("<Q", len(data)) + data)
    while view:
        view = view[os.write(fd, view) :]


def _read(fd: int) -> bytes | None:
    """One framed message, or None where the other end is gone."""
    head = _exactly(fd, 8)
    return None if head is None else _exactly(fd, struct.unpack("<Q", head)[0])


def _exactly(fd: int, n: int) -> bytes | None:
    data = bytearray()
    while len(data) < n:
        part = os.read(fd, min(n - len(data), 1 << 20))
        if not part:
            return None
        data += part
    return bytes(data)


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
