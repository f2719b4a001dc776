"""Certificates that end soon are spoken of in time, by everybody who can act on it."""

import re
import shlex
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedlora.cli import app
from fedlora.errors import DeployError
from fedlora.launch.deploy import endure, expiry, host, keys, node
from fedlora.launch.deploy.layout import renew
from fedlora.launch.deploy.plan import Plan
from tests.support.deployment import prepared


@pytest.fixture
def plan(settings, tmp_path: Path) -> Plan:
    return prepared(tmp_path / "a dep", settings("bert"), 1, days=365.0)


def test_thirty_days_before_the_end_it_is_said_with_the_command_that_renews(plan: Plan) -> None:
    assert [*expiry.warnings(plan)] == []
    renew(plan, 31.0)
    assert [*expiry.warnings(plan)] == []
    renew(plan, 29.5)
    (line,) = expiry.warnings(plan)
    assert "the server's certificate ends in 29 days" in line
    command = re.search("`fedlora (deploy renew [^`]*)`", line)
    assert command
    assert CliRunner().invoke(app, shlex.split(command[1])).exit_code == 0
    assert [*expiry.warnings(plan)] == [], "as it said"


def test_one_that_has_ended_is_said_too_and_so_is_the_authoritys(plan: Plan) -> None:
    renew(plan, -1.0)
    assert "has ended" in next(iter(expiry.warnings(plan)))
    renew(plan, 365.0)
    keys.authority(plan.server, 3.0)  # over ca.crt
    (line,) = expiry.warnings(plan)
    assert "the authority's certificate ends in 2 days" in line
    assert [*expiry.warnings(replace(plan, secure=False))] == []


def test_up_run_and_status_say_it(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    renew(plan, 5.0)
    status = CliRunner().invoke(app, ["deploy", "status", str(plan.directory)])
    assert "ends in 4 days" in status.output
    said: list[str] = []

    def nothing(*_: object) -> None:
        raise DeployError("no further")

    monkeypatch.setattr(endure, "start_run", nothing)
    with pytest.raises(DeployError, match="no further"):
        endure.run(plan, None, {}, 0, said.append)  # type: ignore[arg-type]
    assert "ends in 4 days" in said[0]
    said.clear()
    monkeypatch.setattr(host, "_supervise", lambda _: None)
    monkeypatch.setattr(host, "healthy", lambda _: True)
    monkeypatch.setattr(host, "register", lambda *_: None)
    monkeypatch.setattr(host, "revoked", lambda *_: [])
    monkeypatch.setattr(host, "online", lambda _: 1)
    host.up(plan, said.append)
    assert "ends in 4 days" in said[-1]


@pytest.fixture
def server(plan: Plan) -> Iterator[str]:
    """A server that shows the deployment's certificate, as it is at each greeting."""
    listening = socket.create_server(("127.0.0.1", 0))

    def greet() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(plan.server / "server.pem", plan.server / "server.key")
            with suppress(OSError), context.wrap_socket(connection, server_side=True):
                pass

    thread = threading.Thread(target=greet)
    thread.start()
    yield f"127.0.0.1:{listening.getsockname()[1]}"
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()
    thread.join()


def test_a_node_says_it_of_the_server_it_is_connected_to(
    plan: Plan, server: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ca = plan.node(0) / "ca.crt"
    assert [*expiry.of_server(server, ca)] == []
    renew(plan, 9.5)
    (line,) = expiry.of_server(server, ca)
    assert f"the certificate of {server} ends in 9 days" in line
    assert "`fedlora deploy renew`" in line
    keys.authority(tmp := plan.directory, 3.0)
    assert any(
        "the authority's, ends in 2 days" in x for x in expiry.of_server(server, tmp / "ca.crt")
    )
    assert [*expiry.of_server("127.0.0.1:1", ca)] == [], "nobody is there"

    found: list[tuple[str, Path]] = []
    monkeypatch.setattr(node, "keep_warning", lambda *a: found.append(a))
    monkeypatch.setattr(node, "check_flower", lambda: None)
    monkeypatch.setattr(node, "_guarded", lambda *_: None)

    class Started:
        def load(self) -> object:
            raise SystemExit

    monkeypatch.setattr(node, "entry_points", lambda **_: [Started()])
    given = ["node", "--root-certificates", "ca.crt", "--superlink", server, "--port", "1"]
    monkeypatch.setattr("sys.argv", given)
    with pytest.raises(SystemExit):
        node.main()
    assert found == [(server, Path("ca.crt"))]


def test_a_node_looks_again_every_day(plan: Plan, server: str, capfd, monkeypatch) -> None:
    renew(plan, 9.5)
    assert expiry.DAY == 24 * 3600
    monkeypatch.setattr(expiry, "DAY", 0.1)
    over, said, end = (
        expiry.keep_warning(server, plan.node(0) / "ca.crt"),
        "",
        time.monotonic() + 20,
    )
    while said.count("ends in 9 days") < 3 and time.monotonic() < end:
        time.sleep(0.1)
        said += capfd.readouterr().err
    over.set()
    assert said.count("ends in 9 days") >= 3
