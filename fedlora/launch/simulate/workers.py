"""LocalGrid's worker processes, and the pipes between it and them.

    WorkerProcess.fork(serve)      a copy of this process, which shares what it has in memory
    CardWorker(device).start()     a fresh one, for a card: what has used one cannot be copied

A frame is eight bytes of length and so many bytes. A worker answers one message at a time.
"""

import json
import os
import signal
import struct
import subprocess
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, NoReturn, Protocol

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from fedlora.federation.client.dispatch import as_bytes, message_of_bytes, pack
from fedlora.federation.wire.codes import code_of

READY = b""
"""The first frame from a worker that is spawned: it takes messages from now on."""


class Process(Protocol):
    """What is asked of a worker's process; a `Popen` has it."""

    def poll(self) -> int | None: ...
    def send_signal(self, sig: int) -> None: ...


@dataclass
class Forked:
    """A copy of this process."""

    pid: int

    def poll(self) -> int | None:
        """Its exit code, minus the number of the signal that ended it; None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def send_signal(self, sig: int) -> None:
        os.kill(self.pid, sig)


@dataclass(eq=False)
class WorkerProcess:
    """A process that answers messages one at a time."""

    pid: int
    process: Process
    inbox: int
    outbox: int
    ready: bool
    """Does it take messages? One that is spawned says so itself, once it has imported all."""
    packs: bool = False
    """Is a message sent with its context, of which the process has no copy?"""
    message: Message | None = None

    @classmethod
    def fork(cls, serve: Callable[[int, int], None]) -> "WorkerProcess":
        """serve: the copy's life, given where it reads and where it writes."""
        from fedlora.training.devices import check_fork

        check_fork()
        down_read, down_write = os.pipe()
        up_read, up_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(down_write)
            os.close(up_read)
            serve(down_read, up_write)
        os.close(down_read)
        os.close(up_write)
        return cls(pid, Forked(pid), up_read, down_write, ready=True)

    @classmethod
    def spawn(cls, module: str, told: Mapping[str, Any]) -> "WorkerProcess":
        """A fresh process of this module, given the two pipes, and `told` as its first frame.

        It imports from where this one does, and is of a session of its own: Ctrl-C is not for it.
        """
        down_read, down_write = os.pipe()
        up_read, up_write = os.pipe()
        path = [p or os.getcwd() for p in sys.path] + [os.environ.get("PYTHONPATH", "")]
        process = subprocess.Popen(
            [sys.executable, "-P", "-u", "-m", module, str(down_read), str(up_write)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
            stdin=subprocess.DEVNULL,
            pass_fds=(down_read, up_write),
            start_new_session=True,
        )
        os.close(down_read)
        os.close(up_write)
        worker = cls(process.pid, process, up_read, down_write, ready=False, packs=True)
        with suppress(BrokenPipeError):  # it ended at once, which `greeted` finds out
            write(down_write, json.dumps(told).encode())
        return worker

    @property
    def idle(self) -> bool:
        return self.ready and self.message is None

    def give(self, message: Message, context: Context) -> None:
        self.message = message
        write(self.outbox, pack("", message, context) if self.packs else as_bytes(message))

    def take(self) -> Message | None:
        """The reply that is coming in; None if the process ended instead."""
        data = read(self.inbox)
        self.message = None
        return None if data is None else message_of_bytes(data)

    def greeted(self) -> bool:
        """Whether what comes in is the word that it is ready; else the process ended."""
        self.ready = read(self.inbox) == READY
        return self.ready

    def stop(self) -> int:
        """End the process, gently first; its exit code."""
        for fd in (self.outbox, self.inbox):
            os.close(fd)
        for sent in (None, signal.SIGTERM, signal.SIGKILL):
            if sent:
                self.process.send_signal(sent)
            for _ in range(20 if sent is None else 100):
                if (code := self.process.poll()) is not None:
                    return code
                time.sleep(0.01)
        return -1


MODULE = "fedlora.launch.simulate.card_worker"


@dataclass(frozen=True)
class CardWorker:
    """What a worker on a card of its own is told as it starts."""

    device: str
    code: Sequence[str] = ()
    """The names of the user's own code that its clients may run."""
    strategies: Sequence[Mapping[str, Any]] = ()
    """Those that a call registered: name, class and states, by their names."""

    def start(self) -> WorkerProcess:
        """Its process, which is not ready yet."""
        return WorkerProcess.spawn(MODULE, asdict(self))


def live(work: Callable[[], None]) -> NoReturn:
    """A worker's life: ends with its pipe, or with 1; never returns into the caller's code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    code = 0
    try:
        import torch

        torch.set_num_threads(1)  # a forked process has no OpenMP pool to share
        work()
    except BrokenPipeError:
        pass
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)


def answered(app: ClientApp, message: Message, context: Context) -> Message:
    """The app's reply, or an error reply with the reason. Never nothing."""
    try:
        reply = given(app(message, context))
    except Exception as e:
        reply = failed(e, message)
    name(reply)
    return reply


def given(reply: Message | None) -> Message:
    """The app's reply; raises ValueError where it gave none."""
    if reply is None:
        raise ValueError("the ClientApp gave no reply")
    return reply


def failed(error: Exception, message: Message) -> Message:
    """An error reply that says what went wrong."""
    return Message(Error(code_of(error), f"{type(error).__name__}: {error}"), reply_to=message)


def name(message: Message) -> None:
    """Give a message its id, which Flower's link state would."""
    message.metadata.__dict__["_message_id"] = uuid.uuid4().hex


def write(fd: int, data: bytes) -> None:
    view = memoryview(struct.pack("<Q", len(data)) + data)
    while view:
        view = view[os.write(fd, view) :]


def read(fd: int) -> bytes | None:
    """One frame, or None where the other end is gone."""
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
