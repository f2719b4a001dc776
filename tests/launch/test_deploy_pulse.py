"""A worker that hangs is killed from outside and started again, within a minute. Slow."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedlora.launch.deploy import pulse, scripts
from fedlora.launch.deploy.host import down
from fedlora.launch.deploy.plan import Plan, free_ports
from fedlora.launch.deploy.supervise import is_running, read_state
from tests.support.deployment import brought_up, ran, rounds

pytestmark = pytest.mark.slow

HANGS = """
import re
from pathlib import Path

from fedlora.launch.deploy.worker import serve

server = serve(Path("worker.sock"))
while not Path("hang").exists():
    pass
re.match("(a+)+$", "a" * 64 + "b")  # native code that never lets go of Python
"""


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Plan]:
    """A supervised worker; the other programs are scripts that sleep."""
    long = tmp_path / ("a-long-name-" * 8)  # a socket's path has 107 characters at most
    ports = free_ports(2)
    plan = Plan(long, 1, (2,), port=ports[0], node_ports=ports[1:])
    for path in (plan.server, plan.node(0), plan.run_directory):
        path.mkdir(parents=True)
    for script in (plan.server / "superlink.sh", plan.server / "superexec.sh"):
        script.write_text("exec sleep 1000\n")
    (plan.node(0) / "env.sh").write_text(scripts.ENVIRONMENT)
    (plan.node(0) / "hangs.py").write_text(HANGS)
    text = scripts.worker(0)
    (plan.node(0) / "worker.sh").write_text(text)
    plan.save()
    yield plan
    down(plan, lambda _: None)


def supervised(plan: Plan) -> "subprocess.Popen[bytes]":
    with (plan.run_directory / "supervisor.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "fedlora.launch.deploy.supervise", str(plan.directory)],
            stdout=log,
        )


def worker(plan: Plan, i: int = 0) -> dict:
    return read_state(plan).get("children", {}).get(f"worker-{i}", {})


def until(done, seconds: float) -> float:
    begun = time.monotonic()
    while not done():
        assert time.monotonic() - begun < seconds, "not in time"
        time.sleep(0.2)
    return time.monotonic() - begun


@pytest.mark.parametrize("how", ["stopped", "in native code"])
def test_a_worker_that_hangs_is_another_within_a_minute(alone: Plan, how: str) -> None:
    if how != "stopped":
        script = alone.node(0) / "worker.sh"
        script.write_text(script.read_text().replace(
            "-m fedlora.launch.deploy.worker --socket worker.sock", "hangs.py"))  # fmt: skip
    me = supervised(alone)
    try:
        until(lambda: is_running(worker(alone)), 60)
        first = worker(alone)["pid"]
        heard = pulse.Pulse(first)
        until(lambda: heard.heard is not None, 90)
        time.sleep(2 * pulse.EVERY + 1)  # the supervisor has heard it, too
        heard.end()
        if how == "stopped":
            os.kill(first, signal.SIGSTOP)
        else:
            (alone.node(0) / "hang").touch()
        until(lambda: worker(alone)["restarts"] == 1, 60)
        (alone.node(0) / "hang").unlink(missing_ok=True)
        assert worker(alone)["last_exit"] == -signal.SIGKILL
        assert worker(alone)["pid"] != first
        assert "worker-0 did not answer" in (alone.run_directory / "supervisor.log").read_text()
    finally:
        down(alone, print)
        me.wait(30)


def test_a_round_goes_on_without_a_worker_that_is_stopped(tiny, tmp_path: Path) -> None:
    from tests.conftest import tiny_settings

    more = {"run.rounds": 2, "round.deadline": 600.0}
    plan = brought_up(tmp_path / "dep", tiny_settings(tiny, tmp_path, "float32", "bert", **more), 2)
    stopped: list[int] = []

    def strike(results: Path) -> None:
        if rounds(results) and not stopped:  # round 0 is over, round 1 under way
            stopped.append(worker(plan, 1)["pid"])
            os.kill(stopped[0], signal.SIGSTOP)

    try:
        begun = time.monotonic()
        status, results = ran(plan, {}, strike)
        assert status == "finished:completed"
        assert [r["round"] for r in rounds(results)] == [0, 1, 2]
        assert all(0 in r["accepted"] for r in rounds(results)[1:])
        assert rounds(results)[2]["accepted"] == [0, 1]
        assert time.monotonic() - begun < 400, "no round waited for its deadline"
        assert worker(plan, 1)["restarts"] == 1
        assert worker(plan, 1)["pid"] != stopped[0]
    finally:
        down(plan, print)
