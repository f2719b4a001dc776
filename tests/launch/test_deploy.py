"""A deployment's directory, its keys, its door, its supervisor and its worker: without Flower."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from fedlora.config.members import Members
from fedlora.config.policy import Policy
from fedlora.config.reader import Config
from fedlora.errors import DeployError
from fedlora.launch.deploy import host, keys
from fedlora.launch.deploy.gate import Gate
from fedlora.launch.deploy.host import down, follow, register, registered, shrink, start_run, up
from fedlora.launch.deploy.layout import Wanted, init, renew
from fedlora.launch.deploy.plan import Plan, free_ports
from fedlora.launch.deploy.scripts import DATABASE
from fedlora.launch.deploy.supervise import _group_alive, is_running, read_state


@pytest.fixture
def plan(settings, tmp_path: Path) -> Plan:
    given = {k: v for k, v in settings().items() if k != "clients.count"}
    wanted = Wanted(tmp_path / "dep", 3, overrides=given, ranks=(2, 4), one_host_trial=True)
    return init(wanted)


def test_the_space_of_a_deleted_runs_messages_is_given_back(plan: Plan) -> None:
    """While the SuperLink has the file open; a file that stays busy is left as it is."""
    path = plan.server / DATABASE
    with closing(sqlite3.connect(path, isolation_level=None)) as link:
        link.execute("CREATE TABLE message (content BLOB)")
        link.executemany("INSERT INTO message VALUES (?)", [(os.urandom(100_000),)] * 20)
        link.execute("DELETE FROM message")
        assert path.stat().st_size > 2_000_000
        link.execute("BEGIN IMMEDIATE")
        assert not shrink(plan, patience=0.1)
        link.execute("ROLLBACK")
        assert path.stat().st_size > 2_000_000
        assert shrink(plan)
    assert path.stat().st_size < 100_000


# -- the directory ------------------------------------------------------------------------------


def test_a_deployment_holds_no_nodes_private_key_but_in_a_trial_on_one_host(
    plan: Plan, tmp_path: Path
) -> None:
    def private(made: Plan) -> set[str]:
        return {p.name for p in (made.directory / "nodes").rglob("*.key")}

    far = init(Wanted(tmp_path / "far", 2, host="server.example.org", own_data=False))
    assert private(far) == set()
    assert private(plan) == {"node.key", "member.key"}
    assert "honest but curious" in (plan.directory / "README.md").read_text()
    assert "fedlora node init /opt/fedlora/node-0" in (far.directory / "README.md").read_text()
    with pytest.raises(DeployError, match=r"node 0 has no keys.*fedlora node init"):
        up(far, print)
    lists = [Members.load(plan.node(i) / "members.toml") for i in range(3)]
    assert [*(lists[0].listed or {})] == [0, 1, 2]
    assert lists[0] == lists[1] == lists[2]


def test_secrets_are_readable_by_their_owner_alone(plan: Plan) -> None:
    secret = [*plan.directory.rglob("*.key")]
    assert len(secret) == 1 + 1 + 2 * plan.clients  # authority, server, nodes
    for path in secret:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(plan.node(0).stat().st_mode) == 0o700
    assert "umask 077" in (plan.server / "env.sh").read_text()
    assert not list((plan.node(0)).rglob("ca.key")), "a node has no use for the authority's key"
    assert not list(plan.server.rglob("ca.key"))


def test_tls_and_node_keys_are_on_unless_told_otherwise(plan: Plan, tmp_path: Path) -> None:
    link, node = (plan.server / "superlink.sh").read_text(), (plan.node(1) / "node.sh").read_text()
    assert "--enable-supernode-auth" in link
    assert "--ssl-keyfile" in link
    assert "--auth-supernode-private-key node.key" in node
    assert not any("--insecure" in p.read_text() for p in plan.directory.rglob("*.sh"))
    bare = init(Wanted(tmp_path / "bare", 1, secure=False, own_data=False))
    assert "--insecure" in (bare.server / "superlink.sh").read_text()
    assert not list(bare.directory.rglob("*.key"))


def test_control_is_never_beyond_loopback(tmp_path: Path) -> None:
    far = init(Wanted(tmp_path / "far", 1, host="server.example.org", own_data=False))
    assert "--host 127.0.0.1 " in (far.server / "superlink.sh").read_text()
    assert f"server.example.org:{far.gate_port}" in (far.node(0) / "node.sh").read_text()
    nginx = (far.server / "nginx.conf").read_text()
    assert nginx.index("location /v1/fleet/") < nginx.index("location / { return 403; }")


def test_each_node_has_its_own_rank_rows_and_memory(plan: Plan) -> None:
    from fedlora.training import cache

    config = app_config(plan)
    shared = config.model_copy(deep=True)
    for i in range(3):
        script = (plan.node(i) / "node.sh").read_text()
        assert f'partition-id={i} num-partitions=3 policy=\\"$PWD/node.toml\\"' in script
        policy = Policy.load(plan.node(i) / "node.toml")
        assert policy.model.rank == (2, 4, 2)[i]
        assert policy.memory == plan.node(i) / "memory"
        assert policy.data.path == str(plan.node(i) / "data")
        given = {**config.flat(), "data.node-path": str(plan.node(i) / "data")}
        labels = cache.corpus(config).labels
        own = cache.client_rows(i, Config.read(given), labels)
        assert own == cache.client_rows(i, shared, labels), (
            "the rows a simulation gives it, in order"
        )


def app_config(plan: Plan) -> Config:
    tree = tomllib.loads((plan.app / "pyproject.toml").read_text())
    return Config.read(tree["tool"]["flwr"]["app"]["config"])


def test_the_app_carries_the_experiment_and_the_apps_of_the_library(plan: Plan) -> None:
    config = app_config(plan)
    assert config.clients.count == 3
    assert config.clients.ranks == (2, 4)
    assert config.train.lr == 0.05
    for package in ("server_app", "client_app"):  # as `flwr run` takes them from the repository
        here = (Path(__file__).parents[2] / package / "app.py").read_text()
        assert (plan.app / package / "app.py").read_text() == here


def test_a_directory_in_use_is_left_alone(plan: Plan) -> None:
    with pytest.raises(DeployError, match="is not empty"):
        init(Wanted(plan.directory, 2))


def test_a_directory_without_a_deployment_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DeployError, match="fedlora deploy init"):
        Plan.load(tmp_path)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_takes_the_units_without_a_word(plan: Plan) -> None:
    units = [*plan.server.glob("*.service"), *plan.node(0).glob("*.service")]
    assert len(units) == 5
    done = subprocess.run(
        ["systemd-analyze", "verify", *map(str, units)], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("", "")
    for name in ("fedlora-node", "fedlora-worker"):
        text = (plan.node(0) / f"{name}.service").read_text()
        for own in ("node.key", "node.toml", "node.sh", "env.sh"):
            assert f"ReadOnlyPaths=-/opt/fedlora/node-0/{own}\n" in text
    for unit in units:
        told = subprocess.run(
            ["systemd-analyze", "security", "--offline=true", "--threshold=20", str(unit)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert told.returncode == 0, f"its exposure is above 2.0 of 10:\n{told.stdout}"


def composed(plan: Plan) -> dict[str, dict]:
    text = (plan.directory / "compose.yaml").read_text()
    return json.loads(text[text.index("{\n") :])["services"]


def test_compose_keeps_control_inside_and_registers_the_nodes(plan: Plan) -> None:
    services = composed(plan)
    names = {"superlink", "superexec", "gate", "register", "operator", "node-0", "node-2"}
    assert set(services) >= names | {"worker-2"}
    for name in ("superexec", "gate", "register", "operator"):
        assert services[name]["network_mode"] == "service:superlink"
    assert not any("ports" in service for service in services.values())
    assert services["register"]["command"][-1] == f"fedlora deploy register {plan.quoted}"
    assert all(services[f"worker-{i}"]["network_mode"] == "none" for i in range(3))


def test_a_container_reads_the_experiments_files_and_writes_its_own_part_alone(plan: Plan) -> None:
    model = app_config(plan).model.path
    for name, service in composed(plan).items():
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["user"].split(":")[0] != "0"
        writable = [v for v in service["volumes"] if not v.endswith(":ro")]
        own = plan.directory
        if name.startswith(("node-", "worker-")):
            own = plan.node(int(name[-1]))
        elif name not in ("register", "operator"):
            own = plan.server
        assert [v.partition(":")[2] for v in writable] == [str(own)]
        assert (f"{model}:{model}:ro" in service["volumes"]) == (own != plan.directory)


def test_no_name_of_the_container_files_is_anyones_to_register(plan: Plan) -> None:
    """The image is this host's, and fedlora comes from a file beside the recipe."""
    assert {service["image"] for service in composed(plan).values()} == {"localhost/fedlora"}
    recipe = (plan.directory / "image" / "Dockerfile").read_text()
    assert "COPY *.whl constraints.txt" in recipe
    assert "pip install" in recipe
    assert not re.search(r"pip install[^&]*\bfedlora\b", recipe.replace("/opt/fedlora", ""))
    pinned = (plan.directory / "image" / "constraints.txt").read_text()
    assert re.search(r"^flwr==", pinned, re.MULTILINE)


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="no docker-compose here")
def test_docker_compose_takes_the_file(plan: Plan) -> None:
    told = subprocess.run(
        ["docker-compose", "-f", str(plan.directory / "compose.yaml"), "config", "-q"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (told.returncode, told.stdout, told.stderr) == (0, "", "")


# -- keys ---------------------------------------------------------------------------------------


def test_flower_takes_the_node_keys(plan: Plan) -> None:
    from flwr.cli.supernode.register import try_load_public_key

    found = {try_load_public_key(plan.node(i) / "node.pub") for i in range(3)}
    assert len(found) == 3


@pytest.fixture
def server(plan: Plan) -> Iterator[int]:
    """A TLS server with the deployment's certificate; its port. Closes what it accepts."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(10)

    def serve() -> None:
        while True:
            try:
                raw, _ = listener.accept()
            except OSError:
                return
            context.load_cert_chain(plan.server / "server.pem", plan.server / "server.key")
            try:
                context.wrap_socket(raw, server_side=True).close()
            except OSError:
                raw.close()

    thread = threading.Thread(target=serve)
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


def greet(port: int, ca: Path, name: str = "localhost") -> None:
    context = ssl.create_default_context(cafile=ca)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    with socket.create_connection(("127.0.0.1", port)) as raw:
        context.wrap_socket(raw, server_hostname=name).close()


def test_the_certificate_holds_for_its_names_and_its_authority_only(plan, server, tmp_path) -> None:
    greet(server, plan.server / "ca.crt")
    greet(server, plan.server / "ca.crt", "127.0.0.1")
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        greet(server, plan.server / "ca.crt", "other.example.org")
    keys.authority(tmp_path, 1.0)
    with pytest.raises(ssl.SSLCertVerificationError, match=r"signature|issuer|self"):
        greet(server, tmp_path / "ca.crt")


def test_an_expired_certificate_is_refused_and_renewed(plan: Plan, server: int) -> None:
    renew(plan, -1.0)
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        greet(server, plan.server / "ca.crt")
    renew(plan, 1.0)
    greet(server, plan.server / "ca.crt")


# -- the gate -----------------------------------------------------------------------------------


def through_the_gate(method: str, path: str, body: bytes = b"", limit: int = 1000):
    seen: list[httpx.Request] = []

    async def upstream(request: httpx.Request) -> httpx.Response:
        await request.aread()
        seen.append(request)

        async def parts():
            yield b"answer to "
            yield request.content

        return httpx.Response(200, content=parts(), headers={"x-a": "b"})

    async def ask() -> httpx.Response:
        behind = httpx.AsyncClient(
            base_url="https://up", transport=httpx.MockTransport(upstream), trust_env=False
        )
        async with (
            behind,
            httpx.AsyncClient(
                base_url="https://gate", transport=httpx.ASGITransport(Gate(behind, limit))
            ) as client,
        ):
            return await client.request(method, path, content=body, headers={"x-sig": "s"})

    return asyncio.run(ask()), seen


def test_the_gate_passes_fleet_with_its_headers_and_body() -> None:
    answer, seen = through_the_gate("POST", "/v1/fleet/pull?a=b", b"body")
    assert (answer.status_code, answer.content, answer.headers["x-a"]) == (
        200,
        b"answer to body",
        "b",
    )
    assert seen[0].url.path == "/v1/fleet/pull"
    assert seen[0].url.query == b"a=b"
    assert seen[0].headers["x-sig"] == "s"


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/runtime/x",
        "/openapi.json",
        "/",
        "/v1/fleet/../control/x",
        "/v1/fleet/%2e%2e/control/x",
        "/v1/fleet//control",
        "//v1/fleet/x",
        "/v1/fleetx",
        "/V1/fleet/x",
    ],
)
def test_the_gate_passes_nothing_else(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    answer, seen = through_the_gate("POST", path)
    assert (answer.status_code, seen) == (403, [])
    assert "refused POST" in capsys.readouterr().out


def test_the_gate_refuses_an_oversized_message() -> None:
    answer, seen = through_the_gate("POST", "/v1/fleet/push", b"x" * 1001)
    assert (answer.status_code, seen) == (413, [])


# -- registering --------------------------------------------------------------------------------


class Stub:
    """Stands for `flwr`: it gives each key that is registered the next number."""

    def __init__(self, known: dict[str, str], after: int = 99) -> None:
        self.known, self.after = known, after

    def keys(self) -> dict[str, str]:
        return dict(self.known)

    def __call__(self, *arguments: str) -> dict[str, str]:
        if len(self.known) >= self.after:
            raise DeployError("`flwr supernode register`: Public key already in use.")
        key = keys.pem(Path(arguments[2]))
        assert key not in self.known
        self.known[key] = str(len(self.known) + 1)
        return {"node-id": self.known[key]}


@pytest.mark.parametrize("forget", [False, True])
def test_an_up_that_was_cut_short_registers_the_rest_and_keeps_the_ids(
    plan: Plan, forget: bool
) -> None:
    """Also of a key that was registered just before, and whose id was not on record yet."""
    plan.run_directory.mkdir(exist_ok=True)
    known: dict[str, str] = {}
    with pytest.raises(DeployError, match="already in use"):  # its words excuse nothing
        register(plan, Stub(known, after=2))
    assert registered(plan) == {"node-0": "1", "node-1": "2"}
    if forget:
        (plan.run_directory / "registered.part").unlink()
    register(plan, Stub(known))
    assert registered(plan) == {"node-0": "1", "node-1": "2", "node-2": "3"}


# -- the supervisor -----------------------------------------------------------------------------


@pytest.fixture
def stand_ins(tmp_path: Path) -> Iterator[Plan]:
    """A deployment whose programs are shell scripts that sleep."""
    ports = free_ports(2)
    plan = Plan(tmp_path, 1, (2,), port=ports[0], node_ports=ports[1:], node_restart=0.5)
    for path in (plan.server, plan.node(0), plan.run_directory):
        path.mkdir(parents=True)
    for name in (
        "server/superlink",
        "server/superexec",
        "nodes/node-0/worker",
        "nodes/node-0/node",
    ):
        Path(tmp_path, f"{name}.sh").write_text("sleep 1000 & echo started; wait\n")
    (plan.run_directory / "registered.json").write_text("{}")
    plan.save()
    me = subprocess.Popen([sys.executable, "-m", "fedlora.launch.deploy.supervise", str(tmp_path)])
    yield plan
    down(plan, lambda _: None)
    me.wait(20)


def until(done, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.05)


def child(plan: Plan, name: str) -> dict:
    return read_state(plan).get("children", {}).get(name, {})


def test_what_dies_is_started_again_and_down_ends_exactly_what_was_started(stand_ins) -> None:
    until(lambda: all(is_running(child(stand_ins, n)) for n in ("superlink", "node-0", "worker-0")))
    first = child(stand_ins, "node-0")
    os.kill(first["pid"], signal.SIGKILL)
    until(lambda: child(stand_ins, "node-0").get("restarts") == 1)
    again = child(stand_ins, "node-0")
    assert again["pid"] != first["pid"]
    assert again["last_exit"] == -signal.SIGKILL
    everyone = [c["pid"] for c in read_state(stand_ins)["children"].values()]
    down(stand_ins, lambda _: None)
    for pid in everyone:
        assert not _group_alive(pid), "nor is anything left that they had started"
    assert read_state(stand_ins) == {}


def test_down_ends_what_a_killed_supervisor_left(stand_ins: Plan) -> None:
    until(lambda: is_running(child(stand_ins, "node-0")))
    state = read_state(stand_ins)
    os.kill(state["supervisor"]["pid"], signal.SIGKILL)
    until(lambda: not is_running(state["supervisor"]))
    said: list[str] = []
    down(stand_ins, said.append)
    assert "4 processes" in said[0]
    assert not any(is_running(c) for c in state["children"].values())


def test_who_waits_is_told_for_what_before_ten_seconds_are_over(
    tmp_path: Path, monkeypatch
) -> None:
    """`up` for its SuperLink and nodes, and `down` for the processes that it ends."""
    now, said = [0.0], []
    monkeypatch.setattr(host, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=passes(now)))
    monkeypatch.setattr(host, "healthy", lambda plan: False)
    plan = Plan(tmp_path, 1, (2,), secure=False)
    with pytest.raises(DeployError, match="the SuperLink did not come up in time"):
        host.register_all(plan, lambda line: said.append((now[0], line)), timeout=60)
    assert "waiting for the SuperLink" in said[0][1]
    assert max(b - a for a, b in pairwise([0.0, *(t for t, _ in said), now[0]])) < 10


def passes(now: list[float]) -> Callable[[float], None]:
    """Sleeps, on a clock of its own, and what a question to the SuperLink takes."""

    def sleep(seconds: float) -> None:
        now[0] += seconds + 0.5

    return sleep


def test_a_process_of_the_same_number_is_not_mistaken_for_ours() -> None:
    assert not is_running({"pid": os.getpid(), "created": 1.0})


# -- runs ---------------------------------------------------------------------------------------


def test_a_second_run_of_a_name_says_what_to_do_and_sends_nothing(plan: Plan) -> None:
    results = plan.server / "runs" / "run"
    results.mkdir(parents=True)
    (results / "rounds.jsonl").touch()
    for state in ("not finished", "finished"):
        with pytest.raises(
            DeployError, match=rf"a run of this name, {state}: .* --resume` goes on"
        ) as said:
            start_run(plan, nobody, {})
        assert "\n" not in str(said.value)
        (results / "summary.json").touch()
    plan.run_directory.mkdir()
    for more in ({"run.name": "another"}, {"run.resume": True}):
        with pytest.raises(AssertionError, match="was sent"):
            start_run(plan, nobody, more)


def nobody(*arguments: str) -> dict:
    raise AssertionError(f"{arguments[0]} was sent")


def test_a_run_says_what_it_is_at_from_the_first_second(tmp_path: Path) -> None:
    statuses = iter(["pending", "running", "running", "finished:completed"])
    said: list[str] = []

    class Told:
        def status(self, run_id: str) -> str:
            assert said, "before anything was asked"
            return next(statuses)

    assert follow(Told(), "1", tmp_path, said.append, every=0.0) == "finished:completed"
    assert len(said) == 2
    assert said[0].startswith("0 s: pending")
    assert "running" in said[1]


def test_a_run_is_never_silent_for_ten_seconds(tmp_path: Path, monkeypatch) -> None:
    statuses = iter(["pending"] * 20 + ["running"] * 40 + ["finished:completed"])
    now, heard = [0.0], []
    monkeypatch.setattr(host, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=passes(now)))
    asked = SimpleNamespace(status=lambda run_id: next(statuses))
    follow(asked, "1", tmp_path, lambda _: heard.append(now[0]))
    assert max(b - a for a, b in pairwise([0.0, *heard, now[0]])) < 10


def test_after_the_last_round_no_other_is_announced(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[run]\nrounds = 1\n")
    line = {"round": 0, "accepted": [], "cohort": [], "failures": [], "seconds": {"total": 1.0}}
    said: list[str] = []
    statuses = iter(["running", "waiting", "finished:completed"])

    def ran(run_id: str) -> str:
        status = next(statuses)
        if status == "waiting":
            lines = (json.dumps({**line, "round": r}) + "\n" for r in range(2))
            (tmp_path / "rounds.jsonl").write_text("".join(lines))
        return status

    follow(SimpleNamespace(status=ran), "1", tmp_path, said.append, every=0.0)
    assert "running, before round 1" in said[1]
    assert "waiting, after the last round" in said[-1]
