"""A run whose ServerApp dies or hangs is begun again from its checkpoint, by itself."""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import psutil
import pytest

from fedlora.config.reader import parse_overrides
from fedlora.errors import DataError, DeployError
from fedlora.launch.deploy import endure, watch
from fedlora.launch.deploy.host import down, start_run
from fedlora.launch.deploy.operator import Operator
from fedlora.launch.deploy.plan import Plan
from fedlora.launch.deploy.progress import finish
from fedlora.launch.deploy.scripts import SERVERAPPS
from fedlora.launch.server_record import PLACE, Ending, recorded
from tests.support.deployment import adapter, brought_up, prepared, rounds, simulated

SERVERAPP = """
import os, re, signal, sys, time
from fedlora import errors
from fedlora.launch import server_record
server_record.EVERY = 0.1
with server_record.recorded(int(sys.argv[1]), sys.argv[2]):
    exec(sys.argv[3])
"""
DONE = "pass"
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
HUNG = {
    "stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
    "in native code": "re.match('(a+)+$', 'a' * 64 + 'b')",
}


class Flower:
    """Stands in for the SuperLink: each run is a process that does what `bodies` says next."""

    everyone: ClassVar[list[subprocess.Popen]] = []

    def __init__(self, plan: Plan, *bodies: str) -> None:
        self.plan, self.bodies = plan, [*bodies]
        self.started: list[subprocess.Popen] = []
        self.configs: list[dict] = []
        self.stopped: set[str] = set()
        self.begun = time.monotonic()

    def __call__(self, *arguments: str) -> dict:
        if arguments[0] == "stop":
            self.stopped.add(arguments[1])
            return {}
        assert arguments[0] == "run"
        run = str(len(self.started))
        self.configs.append(tomllib.loads(Path(arguments[-1]).read_text()))
        results = self.plan.server / "runs" / self.configs[-1]["run"]["name"]
        results.mkdir(parents=True, exist_ok=True)
        (results / "rounds.jsonl").touch()
        body = self.bodies[len(self.started)]
        command = [sys.executable, "-c", SERVERAPP, run, str(results), body]
        place = self.plan.server / SERVERAPPS
        self.started.append(subprocess.Popen(command, env={**os.environ, PLACE: str(place)}))
        self.everyone.append(self.started[-1])
        until(lambda: any(place.glob(f"{run}.*")))
        until(lambda: not any(place.glob(f"{run}.part")))
        return {"run-id": run}

    def status(self, run: str) -> str:
        """As Flower's: of a process that was killed it knows nothing for a while."""
        assert time.monotonic() - self.begun < 60, "nobody saw that it is over"
        if run in self.stopped:
            return "finished:stopped"
        ended = {0: "finished:completed", 1: "finished:failed"}
        return ended.get(self.started[int(run)].poll(), "running")


def until(done, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.05)


@pytest.fixture
def plan(settings, tmp_path: Path, monkeypatch) -> Iterator[Plan]:
    monkeypatch.setattr(endure, "healthy", lambda _: True)
    plan = prepared(tmp_path / "dep", settings("bert"), 1)
    plan.run_directory.mkdir()
    yield plan
    while Flower.everyone:
        process = Flower.everyone.pop()
        process.kill()
        process.wait()


def ran(plan: Plan, flower: Flower, attempts: int = 3) -> tuple[str, list[str]]:
    said: list[str] = []
    _, _, status = endure.run(plan, flower, {}, attempts, said.append, every=0.05)
    return status, said


def test_a_serverapp_that_was_killed_goes_on_from_the_checkpoint(plan: Plan) -> None:
    flower = Flower(plan, KILLED, DONE)
    status, said = ran(plan, flower)
    assert status == "finished:completed"
    assert [c["run"]["resume"] for c in flower.configs] == [False, True]
    assert "the ServerApp was killed: on from the checkpoint, time 1 of 3" in said
    assert flower.stopped == {"0"}, "and Flower need not find out by itself"


@pytest.mark.parametrize("how", HUNG)
def test_a_serverapp_that_hangs_is_killed_and_goes_on(plan: Plan, monkeypatch, how) -> None:
    monkeypatch.setattr(watch, "SILENT", 1.5)
    flower = Flower(plan, HUNG[how], DONE)
    status, said = ran(plan, flower)
    assert status == "finished:completed"
    assert not psutil.pid_exists(flower.started[0].pid)
    assert any("did not answer" in line for line in said)


def test_a_serverapp_that_works_for_long_is_left_alone(plan: Plan, monkeypatch) -> None:
    monkeypatch.setattr(watch, "SILENT", 1.0)
    busy = "end = time.monotonic() + 3\nwhile time.monotonic() < end: pass"
    assert ran(plan, Flower(plan, busy))[0] == "finished:completed"


def test_one_that_lost_its_superlink_goes_on(plan: Plan) -> None:
    flower = Flower(plan, "raise ConnectionResetError", DONE)
    assert ran(plan, flower)[0] == "finished:completed"
    assert len(flower.started) == 2


@pytest.mark.parametrize(
    "error",
    [
        "errors.ConfigError(['run.rounds: must be more'])",
        "errors.ProofError('the sum was not exact')",
        "errors.BudgetSpent('no epsilon is left')",
        "errors.RoundError('too few clients')",
        "errors.CheckpointError('the disk is full')",
        "RuntimeError('was killed; did not answer; lost its SuperLink')",
    ],
)
def test_an_error_of_its_own_would_come_again_and_is_left_alone(plan: Plan, error: str) -> None:
    flower = Flower(plan, f"raise {error}")
    assert ran(plan, flower)[0] == "finished:failed"
    assert len(flower.started) == 1


