"""A grid that plays a seeded schedule of faults, and a clock that costs no time."""

import copy
import errno
import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from flwr.app import Array, Error, Message

from fedlora.config.reader import Config
from fedlora.errors import CheckpointError
from fedlora.federation.server import exchange, journal
from fedlora.federation.server.loop import FederatedLora
from fedlora.launch.simulate.grid import LocalGrid, _name
from fedlora.launch.simulate.workers import answered
from fedlora.lora import tree_file
from tests.support.tiny_federation import Ran, directory_of

FAULTS = (
    "",  # nothing
    "never sent",  # the message does not reach the node
    "cut off",  # the client did the work, and its reply is lost: killed in mid-upload
    "late",  # the reply comes in a later round
    "twice",  # the reply comes, and comes again
    "killed",  # the SuperLink says that the node is gone
    "nan",
    "replayed",  # an earlier round's reply in place of this one's
    "another's",  # another client's reply of this round
)


class Clock:
    """Stands in for `time` in fedlora.federation.server.exchange: sleeping costs nothing."""

    def __init__(self) -> None:
        self.now = 0.0
        self.perf_counter = time.perf_counter

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def fault(seed: int, round: int, client: int, faults: tuple[str, ...] = FAULTS) -> str:
    """What happens to this client in this round: nothing, half of the time."""
    chance = random.Random(f"{seed}/{round}/{client}")
    return "" if chance.random() < 0.5 else chance.choice(faults)


class ChaosGrid(LocalGrid):
    """LocalGrid, but for what `plan(round, client)` says happens to train messages."""

    def __init__(self, *args: Any, plan: Callable[[int, int], str], **kw: Any) -> None:
        super().__init__(*args, **kw)
        self.plan = plan
        self.late: list[Message] = []
        self.before: dict[int, Message] = {}
        self.given: dict[str, Message] = {}
        self.again: set[str] = set()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids: list[str] = []
        for message in messages:
            _name(message)
            ids.append(message.metadata.message_id)
            if message.metadata.message_type != "train":
                self._keep(message, answered(self.client_app, message, self._context(message)))
                continue
            job = message.content.config_records["job"]
            happens = self.plan(int(job["round"]), int(job["client"]))
            self._suffer(happens, message, int(job["client"]))
        return ids

    def _suffer(self, happens: str, message: Message, client: int) -> None:
        if happens == "never sent":
            return
        if happens == "killed":
            reply = Message(Error(5, "Node Unavailable"), reply_to=message)
            reply.metadata.__dict__["_src_node_id"] = 1  # as the SuperLink's own replies
            self._keep(message, reply)
            return
        reply = answered(self.client_app, message, self._context(message))
        assert not reply.has_error(), reply.error.reason
        told = copy.deepcopy(reply.content)
        if happens == "cut off":
            return
        if happens == "late":
            self.late.append(reply)
            return
        if happens == "nan":
            spoil(reply)
        if happens in ("replayed", "another's"):
            other = client if happens == "replayed" else (client + 1) % len(self.contexts)
            if other not in self.before:
                return  # there is none yet: as good as lost
            reply = Message(copy.deepcopy(self.before[other].content), reply_to=message)
        if happens == "twice":
            self.again.add(message.metadata.message_id)
        self.before[client] = Message(told, reply_to=message)
        self._keep(message, reply)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = list(message_ids)
        found = list(super().pull_messages(wanted))
        for reply in list(self.late):  # one that is late answers whoever asks next
            if reply.metadata.reply_to_message_id not in wanted and found:
                found.append(reply)
                self.late.remove(reply)
        twice = [m for m in found if m.metadata.reply_to_message_id in self.again]
        return [*found, *twice]


def spoil(reply: Message) -> None:
    """Put a NaN in its first tensor of more than one axis, or in its scale."""
    record = reply.content.array_records["sent"]
    key = next(iter(record))
    old = record[key]
    data = b"\x00\x00\xc0\x7f" + old.data[4:]
    record[key] = Array(dtype=old.dtype, shape=old.shape, stype=old.stype, data=data)


class Killed(BaseException):
    """The server's process is gone: nothing catches it."""


@dataclass
class Strikes:
    """Kill the server, or fill its disk, at these (round, moment) pairs, each once."""

    at: Mapping[int, str]
    done: set[int] = field(default_factory=set)

    def install(self, monkeypatch: Any) -> None:
        save, commit = tree_file.save, journal.Journal.commit
        replace = tree_file.os.replace
        strikes = self

        def committing(self: Any, round: int, tree: Any, record: Any, keep: int) -> None:
            moment = strikes.at.get(round, "") if round not in strikes.done else ""
            if moment == "before the checkpoint":
                strikes.done.add(round)
                raise Killed
            if moment == "in the checkpoint":
                strikes.done.add(round)

                def half(*_: Any) -> None:
                    raise Killed

                monkeypatch.setattr(tree_file.os, "replace", half)
                try:
                    commit(self, round, tree, record, keep)
                finally:
                    monkeypatch.setattr(tree_file.os, "replace", replace)
            if moment == "disk full":
                strikes.done.add(round)
                with monkeypatch.context() as patch:
                    patch.setattr(tree_file.os, "fsync", full)
                    with pytest.raises(CheckpointError, match="No space left"):
                        commit(self, round, tree, record, keep)
                raise Killed
            if moment == "after the checkpoint":
                strikes.done.add(round)

                def saved(*args: Any) -> None:
                    save(*args)
                    raise Killed

                monkeypatch.setattr(tree_file, "save", saved)
                try:
                    commit(self, round, tree, record, keep)
                finally:
                    monkeypatch.setattr(tree_file, "save", save)
            commit(self, round, tree, record, keep)

        monkeypatch.setattr(journal.Journal, "commit", committing)


def full(_: int) -> None:
    """Stands in for `fsync` on a disk that has no room left."""
    raise OSError(errno.ENOSPC, "No space left on device")


def endure(
    settings: Mapping[str, object], plan: Callable[[int, int], str], monkeypatch: Any
) -> Ran:
    """Run to the end under the plan, restarting the server whenever it is killed."""
    from client_app.app import app

    monkeypatch.setattr(exchange, "time", Clock())
    resume: dict[str, object] = {}
    while True:
        config = Config.read({**settings, **resume})
        with ChaosGrid(app, config.clients.count, config.flat(), 1, plan=plan) as grid:
            try:
                FederatedLora(config).start(grid)
                return Ran(directory_of(settings))
            except Killed:
                resume = {"run.resume": True}
