"""nginx with the file that `deploy init` makes, in the place of the gate."""

import http.client
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fedlora.launch.deploy import host, scripts
from fedlora.launch.deploy.layout import Wanted, init
from fedlora.launch.deploy.operator import Operator
from fedlora.launch.deploy.plan import Plan, free_ports
from tests.support.deployment import adapter, bring_up, prepared, ran, simulated

pytestmark = pytest.mark.skipif(shutil.which("nginx") is None, reason="no nginx here")


@dataclass
class Behind:
    """What stands where the SuperLink would, and what reached it."""

    port: int
    secure: Path | None
    seen: list[tuple[str, str, bytes]] = field(default_factory=list)

    @contextmanager
    def serving(self) -> Iterator[None]:
        seen = self.seen

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                seen.append((self.path, self.headers.get("x-sig", ""), body))
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"answer to " + body[:10])

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        if self.secure:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.secure / "server.pem", self.secure / "server.key")
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


@contextmanager
def nginx(plan: Plan) -> Iterator[None]:
    """Started with the file as it is."""
    command = ["nginx", "-p", str(plan.server), "-c", "nginx.conf", "-g", "daemon off;"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 20
        while True:
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", plan.gate_port)) == 0:
                    break
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < until
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.communicate(timeout=20)


def asked(plan: Plan, path: str, body: bytes = b"body") -> tuple[int, bytes]:
    """The answer to a POST as a node sends it, its path to the letter."""
    if plan.secure:
        trust = ssl.create_default_context(cafile=plan.server / "ca.crt")
        line = http.client.HTTPSConnection("localhost", plan.gate_port, context=trust, timeout=30)
    else:
        line = http.client.HTTPConnection("localhost", plan.gate_port, timeout=30)
    try:
        line.request("POST", path, body, {"x-sig": "s"})
        answer = line.getresponse()
        return answer.status, answer.read()
    finally:
        line.close()


@pytest.fixture(params=[True, False], ids=["tls", "plaintext"])
def door(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Plan, Behind]]:
    made = init(Wanted(tmp_path / "far", 1, host="localhost", secure=request.param, own_data=False))
    port, gate = free_ports(2)
    plan = replace(made, port=port, gate_port=gate)
    (plan.server / "nginx.conf").write_text(scripts.nginx(plan))
    behind = Behind(port, plan.server if plan.secure else None)
    with behind.serving(), nginx(plan):
        yield plan, behind


def test_fleet_passes_with_its_headers_and_body(door: tuple[Plan, Behind]) -> None:
    plan, behind = door
    body = b"0123456789" * 700_000  # more than Flower's largest piece
    assert asked(plan, "/v1/fleet/push?a=%2F..b", body) == (200, b"answer to 0123456789")
    assert behind.seen == [("/v1/fleet/push?a=%2F..b", "s", body)]


def test_control_and_every_other_path_are_refused(door: tuple[Plan, Behind]) -> None:
    plan, behind = door
    for path in (
        "/v1/control/start-run", "/v1/runtime/x", "/", "/openapi.json", "/v1/fleet", "/v1/fleetx",
        "/v1/fleet/../control/x", "/v1/fleet/%2e%2e/control/x", "/v1/control/%2e%2e/fleet/x",
        "/v1/control/x/../../fleet/y", "/v1/fleet//control", "//v1/fleet/x", "/V1/fleet/x",
        "/v1%2fcontrol/x", "/v1/fleet/..%2fcontrol",
    ):  # fmt: skip
        assert asked(plan, path)[0] == 403, path
    assert behind.seen == []


def test_a_body_over_the_limit_is_refused(door: tuple[Plan, Behind]) -> None:
    plan, behind = door
    line = socket.create_connection(("localhost", plan.gate_port))
    if plan.secure:
        trust = ssl.create_default_context(cafile=plan.server / "ca.crt")
        line = trust.wrap_socket(line, server_hostname="localhost")
    with line:
        length = 64 * 2**20 + 1
        line.sendall(
            f"POST /v1/fleet/push HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n"
            .encode()
        )  # fmt: skip
        assert b" 413 " in line.recv(200)
    assert behind.seen == []


@pytest.mark.slow
def test_a_deployment_whose_nodes_come_through_nginx_ends_in_the_bytes_of_local_grid(
    settings, tmp_path: Path
) -> None:
    """The SuperLink itself behind it, which refuses none of Control on its own loopback."""
    given = settings("bert", **{"run.rounds": 2, "evaluate.clients": False})
    plan = prepared(tmp_path / "dep", given, 2)
    gate = free_ports(1)[0]
    (plan.server / "nginx.conf").write_text(scripts.nginx(replace(plan, gate_port=gate)))
    for i in range(plan.clients):
        script = plan.node(i) / "node.sh"
        text = script.read_text()
        assert plan.fleet_address in text
        script.write_text(text.replace(plan.fleet_address, f"localhost:{gate}"))
    far = replace(plan, gate_port=gate)
    with nginx(far):
        bring_up(plan)
        try:
            with Operator(plan):
                assert asked(far, "/v1/control/list-runs")[0] == 403
            status, run = ran(plan)
        finally:
            host.down(plan, print)
    assert status == "finished:completed"
    assert adapter(run) == adapter(simulated(plan, tmp_path))
    assert "/v1/fleet/" in (plan.server / "nginx-access.log").read_text()
