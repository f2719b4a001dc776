"""Machines of their own, in network namespaces, over a bad network. Minutes, so marked slow.

The documented way for real machines, to the letter: the scripts, the gate, the operator's commands.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedlora.launch.deploy.operator import environment
from fedlora.launch.deploy.plan import Plan
from fedlora.launch.deploy.supervise import end
from tests.support.deployment import adapter, prepared, rounds, simulated
from tests.support.tiny_federation import ROOT

pytestmark = pytest.mark.slow

DELAY, LOSS, RATE = 0.03, 0.02, 500_000  # s each way, of all packets, bytes/s each way
SERVER, NODES = "10.77.0.1", 2
NAME = f"fedlora{os.getpid()}"


def ip(*words: str, namespace: str = "", may_fail: bool = False) -> bool:
    within = ["-n", namespace] if namespace else []
    done = subprocess.run(["ip", *within, *words], capture_output=True, text=True, check=False)
    assert may_fail or done.returncode == 0, (words, done.stderr)
    return done.returncode == 0


def tc(namespace: str, device: str) -> bool:
    """Put netem on a device. False where the kernel has none."""
    how = f"delay {DELAY * 1000:g}ms loss {LOSS * 100:g}% rate {RATE * 8}bit limit 200"
    words = ["tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "netem", *how.split()]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


def inside(namespace: str, *words: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        ["ip", "netns", "exec", namespace, *words], start_new_session=True, **options
    )


@contextmanager
def machines() -> Iterator[list[str]]:
    """Namespaces of the server and of each node; removed at the end, with all that is in them."""
    if not (shutil.which("ip") and shutil.which("tc") and os.access("/dev/net/tun", os.W_OK)):
        pytest.skip("no ip, no tc or no access to /dev/net/tun")
    names = [f"{NAME}s", *(f"{NAME}n{i}" for i in range(NODES))]
    if not ip("netns", "add", names[0], may_fail=True):
        pytest.skip("network namespaces are not permitted here")
    try:
        for name in names[1:]:
            ip("netns", "add", name)
        for name in names:
            ip("link", "set", "lo", "up", namespace=name)
        yield names
    finally:
        for name in names:
            ip("netns", "del", name, may_fail=True)


@contextmanager
def joined(names: list[str], by: str) -> Iterator[dict[str, int]]:
    """Each node's machine joined to the server's by a bad wire; packets lost, known afterwards."""
    server, wires, counts = names[0], [], {"carried": 0, "lost": 0}
    try:
        for i, node in enumerate(names[1:]):
            near, far = f"to{i}", "server"
            if by == "tc netem":
                ip("link", "add", near, "netns", server, "type", "veth", "peer", "name", far,
                   "netns", node)  # fmt: skip
                if not (tc(server, near) and tc(node, far)):
                    pytest.skip("this kernel has no netem")
            else:
                bad = ["--delay", str(DELAY), "--loss", str(LOSS), "--rate", str(RATE)]
                script = str(ROOT / "tests" / "support" / "wire_between.py")
                command = [sys.executable, script, server, near, node, far, *bad]
                wires.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
                assert wires[-1].stdout.readline() == "ready\n"
            address = f"10.77.0.{10 + i}"
            ip("addr", "add", SERVER, "peer", address, "dev", near, namespace=server)
            ip("addr", "add", address, "peer", SERVER, "dev", far, namespace=node)
            ip("link", "set", near, "up", namespace=server)
            ip("link", "set", far, "up", namespace=node)
        yield counts
        for i in range(NODES) if by == "tc netem" else ():
            words = ["tc", "-n", server, "-s", "-j", "qdisc", "show", "dev", f"to{i}"]
            seen = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)[0]
            counts["carried"] += seen["packets"]
            counts["lost"] += seen["drops"]
    finally:
        for wire in wires:
            wire.send_signal(signal.SIGTERM)
            for key, n in json.loads(wire.communicate(timeout=10)[0] or "{}").items():
                counts[key] += n


def round_trip(namespace: str) -> float:
    """Milliseconds of the fastest of five TCP handshakes with the server."""
    code = (
        "import socket, time\nbest = 9\nfor _ in range(5):\n    t = time.perf_counter()\n"
        f"    socket.create_connection(({SERVER!r}, 9443)).close()\n"
        "    best = min(best, time.perf_counter() - t)\nprint(best * 1000)"
    )
    probe = inside(namespace, sys.executable, "-c", code, stdout=subprocess.PIPE, text=True)
    return float(probe.communicate(timeout=60)[0])


@contextmanager
def started(plan: Plan, names: list[str]) -> Iterator[None]:
    """Every script of the guide on its machine, and the nodes' keys registered."""
    running: list[subprocess.Popen] = []

    def start(namespace: str, script: Path) -> None:
        with script.with_suffix(".log").open("wb") as log:
            home = environment(script.parent / "home")
            running.append(inside(namespace, "sh", str(script), env=home, stdout=log, stderr=log))

    try:
        for name in ("superlink", "superexec", "gate"):
            start(names[0], plan.server / f"{name}.sh")
        until = time.monotonic() + 120
        for i in range(NODES):
            start(names[1 + i], plan.node(i) / "worker.sh")
            register = ("supernode", "register", str(plan.node(i) / "node.pub"), "fedlora",
                        "--name", f"node-{i}")  # fmt: skip
            while not flwr(plan, names[0], *register).get("success"):
                assert time.monotonic() < until, (plan.server / "superlink.log").read_text()
                time.sleep(2)
            start(names[1 + i], plan.node(i) / "node.sh")
        yield
    finally:
        end([p.pid for p in running[::-1]])
        for process in running:
            process.wait()


def flwr(plan: Plan, namespace: str, *words: str) -> dict:
    """What the operator's command answers, asked on the server's machine."""
    home = environment(plan.directory / "operator")
    asked = inside(
        namespace, "flwr", *words, "--format", "json",
        env=home, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    said = asked.communicate(timeout=120)[0]
    try:
        return json.loads(said[said.index("{") :])
    except ValueError:
        return {}


@pytest.mark.parametrize("by", ["tc netem", "a wire of our own"])
def test_two_machines_over_a_bad_network_end_in_the_bytes_of_local_grid(
    settings, tmp_path: Path, by: str
) -> None:
    given = settings("bert", **{"run.rounds": 2, "evaluate.clients": False})
    with machines() as names, joined(names, by) as counts:
        plan = prepared(tmp_path / "dep", given, NODES, host=SERVER)
        with started(plan, names):
            run = str(flwr(plan, names[0], "run", str(plan.app), "fedlora")["run-id"])
            assert round_trip(names[1]) >= 2 * DELAY * 1000 - 1
            status, until = "", time.monotonic() + 300
            while not status.startswith("finished") and time.monotonic() < until:
                time.sleep(5)
                found = flwr(plan, names[0], "list", "fedlora", "--run-id", run)
                status = found["runs"][0]["status"] if found.get("runs") else status
        results = plan.server / "runs" / "run"
        print([r["seconds"]["total"] for r in rounds(results)[1:]], "s a round")
        assert status == "finished:completed", (plan.server / "superexec.log").read_text()[-3000:]
    print(by, counts)
    assert counts["lost"] > 0.01 * counts["carried"] > 1
    assert all(r["accepted"] == [0, 1] for r in rounds(results)[1:])
    assert adapter(results) == adapter(simulated(plan, tmp_path))