@pytest.mark.parametrize("attempts", [0, 2])
def test_it_goes_on_so_often_and_no_more(plan: Plan, attempts: int) -> None:
    flower = Flower(plan, KILLED, KILLED, KILLED, DONE)
    status, said = ran(plan, flower, attempts)
    assert (status, len(flower.started)) == ("finished:failed", 1 + attempts)
    assert "that is enough" in said[-1]


def test_a_run_that_its_operator_stopped_stays_so(plan: Plan) -> None:
    flower = Flower(plan, "time.sleep(60)")
    begun = threading.Event()

    def stop() -> None:
        begun.wait(30)
        flower("stop", "0")
        watch.ServerWatch(plan, "0").end()

    threading.Thread(target=stop).start()
    _, _, status = endure.run(plan, flower, {}, 3, lambda _: begun.set(), every=0.05)
    assert (status, len(flower.started)) == ("finished:stopped", 1)


def test_a_run_that_goes_on_is_not_begun_twice(plan: Plan) -> None:
    flower = Flower(plan, "time.sleep(60)")
    start_run(plan, flower, {})
    for more in ({}, {"run.resume": True}):
        with pytest.raises(DeployError, match=f"going on, in process {flower.started[0].pid}"):
            start_run(plan, flower, more)


def test_who_resumes_a_run_that_goes_on_follows_it_to_its_end(plan: Plan) -> None:
    flower, said = Flower(plan, "time.sleep(2)"), []
    start_run(plan, flower, {})
    resume = {"run.resume": True}
    run, _, status = endure.run(plan, flower, resume, 3, said.append, every=0.05)
    assert (run, status, len(flower.started)) == ("0", "finished:completed", 1)
    assert f"it is going on already, in process {flower.started[0].pid}" in said


def test_ctrl_c_says_that_the_run_goes_on_and_how_to_follow_or_end_it(plan: Plan) -> None:
    flower, said = Flower(plan, "time.sleep(60)"), []

    def say(line: str) -> None:
        said.append(line)
        if line.startswith("run 0"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        endure.run(plan, flower, {}, 3, say, every=0.05)
    assert flower.started[0].poll() is None
    assert f"fedlora deploy run {plan.quoted} --resume` follows it" in said[-1]
    assert "flwr stop 0 fedlora" in said[-1]


def test_without_a_record_nothing_is_begun_again(plan: Plan) -> None:
    lost = watch.ServerWatch(plan, "7")
    assert lost.why_again("finished:failed") == ""
    assert lost.lost() == ""


def test_a_record_needs_a_place_that_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(PLACE, raising=False)
    with recorded(1, "runs/run"):
        assert list(tmp_path.iterdir()) == []


def test_an_ending_is_on_record_on_a_disk_that_is_full(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv(PLACE, str(tmp_path))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with recorded(1, "runs/run"):
        monkeypatch.setattr(Path, "write_text", full)
        monkeypatch.setattr(Path, "write_bytes", full)
    assert [p.name for p in tmp_path.iterdir()] == [f"1.{Ending.DONE}"]


def test_a_run_that_failed_says_its_own_error_and_the_command_that_goes_on_with_it(
    plan: Plan, monkeypatch
) -> None:
    monkeypatch.setenv(PLACE, str(plan.server / SERVERAPPS))
    with pytest.raises(DataError), recorded(7, "runs/mine"):
        raise DataError("data.test-size = 500 leaves nothing")
    overrides = parse_overrides(["run.name=my own", "run.seed=3", "lora.init='1'"])
    with pytest.raises(DeployError) as said:
        finish(plan, plan.server, "7", "finished:failed", {**overrides, "run.resume": True})
    first, second = str(said.value).splitlines()
    assert first == (
        "the run ended as finished:failed: DataError: data.test-size = 500 leaves nothing"
    )
    words = shlex.split(second.split("`")[1])
    assert words[:5] == ["fedlora", "deploy", "run", str(plan.directory), "--resume"]
    assert parse_overrides(words[6::2]) == overrides


@pytest.mark.slow
def test_a_real_serverapp_killed_and_another_stopped_end_in_the_same_bytes(
    tiny, tmp_path: Path
) -> None:
    from tests.conftest import tiny_settings

    more = {"run.rounds": 3, "train.steps": 2}
    given = tiny_settings(tiny, tmp_path, "float32", "bert", **more)
    plan = brought_up(tmp_path / "dep", given, 2)
    struck: dict[int, float] = {}
    begun: list[float] = []
    said: list[str] = []
    over = threading.Event()

    def strike() -> None:
        while not over.wait(0.1):
            for _, entry in watch.entries(plan):
                done = len(rounds(Path(entry["results"])))
                if len(struck) < 2 and entry["pid"] not in struck and done > len(struck):
                    os.kill(entry["pid"], [signal.SIGKILL, signal.SIGSTOP][len(struck)])
                    struck[entry["pid"]] = time.monotonic()

    def say(line: str) -> None:
        said.append(line)
        print(line)
        if line.startswith("run "):
            begun.append(time.monotonic())

    beside = threading.Thread(target=strike)
    beside.start()
    try:
        with Operator(plan) as operator:
            _, results, status = endure.run(plan, operator, {}, 3, say)
    finally:
        over.set()
        beside.join()
        down(plan, print)
    assert status == "finished:completed"
    assert any("was killed: on from" in line for line in said)
    assert any("did not answer for 30 s: on from" in line for line in said)
    waited = [b - s for b, s in zip(begun[1:], struck.values(), strict=True)]
    print(f"begun again {waited[0]:.0f} s after SIGKILL, {waited[1]:.0f} s after SIGSTOP")
    assert max(waited) < 60
    assert [r["round"] for r in rounds(results)] == [0, 1, 2, 3]
    assert adapter(results) == adapter(simulated(plan, tmp_path / "local"))
