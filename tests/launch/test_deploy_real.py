"""A SuperLink and SuperNodes as processes of their own over loopback. Minutes, so marked slow."""

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from fedlora.launch.deploy import host, keys, scripts
from fedlora.launch.deploy.layout import renew
from fedlora.launch.deploy.operator import Operator, environment
from fedlora.launch.deploy.plan import Plan, free_ports
from fedlora.launch.deploy.scripts import DATABASE
from fedlora.launch.deploy.supervise import end, read_state
from tests.support.deployment import adapter, bring_up, mortal, prepared, ran, rounds, simulated

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def deployed(tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plan]:
    from tests.conftest import tiny_settings

    root = tmp_path_factory.mktemp("real")
    given = tiny_settings(tiny, root, "float32", "bert", **{"run.rounds": 2})
    plan = prepared(root / "dep", given, 4)
    mortal(plan)
    bring_up(plan)
    yield plan
    host.down(plan, print)


def test_four_nodes_end_in_the_bytes_of_local_grid(deployed: Plan, tmp_path: Path) -> None:
    """And Prometheus can read how far they are all the while."""
    port, scraped = free_ports(1)[0], []

    def scrape(_: Path) -> None:
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as text:
            scraped.append(text.read().decode())

    status, results = ran(deployed, {"output.metrics-port": port}, scrape)
    assert status == "finished:completed"
    for r in (0, 1):
        assert any(f"fedlora_round {r}.0\n" in text for text in scraped)
    assert any('fedlora_client_seconds{client="3"}' in text for text in scraped)
    assert host.shrink(deployed)
    with closing(sqlite3.connect(deployed.server / DATABASE)) as database:
        for table in ("message_ins", "message_res", "run_objects"):
            assert not database.execute(f"SELECT count(*) FROM {table}").fetchone()[0], table
        assert not database.execute("PRAGMA freelist_count").fetchone()[0]
    local = simulated(deployed, tmp_path)
    assert adapter(results) == adapter(local)
    for far, near in zip(rounds(results), rounds(local), strict=True):
        assert (far["train_loss"], far["bytes"]) == (near["train_loss"], near["bytes"])


def test_the_server_side_killed_twice_ends_in_the_same_bytes(deployed: Plan, tmp_path) -> None:
    """The SuperLink in round 1; the ServerApp in round 2, with half its checkpoint written.

    A run outlives the SuperLink if that is back within Flower's 60 s; else it is resumed.
    """
    order = deployed.server / "killed.json"
    order.write_text('{"point": "half-a-checkpoint", "round": 2}')
    done: list[int] = []

    def strike(results: Path) -> None:
        if len(rounds(results)) == 1 and not done:
            done.append(read_state(deployed)["children"]["superlink"]["pid"])
            os.kill(done[0], signal.SIGKILL)

    status, results = ran(deployed, {"run.name": "struck"}, strike)
    for _ in range(3):
        if status == "finished:completed":
            break
        status, _ = ran(deployed, {"run.name": "struck", "run.resume": True}, strike)
    assert done
    assert not order.exists(), "the ServerApp was killed"
    assert status == "finished:completed"
    assert [r["round"] for r in rounds(results)] == [0, 1, 2]
    assert adapter(results) == adapter(simulated(deployed, tmp_path))


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
    keys.node_key(tmp_path)
    keys.authority(tmp_path, 1.0)  # ca.crt of someone else
    if wrong.startswith("a key"):
        (tmp_path / "ca.crt").write_bytes((deployed.server / "ca.crt").read_bytes())
    else:
        (tmp_path / "node.key").write_bytes((deployed.node(0) / "node.key").read_bytes())
    said = turned_away(deployed, tmp_path)
    assert "activate SuperNode" in said if wrong.startswith("a key") else "certificate" in said
    with Operator(deployed) as operator:
        assert host.online(operator) <= 4


def test_a_node_leaves_a_server_whose_certificate_has_expired(settings, tmp_path: Path) -> None:
    plan = prepared(tmp_path / "dep", settings("bert"), 1)
    renew(plan, -1.0)
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            ["/bin/sh", str(plan.server / "superlink.sh")],
            env=environment(tmp_path / "home"), stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            until = time.monotonic() + 120
            while not listens(plan.port) and time.monotonic() < until:
                time.sleep(0.5)
            assert "certificate has expired" in turned_away(plan, plan.node(0))
        finally:
            end([server.pid], grace=5.0)
            server.wait()


def listens(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def turned_away(plan: Plan, directory: Path) -> str:
    """What a node with the keys in this directory says before it gives up."""
    (directory / "env.sh").write_text(scripts.ENVIRONMENT)
    text = scripts.node(plan, 0).replace(
        f"--port {plan.node_ports[0]}", f"--port {free_ports(1)[0]} --max-retries 3"
    )
    (directory / "node.sh").write_text(text)
    with (directory / "log").open("wb") as log:
        node = subprocess.Popen(
            ["/bin/sh", str(directory / "node.sh")],
            env=environment(directory / "home"), stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            assert node.wait(120) != 0
        finally:
            end([node.pid], grace=1.0)
            node.wait()
    return (directory / "log").read_text()


def test_who_registers_again_finds_the_same_nodes(deployed: Plan) -> None:
    """As after an `up` that was cut short: what the SuperLink has is asked of it."""
    ids = host.registered(deployed)
    path = deployed.run_directory / "registered.json"
    path.unlink()
    with Operator(deployed) as operator:
        host.register(deployed, operator)
    assert len(ids) == 4
    assert host.registered(deployed) == ids


def test_up_again_changes_nothing_and_goes_on_with_one_that_was_cut_short(deployed: Plan) -> None:
    ids, before = host.registered(deployed), read_state(deployed)
    host.up(deployed, print)
    assert read_state(deployed) == before
    (deployed.run_directory / "registered.json").unlink()  # as before the nodes were registered
    host.up(deployed, print)
    assert host.registered(deployed) == ids
    second = subprocess.run(
        [sys.executable, "-m", "fedlora.launch.deploy.supervise", str(deployed.directory)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert second.stderr == "a supervisor runs already\n"
    assert read_state(deployed) == before


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
    assert "run as one user" in found
