"""Keeps a deployment's processes running on one host; started by `up`, ended by `down`.

Each process is the leader of a group of its own, so ending it ends whatever it started. One that
ends by itself is started again after a wait: a node after 65 s, since the SuperLink counts a
killed node as connected for 60 s and refuses it until then; others after 1 s, doubled each time
up to 30 s. A worker that answers no more is killed first (pulse.py), and so is any process that was
stopped and stays so. run/state.json says at any time which processes are there.

    python -m fedlora.launch.deploy.supervise DIR
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from fedlora.launch.deploy.operator import environment
from fedlora.launch.deploy.plan import Plan
from fedlora.launch.deploy.pulse import SILENT, Pulse

STEADY = 120.0
"""A process that ran this long starts again as if for the first time."""
GRACE = 10.0
"""Seconds from SIGTERM to SIGKILL."""


@dataclass
class Child:
    """One process to keep running."""

    name: str
    script: Path
    log: Path
    wait: float
    """Seconds before the first restart."""
    most: float
    listens: bool = False
    """Is it a worker, which must answer?"""
    process: subprocess.Popen[bytes] | None = None
    created: float = 0.0
    restarts: int = -1
    failures: int = 0
    last_exit: int | None = None
    next_start: float = 0.0
    begun: float = field(default=0.0)
    pulse: Pulse | None = None
    stopped: float = field(default=0.0)
    """Since when it is stopped, as by SIGSTOP; 0: it is not."""

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                ["/bin/sh", str(self.script)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment(self.script.parent / "home"),
            )
        self.created = psutil.Process(self.process.pid).create_time()
        self.begun, self.stopped = time.monotonic(), 0.0
        self.restarts += 1
        self.pulse = Pulse(self.process.pid) if self.listens else None

    def check(self) -> bool:
        """Start it where that is due. True if anything changed."""
        if self.process is None:
            if time.monotonic() < self.next_start:
                return False
            self.start()
            return True
        if why := self._hangs():
            print(f"{self.name} {why} and is killed", flush=True)
            end_group(self.process.pid, signal.SIGKILL)
            self.process.wait()
        code = self.process.poll()
        if code is None:
            return False
        if self.pulse is not None:
            self.pulse.end()
        end_group(self.process.pid, signal.SIGKILL)
        self.process, self.last_exit = None, code
        steady = time.monotonic() - self.begun > STEADY
        self.failures = 0 if steady else self.failures + 1
        pause = min(self.most, self.wait * 2 ** max(0, self.failures - 1))
        self.next_start = time.monotonic() + pause
        return True

    def _hangs(self) -> str:
        """Why it will not go on by itself; "" where it may."""
        assert self.process is not None
        if self.pulse is not None:
            return f"did not answer for {SILENT:g} s" if self.pulse.lost else ""
        if _status(self.process.pid) != psutil.STATUS_STOPPED:
            self.stopped = 0.0
            return ""
        self.stopped = self.stopped or time.monotonic()
        long = time.monotonic() - self.stopped > SILENT
        return f"was stopped for {SILENT:g} s" if long else ""

    def record(self) -> dict[str, Any]:
        here = self.process is not None
        due = None if here or self.restarts < 0 else time.time() + self._left()
        return {
            "pid": self.process.pid if self.process else None,
            "created": self.created if here else None,
            "restarts": max(0, self.restarts),
            "last_exit": self.last_exit,
            "next_start": due,
        }

    def _left(self) -> float:
        return max(0.0, self.next_start - time.monotonic())


def children(plan: Plan) -> list[Child]:
    """Everything that runs on one host, in the order it starts."""

    def child(name: str, script: Path, wait: float = 1.0, most: float = 30.0) -> Child:
        log = plan.run_directory / f"{name}.log"
        return Child(name, script, log, wait, most, listens=name.startswith("worker-"))

    found = [child(n, plan.server / f"{n}.sh") for n in ("superlink", "superexec")]
    if plan.gate_port:
        found.append(child("gate", plan.server / "gate.sh"))
    for i in range(plan.clients):
        if plan.warm:
            found.append(child(f"worker-{i}", plan.node(i) / "worker.sh"))
        wait = plan.node_restart
        found.append(child(f"node-{i}", plan.node(i) / "node.sh", wait, wait))
    return found


class Supervisor:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.children = children(plan)
        self.stopping = False

    def run(self) -> None:
        """Until SIGTERM: then everything is ended, nodes first, so that they sign off."""
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        # Nodes before they are registered are refused, and then wait: `up` says when.
        while not self.stopping:
            ready = (self.plan.run_directory / "registered.json").exists()
            due = [c for c in self.children if ready or not c.name.startswith("node-")]
            try:
                changed = [c.check() for c in due]
                if any(changed):
                    self._write()
            except OSError as e:  # a full disk, say: it is no reason to look after nobody
                print(f"not done: {e}", flush=True)
                time.sleep(5.0)
            time.sleep(0.2)
        for kind in ("node-", "worker-", "superexec", "gate", "superlink"):
            processes = [c.process for c in self.children if c.name.startswith(kind)]
            end([p.pid for p in processes if p is not None])
        state_file(self.plan).unlink(missing_ok=True)

    def _stop(self, *_: object) -> None:
        self.stopping = True

    def _write(self) -> None:
        me = {"pid": os.getpid(), "created": psutil.Process().create_time()}
        state = {"supervisor": me, "children": {c.name: c.record() for c in self.children}}
        new = state_file(self.plan).with_suffix(".new")
        new.write_text(json.dumps(state, indent=2))
        new.replace(state_file(self.plan))


def end(leaders: list[int], grace: float = GRACE) -> None:
    """End these process groups, each gently first."""
    for pid in leaders:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    until = time.monotonic() + grace
    while time.monotonic() < until and any(_alive(pid) for pid in leaders):
        time.sleep(0.1)
    for pid in leaders:
        end_group(pid, signal.SIGTERM)
    until = time.monotonic() + grace / 2
    while time.monotonic() < until and any(_group_alive(pid) for pid in leaders):
        time.sleep(0.1)
    for pid in leaders:
        end_group(pid, signal.SIGKILL)


def end_group(leader: int, with_signal: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, with_signal)


def _alive(pid: int) -> bool:
    return _status(pid) not in ("", psutil.STATUS_ZOMBIE)


def _status(pid: int) -> str:
    """ "" where there is no such process."""
    try:
        return str(psutil.Process(pid).status())
    except psutil.NoSuchProcess:
        return ""


def _group_alive(leader: int) -> bool:
    try:
        os.killpg(leader, 0)
    except (ProcessLookupError, PermissionError):
        return False
    for process in psutil.process_iter(["status"]):
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(process.pid) == leader and process.info["status"] != "zombie":
                return True
    return False


def state_file(plan: Plan) -> Path:
    return plan.run_directory / "state.json"


def read_state(plan: Plan) -> dict[str, Any]:
    """What runs here, as last written; empty where nothing was started."""
    try:
        state: dict[str, Any] = json.loads(state_file(plan).read_text())
    except (FileNotFoundError, ValueError):  # never written, or lost with the machine's power
        return {}
    return state


def is_running(entry: dict[str, Any]) -> bool:
    """Is this the process that was recorded, and not a later one with the same id?"""
    try:
        process = psutil.Process(entry["pid"])
        same = abs(process.create_time() - entry["created"]) < 1.0
        return bool(same and process.status() != psutil.STATUS_ZOMBIE)
    except (psutil.NoSuchProcess, TypeError, KeyError):
        return False


def main() -> None:
    """Supervise the deployment in this directory, unless a process does already."""
    plan = Plan.load(Path(sys.argv[1]))
    try:
        with FileLock(plan.run_directory / "supervisor.lock", timeout=0):
            Supervisor(plan).run()
    except Timeout:
        sys.exit("a supervisor runs already")


if __name__ == "__main__":
    main()
