"""What hangs, a disk that is full and files that were cut short stop no supervisor and no `up`."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fedlora.launch.deploy import pulse, supervise
from fedlora.launch.deploy.plan import Plan
from fedlora.launch.deploy.progress import tail
from fedlora.launch.deploy.registering import registered
from fedlora.launch.deploy.supervise import Child, Supervisor, end_group, read_state, state_file


def until(done, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.02)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Child]:
    """A node that runs."""
    (script := tmp_path / "node.sh").write_text("exec sleep 1000\n")
    child = Child("node-0", script, tmp_path / "node.log", wait=0.0, most=0.0)
    child.check()
    yield child
    assert child.process is not None
    end_group(child.process.pid, signal.SIGKILL)
    child.process.wait()


def test_a_node_that_was_stopped_is_killed_and_another_starts(
    node: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervise, "SILENT", 0.1)
    assert node.process is not None
    first = node.process.pid
    assert not node.check(), "one that sleeps is none that was stopped"
    os.kill(first, signal.SIGSTOP)
    until(lambda: psutil.Process(first).status() == psutil.STATUS_STOPPED)
    until(node.check)
    assert node.last_exit == -signal.SIGKILL
    until(node.check)
    assert node.process is not None
    assert node.process.pid != first
    assert node.stopped == 0.0


def test_one_that_goes_on_in_time_is_left_alone(node: Child) -> None:
    assert node.process is not None
    pid = node.process.pid
    os.kill(pid, signal.SIGSTOP)
    until(lambda: not node.check() and node.stopped)
    os.kill(pid, signal.SIGCONT)
    until(lambda: not node.check() and not node.stopped)
    assert node.process.pid == pid


def test_a_worker_that_never_answered_is_given_up_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while it imports, say; but not one that is merely slow to start."""
    listens = pulse.Pulse(os.getpid(), str(tmp_path / "none.sock"))
    assert not listens.lost
    monkeypatch.setattr(pulse, "STARTS", 0.0)
    assert listens.lost
    listens.heard = time.monotonic()
    assert not listens.lost
    listens.end()


def test_a_full_disk_does_not_end_the_supervisor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = Plan(tmp_path, 1, (2,))
    plan.run_directory.mkdir()
    made, looked = Supervisor(plan), []

    class Full:
        name, process = "superlink", None

        def check(self) -> bool:
            looked.append(1)
            made.stopping = len(looked) > 1
            raise OSError(28, "No space left on device")

    made.children = [Full()]  # type: ignore[list-item]
    monkeypatch.setattr(supervise.signal, "signal", lambda *_: None)
    monkeypatch.setattr(supervise.time, "sleep", lambda _: None)
    made.run()
    assert len(looked) == 2
    assert "No space left" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", '{"node-0": "1", "no'])
def test_files_of_an_up_that_was_cut_short_are_as_if_they_were_not(
    tmp_path: Path, text: str
) -> None:
    plan = Plan(tmp_path, 1, (2,))
    plan.run_directory.mkdir()
    for name in ("registered.json", "registered.part"):
        (plan.run_directory / name).write_text(text)
    state_file(plan).write_text(text)
    assert registered(plan) == {}
    assert read_state(plan) == {}


def test_a_log_keeps_its_colours_and_gives_a_terminal_nothing_else(tmp_path: Path) -> None:
    plan = Plan(tmp_path, 1, (2,))
    plan.run_directory.mkdir()
    text = "a\n\x1b[92mINFO\x1b[0m:\tfine\n\x1b[2J\x1b]0;title\x07\u202eround 3\rround 9\n"
    (plan.run_directory / "node-0.log").write_text(text)
    _, fine, forged = tail(plan, "node-0", 9).split("\n")
    assert fine == "\x1b[92mINFO\x1b[0m:    fine"
    assert forged.isprintable()
    assert "\\x1b[2J" in forged
