"""What hangs says nothing to systemd. Heard on a socket of our own: no systemd takes part."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import pytest

from fedlora.launch.deploy import flower_runtime, node
from fedlora.launch.deploy.notify import Notify
from fedlora.launch.deploy.plan import free_ports

WORKER = """
import re, sys, threading, time
from pathlib import Path
from fedlora.launch.deploy import worker

def hang():
    while not Path("hang").exists():
        time.sleep(0.1)
    re.match("(a+)+$", "a" * 64 + "b")  # native code that never lets go of Python

threading.Thread(target=hang, daemon=True).start()
sys.argv[1:] = ["--socket", "worker.sock"]
worker.main()
"""


@pytest.fixture
def systemd(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The socket that a unit's processes speak to."""
    with TemporaryDirectory() as place, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as hears:
        hears.bind(path := f"{place}/notify")
        hears.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        monkeypatch.setenv("WATCHDOG_USEC", "400000")
        yield hears


def heard(hears: socket.socket) -> list[bytes]:
    found: list[bytes] = []
    with suppress(BlockingIOError):
        while True:
            found.append(hears.recv(4096))
    return found


def speaks(hears: socket.socket, seconds: float) -> bool:
    """Is there a word from now on, within so many seconds?"""
    heard(hears)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if b"READY=1\nWATCHDOG=1" in heard(hears):
            return True
        time.sleep(0.05)
    return False


def test_alive_is_said_and_not_more_often_than_is_of_use(systemd) -> None:
    notify = Notify()
    for _ in range(20):
        notify.alive()
    assert heard(systemd) == [b"READY=1\nWATCHDOG=1"]
    time.sleep(0.11)  # a fourth of the 0.4 s that systemd waits, and a little
    notify.alive()
    assert heard(systemd) == [b"READY=1\nWATCHDOG=1"]


def test_no_process_that_is_started_later_speaks_for_this_one(systemd) -> None:
    Notify()
    assert "NOTIFY_SOCKET" not in os.environ
    assert "WATCHDOG_USEC" not in os.environ


def test_an_abstract_socket_is_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as hears:
        name = f"fedlora-test-{os.getpid()}"
        hears.bind(f"\0{name}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        Notify().alive()
        assert hears.recv(100).startswith(b"READY=1")


@pytest.mark.parametrize("place", [None, "/nonexistent/socket"])
def test_without_a_systemd_that_listens_nothing_happens(monkeypatch, place: str | None) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if place:
        monkeypatch.setenv("NOTIFY_SOCKET", place)
    Notify().alive()


def test_a_systemd_that_is_busy_holds_nobody_up(systemd, monkeypatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "0")
    notify, begun = Notify(), time.monotonic()
    for _ in range(10_000):  # more than any socket holds
        notify.alive()
    assert time.monotonic() - begun < 10


class Over(BaseException):
    pass


def test_a_node_speaks_while_its_supernode_answers_and_no_longer(systemd, monkeypatch) -> None:
    answers = ["", "", httpx.ReadTimeout("no answer"), httpx.ConnectError("gone"), Over()]
    told: list[int] = []

    def task(_: object) -> str:
        told.append(len(heard(systemd)))
        answer = answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setenv("WATCHDOG_USEC", "0")
    monkeypatch.setattr(flower_runtime, "connected", lambda *_: None)
    monkeypatch.setattr(flower_runtime, "task", task)
    monkeypatch.setattr(node, "POLL", 0.0)
    with pytest.raises(Over):
        node.take_tasks("127.0.0.1:1")
    assert told == [0, 1, 1, 0, 0], "heard before each look: what the one before it said"


def test_a_gate_that_is_stopped_falls_silent(systemd) -> None:
    (port,) = free_ports(1)
    listen = ["--listen", f"127.0.0.1:{port}", "--upstream", "127.0.0.1:1"]
    gate = subprocess.Popen([sys.executable, "-m", "fedlora.launch.deploy.gate", *listen])
    try:
        assert speaks(systemd, 30)
        assert speaks(systemd, 10), "again and again"
        gate.send_signal(signal.SIGSTOP)
        time.sleep(0.2)
        assert not speaks(systemd, 2.5)
        gate.send_signal(signal.SIGCONT)
        assert speaks(systemd, 10)
    finally:
        gate.kill()
        gate.wait()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stopped", "in native code"])
def test_a_worker_that_hangs_falls_silent(systemd, tmp_path: Path, how: str) -> None:
    worker = subprocess.Popen([sys.executable, "-c", WORKER], cwd=tmp_path)
    try:
        assert speaks(systemd, 120)
        assert speaks(systemd, 20), "again and again"
        if how == "stopped":
            worker.send_signal(signal.SIGSTOP)
        else:
            (tmp_path / "hang").touch()
            time.sleep(1.0)
        time.sleep(0.5)
        assert not speaks(systemd, 4)
    finally:
        worker.kill()
        worker.wait()
