"""A SuperLink and SuperNodes as processes of their own over loopback. Minutes, so marked slow."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from deployment import adapter, brought_up, ran, rounds, simulated

from fedlora.deploy import host, keys, scripts
from fedlora.deploy.operator import environment
from fedlora.deploy.plan import Plan
from fedlora.deploy.supervise import end, read_state

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def deployed(tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plan]:
    from conftest import settings

    root = tmp_path_factory.mktemp("real")
    given = settings._get_wrapped_function()(tiny, root)("bert", **{"run.rounds": 2})
    plan = brought_up(root / "dep", given, 4)
    yield plan
    host.down(plan, print)


def test_four_nodes_end_in_the_bytes_of_local_grid(deployed: Plan, tmp_path: Path) -> None:
    status, results = ran(deployed)
    assert status == "finished:completed"
    local = simulated(deployed, tmp_path)
    assert adapter(results) == adapter(local)
    for far, near in zip(rounds(results), rounds(local), strict=True):
        assert (far["train_loss"], far["bytes"]) == (near["train_loss"], near["bytes"])


def test_the_server_side_killed_twice_ends_in_the_same_bytes(deployed: Plan, tmp_path) -> None:
    """The SuperLink is killed in round 1, the ServerApp in round 2.

    A run outlives the SuperLink if that is back within Flower's 60 s; else it is resumed.
    """
    done: set[str] = set()

    def strike(results: Path) -> None:
        seen = len(rounds(results))
        if seen == 1 and "superlink" not in done:
            os.kill(read_state(deployed)["children"]["superlink"]["pid"], signal.SIGKILL)
            done.add("superlink")
        if seen == 2 and "serverapp" not in done:
            for pid in serverapps(deployed):
                os.kill(pid, signal.SIGKILL)
                done.add("serverapp")

    status, results = ran(deployed, {"run.name": "struck"}, strike)
    for _ in range(3):
        if status == "finished:completed":
            break
        status, _ = ran(deployed, {"run.name": "struck", "run.resume": True}, strike)
    assert done == {"superlink", "serverapp"}
    assert status == "finished:completed"
    assert [r["round"] for r in rounds(results)] == [0, 1, 2]
    assert adapter(results) == adapter(simulated(deployed, tmp_path))


def serverapps(plan: Plan) -> list[int]:
    """Processes of ours that run a ServerApp of this deployment."""
    import psutil

    leader = read_state(plan)["children"]["superexec"]["pid"]
    below = psutil.Process(leader).children(recursive=True)
    return [p.pid for p in below if any("flwr-serverapp" in part for part in p.cmdline())]


def test_a_node_killed_in_a_round_costs_its_reply_and_comes_back(deployed: Plan) -> None:
    done: list[int] = []

    def strike(results: Path) -> None:
        if len(rounds(results)) == 1 and not done:
            child = read_state(deployed)["children"]["node-3"]
            os.killpg(child["pid"], signal.SIGKILL)
            done.append(child["pid"])

    more = {"run.name": "node-killed", "run.rounds": 2, "round.deadline": 150.0}
    status, results = ran(deployed, more, strike)
    assert status == "finished:completed"
    first = rounds(results)[1]
    assert [f["client"] for f in first["failures"]] in ([3], [])
    assert set(first["accepted"]) >= {0, 1, 2}
    child = read_state(deployed)["children"]["node-3"]
    assert child["restarts"] >= 1
    assert child["pid"] not in done


@pytest.mark.parametrize("wrong", ["a key that is not on the list", "an authority of its own"])
def test_a_stranger_is_refused_and_harms_nothing(deployed: Plan, tmp_path: Path, wrong) -> None:
    from fedlora.deploy.plan import free_ports

    keys.node_key(tmp_path)
    keys.authority(tmp_path, 1.0)  # ca.crt of someone else
    if wrong.startswith("a key"):
        (tmp_path / "ca.crt").write_bytes((deployed.server / "ca.crt").read_bytes())
    else:
        (tmp_path / "node.key").write_bytes((deployed.node(0) / "node.key").read_bytes())
    (tmp_path / "env.sh").write_text(scripts.ENVIRONMENT)
    text = scripts.node(deployed, 0).replace(
        f"--port {deployed.node_ports[0]}", f"--port {free_ports(1)[0]} --max-retries 1"
    )
    (tmp_path / "node.sh").write_text(text)
    with (tmp_path / "log").open("wb") as log:
        stranger = subprocess.Popen(
            ["/bin/sh", str(tmp_path / "node.sh")],
            env=environment(tmp_path / "home"),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            assert stranger.wait(120) != 0
        finally:
            end([stranger.pid], grace=1.0)
    said = (tmp_path / "log").read_text()
    assert (
        "activate SuperNode" in said or "CERTIFICATE_VERIFY_FAILED" in said or "certificate" in said
    )
    from fedlora.deploy.operator import Operator

    with Operator(deployed) as operator:
        assert host.online(operator) <= 4


def test_status_names_every_process_and_node(deployed: Plan) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "fedlora.cli", "deploy", "status", str(deployed.directory)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "160"},
    ).stdout
    for name in ("supervisor", "superlink", "superexec", "worker-3", "node-3"):
        assert name in found
    assert "online" in found
