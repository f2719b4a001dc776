"""LocalGrid: Flower's Grid without Flower's engine, and workers that may die at any moment."""

import inspect
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil
import pytest
import torch
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedlora.federation.wire.codes import FailureKind, kind_of
from fedlora.launch.simulate.grid import FIRST_NODE, LocalGrid
from fedlora.training.train import threads


def echo(message: Message, context: Context) -> Message:
    """Says who answered; does what the message asks for first."""
    asked = message.content.config_records["asked"]
    if asked.get("die"):
        os.kill(os.getpid(), signal.SIGKILL)
    if asked.get("raise"):
        raise RuntimeError("as asked")
    time.sleep(float(asked.get("sleep", 0.0)))  # type: ignore[arg-type]
    told = {"node": context.node_id, "pid": os.getpid(), "n": asked.get("n", 0)}
    told["big"] = b"x" * int(asked.get("big", 0))  # type: ignore[arg-type]
    return Message(RecordDict({"told": ConfigRecord(told)}), reply_to=message)


def app() -> ClientApp:
    made = ClientApp()
    made.query()(echo)
    return made


def ask(node: int, **asked: object) -> Message:
    record = ConfigRecord(dict(asked))  # type: ignore[misc]
    return Message(RecordDict({"asked": record}), FIRST_NODE + node, "query")


def told(reply: Message, key: str) -> object:
    return reply.content.config_records["told"][key]


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """A test that would wait for ever fails instead."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"still waiting after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_it_has_all_that_flowers_grid_has() -> None:
    wanted = {n for n, x in vars(Grid).items() if getattr(x, "__isabstractmethod__", False)}
    assert wanted
    assert not inspect.isabstract(LocalGrid)
    for name in wanted - {"run"}:
        theirs = list(inspect.signature(getattr(Grid, name)).parameters)
        assert list(inspect.signature(getattr(LocalGrid, name)).parameters) == theirs, name


@pytest.mark.parametrize("workers", [1, 2])
def test_each_node_answers_its_own_message(workers: int) -> None:
    with within(30), LocalGrid(app(), 5, {}, workers) as grid:
        assert list(grid.get_node_ids()) == [FIRST_NODE + i for i in range(5)]
        replies = list(grid.send_and_receive([ask(i, n=10 + i) for i in range(5)]))
        assert {told(r, "node"): told(r, "n") for r in replies} == {
            FIRST_NODE + i: 10 + i for i in range(5)
        }
        assert {r.metadata.src_node_id for r in replies} == set(grid.get_node_ids())
        pids = {told(r, "pid") for r in replies}
        assert (pids == {os.getpid()}) == (workers == 1)
        assert len(pids) <= workers


def test_a_worker_prefers_the_nodes_that_it_served_and_waits_for_none() -> None:
    with LocalGrid(app(), 4, {}, 2) as grid:
        grid._served = {FIRST_NODE: 0, FIRST_NODE + 1: 1}
        grid._queue.extend(ask(i) for i in (1, 0, 3))
        order = [grid._next(0).metadata.dst_node_id - FIRST_NODE for _ in range(3)]
    assert order == [0, 3, 1], "its own, nobody's, another's"
    assert grid._served == {FIRST_NODE + i: 0 for i in (0, 1, 3)}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_reply_is_given_once(workers: int) -> None:
    with within(30), LocalGrid(app(), 2, {}, workers) as grid:
        (mid,) = grid.push_messages([ask(0)])
        got: list[Message] = []
        while not got:
            got = list(grid.pull_messages([mid]))
        assert got[0].metadata.reply_to_message_id == mid
        assert list(grid.pull_messages([mid])) == []
        assert list(grid.pull_messages(["no such message"])) == []


def test_a_large_message_goes_through_a_pipe() -> None:
    with within(30), LocalGrid(app(), 2, {}, 2) as grid:
        replies = list(grid.send_and_receive([ask(i, big=3_000_000 + i) for i in range(2)]))
        assert sorted(len(told(r, "big")) for r in replies) == [3_000_000, 3_000_001]  # type: ignore[arg-type]


def test_messages_are_drawn_one_by_one() -> None:
    answered = []

    def watched(message: Message, context: Context) -> Message:
        answered.append(context.node_id)
        return echo(message, context)

    made = ClientApp()
    made.query()(watched)
    drawn = []

    def messages() -> Iterator[Message]:
        for i in range(3):
            drawn.append(len(answered))
            yield ask(i)

    with LocalGrid(made, 3, {}, 1) as grid:
        list(grid.push_messages(messages()))
    assert drawn == [0, 1, 2]  # not one message exists before the one before it was answered


@pytest.mark.parametrize("workers", [1, 2])
def test_an_app_that_raises_or_says_nothing_gets_an_error_reply(workers: int) -> None:
    silent = ClientApp()
    silent.query()(lambda message, context: None)  # type: ignore[arg-type, return-value]
    for made, reason in ((app(), "as asked"), (silent, "")):
        with within(30), LocalGrid(made, 2, {}, workers) as grid:
            (reply,) = grid.send_and_receive([ask(0, **{"raise": True})])
            assert reply.has_error()
            assert isinstance(reply.error, Error)
            assert reason in str(reply.error.reason)
            assert kind_of(reply.error.code) == FailureKind.FAILED


def test_a_worker_killed_at_its_work_costs_its_message_alone() -> None:
    with within(30), LocalGrid(app(), 6, {}, 2) as grid:
        messages = [ask(i, die=i in (1, 4), n=i) for i in range(6)]
        replies = list(grid.send_and_receive(messages))
        lost = [r for r in replies if r.has_error()]
        assert len(replies) == 6
        assert len(lost) == 2
        assert all("worker process ended" in str(r.error.reason) for r in lost)
        assert all(kind_of(r.error.code) == FailureKind.LOST for r in lost)
        assert {told(r, "n") for r in replies if not r.has_error()} == {0, 2, 3, 5}
        after = list(grid.send_and_receive([ask(i, sleep=0.05) for i in range(6)]))
        assert not any(r.has_error() for r in after)
        assert len({told(r, "pid") for r in after}) == 2  # both places are filled again


def test_a_worker_killed_while_idle_is_replaced_unnoticed() -> None:
    with within(30), LocalGrid(app(), 4, {}, 2) as grid:
        list(grid.send_and_receive([ask(i) for i in range(4)]))
        for worker in grid.workers:
            os.kill(worker.pid, signal.SIGKILL)
        time.sleep(0.1)
        replies = list(grid.send_and_receive([ask(i, sleep=0.02) for i in range(4)]))
        assert len(replies) == 4
        failed = [r for r in replies if r.has_error()]
        assert len(failed) <= 2  # what was handed to a worker before its death was seen
        assert not any(r.has_error() for r in grid.send_and_receive([ask(i) for i in range(4)]))


def pipes() -> set[str]:
    """The pipes that this process has open. Other libraries open files of their own at a fork."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the listing's own
            found.add(os.readlink(f"/proc/self/fd/{fd}"))
    return {name for name in found if name.startswith("pipe:")}


def test_nothing_of_it_is_left_after_close() -> None:
    before = pipes()
    with within(30), LocalGrid(app(), 4, {}, 2) as grid:
        list(grid.send_and_receive([ask(i, die=i == 2) for i in range(4)]))
        pids = [w.pid for w in grid.workers]
        assert len(pipes() - before) == 4  # two a worker; the dead one's are closed
    assert len(pids) == 2
    assert not any(running(pid) for pid in pids)  # a zombie would still be there
    assert not pipes() - before
    grid.close()
    for pid in pids:
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def test_a_worker_outlives_its_parent_by_a_moment_only(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """SIGKILL of the parent: every worker sees its pipe end, none waits for ever."""
    ready, seen = os.pipe()
    parent = os.fork()
    if parent == 0:
        grid = LocalGrid(app(), 4, {}, 2)
        list(grid.send_and_receive([ask(i) for i in range(4)]))
        os.write(seen, b" ".join(str(w.pid).encode() for w in grid.workers))
        time.sleep(60)
        os._exit(0)
    pids = [int(n) for n in os.read(ready, 100).split()]
    os.close(ready)
    os.close(seen)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    until = time.monotonic() + 10
    while (left := [p for p in pids if running(p) and not zombie(p)]) and time.monotonic() < until:
        time.sleep(0.05)
    assert len(pids) == 2
    assert not left


def zombie(pid: int) -> bool:
    """Dead, and its new parent has not noticed yet."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_send_and_receive_returns_what_it_has_at_the_timeout() -> None:
    with within(30), LocalGrid(app(), 2, {}, 2) as grid:
        begun = time.monotonic()
        replies = list(grid.send_and_receive([ask(0), ask(1, sleep=5)], timeout=0.5))
        assert [told(r, "node") for r in replies] == [FIRST_NODE]
        assert time.monotonic() - begun < 3


BEFORE: dict[int, int] = {}
"""By process: the threads beside its main one before it computed anything. Libraries that other
tests of this process have used begin theirs anew where it is copied."""


def products(message: Message, context: Context) -> Message:
    """Says how many threads this process computes with, in float32 and under autocast."""
    n = int(message.content.config_records["asked"]["threads"])  # type: ignore[arg-type]
    others = BEFORE.setdefault(os.getpid(), psutil.Process().num_threads() - 1)
    x = torch.ones(512, 512, requires_grad=True)
    with threads(n):
        for low in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                (x @ x).sum().backward()
    there = psutil.Process().num_threads() - others
    told = {"node": context.node_id, "pid": os.getpid(), "threads": there}
    return Message(RecordDict({"told": ConfigRecord(told)}), reply_to=message)


def test_a_forked_worker_has_the_threads_of_its_client_alone_under_autocast_too() -> None:
    """By the system's count, and whatever the process that was copied was set to."""
    counting = ClientApp()
    counting.query()(products)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for asked in (1, 2):  # two are a counterexample: they would be seen
            with within(60), LocalGrid(counting, 4, {}, 2) as grid:
                replies = list(grid.send_and_receive([ask(i, threads=asked) for i in range(4)]))
            assert os.getpid() not in {told(r, "pid") for r in replies}
            assert {told(r, "threads") for r in replies} == {asked}
    finally:
        torch.set_num_threads(before)
