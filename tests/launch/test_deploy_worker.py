"""The warm worker: the same bytes, and an error reply whatever becomes of it."""

import os
import socket
import stat
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from flwr.app import Error, Message, RecordDict

from fedlora.config.reader import Config
from fedlora.errors import BudgetSpent, PrivacyError, TrainingCheckError
from fedlora.federation.client.dispatch import pack
from fedlora.federation.client.frames import frames
from fedlora.federation.wire.codes import Code
from fedlora.federation.wire.job import Job
from fedlora.launch.client_app import answer
from fedlora.launch.deploy import node, worker
from fedlora.launch.deploy.plan import free_ports
from fedlora.launch.deploy.worker_figures import served
from fedlora.training import cache


def test_the_short_lived_process_imports_no_torch() -> None:
    code = (
        "import sys, client_app.app, fedlora.launch.deploy.message_process; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sockets are named relative to it: their paths are short, and pytest's are long."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def warm(directory: Path) -> Iterator[str]:
    assert directory == Path.cwd()
    server = worker.serve(Path("w.sock"))
    yield "w.sock"
    server.stop(None).wait()


def final_bytes(settings, name: str, socket: str = "", **node: object) -> bytes:
    from client_app.app import app
    from fedlora.config.reader import Config
    from fedlora.federation.server.loop import FederatedLora
    from fedlora.launch.simulate.grid import LocalGrid

    config = Config.read(settings(**{"run.name": name, "run.rounds": 2}))
    own = {"worker-socket": socket, **node}
    nodes = dict.fromkeys(range(config.clients.count), own) if socket else None
    with LocalGrid(app, config.clients.count, config.flat(), 1, nodes) as grid:
        server = FederatedLora(config)
        server.start(grid)
    return (server.setting.journal.directory / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_federation_through_a_worker_ends_in_the_same_bytes(settings, warm: str) -> None:
    assert final_bytes(settings, "warm", warm) == final_bytes(settings, "alone")


def test_the_socket_is_its_owners_alone(warm: str) -> None:
    assert stat.S_IMODE(os.stat(warm).st_mode) & 0o077 == 0


# -- what it holds, and says of itself ------------------------------------------------------------


@pytest.mark.slow
def test_an_idle_worker_gives_its_card_back_and_loads_the_same_bits_again(
    settings, cards, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the card's own count, after each message of a run whose server is on the host."""
    given = {"simulate.devices": "cpu", "model.attention": "eager", "model.dropout": 0.0}
    given |= {"train.steps": 1, "data.limit": 60, "strategy.name": "fedex", "clients.ranks": "2,3"}
    given["clients.count"] = 2
    alone = final_bytes(partial(settings, **given), "alone")
    seen: list[tuple[int, int]] = []
    real = worker.Worker.answer

    def then_idle(self: worker.Worker, stream: Iterator[bytes], call: object) -> Iterator[bytes]:
        """With nothing to do for an hour after each message."""
        yield from real(self, stream, call)
        before = cards[1].used
        self.ended -= 3600.0
        self.release_if_idle()
        seen.append((before, cards[1].used))

    monkeypatch.setattr(worker.Worker, "answer", then_idle)
    server = worker.serve(Path("w.sock"), worker.Worker(idle_release=3600.0))
    try:
        idle = final_bytes(partial(settings, **given), "idle", "w.sock", devices="pretend:1")
    finally:
        server.stop(None).wait()
    assert idle == alone
    held = [before for before, _ in seen if before]
    assert len(held) >= 4, "two clients in two rounds, each of which loaded it"
    assert {after for _, after in seen} == {0}


def test_the_base_is_let_go_of_after_so_long_without_a_message_and_not_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gone: list[float] = []
    monkeypatch.setattr(cache, "forget_model", lambda: gone.append(time.monotonic()))

    class Call:
        def add_callback(self, _: object) -> bool:
            return True

    patient = worker.Worker(idle_release=0.6)
    reply = Message(Error(0), reply_to=a_message()[0])
    patient._reply = lambda _: reply  # type: ignore[method-assign]
    for _ in range(4):
        assert [*patient.answer(iter(()), Call())]
        time.sleep(0.3)
    assert not gone, "a message came every 0.3 s"
    last = patient.ended
    time.sleep(0.9)
    assert len(gone) == 1
    assert gone[0] - last >= 0.6
    never = worker.Worker()
    never._reply = lambda _: reply  # type: ignore[method-assign]
    assert [*never.answer(iter(()), Call())]
    time.sleep(0.2)
    assert len(gone) == 1


def scraped(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def test_a_workers_figures_are_scraped_from_its_own_loopback(
    warm: str, monkeypatch: pytest.MonkeyPatch, cards
) -> None:
    from fedlora.federation.client import handlers as client

    figures = worker.Worker().figures
    assert warm
    (port,) = free_ports(1)
    with served(figures, port):
        empty = scraped(port)
        assert empty["fedlora_worker_base_loaded"] == 0
        assert empty["fedlora_worker_busy_seconds_total"] == 0
        assert not [name for name in empty if "device" in name or "memory" in name]
        working = worker.Worker()
        working.figures = figures
        monkeypatch.setattr(client, "query", lambda *_: time.sleep(0.2) or RecordDict())
        held = torch.ones(1000, device="pretend:1")
        monkeypatch.setattr(cache, "loaded", lambda: SimpleNamespace(device=held.device))

        class Call:
            def add_callback(self, _: object) -> bool:
                return True

        for kind in ("query", "train"):  # a config without a model: the second fails
            message, context = a_message()
            asked = frames(message, lambda bare: pack(kind, bare, context))  # noqa: B023
            assert [*working.answer(asked, Call())]
        now = scraped(port)
    assert now['fedlora_worker_messages_total{kind="query",outcome="answered"}'] == 1
    assert now['fedlora_worker_messages_total{kind="train",outcome="failed"}'] == 1
    assert 0.2 <= now["fedlora_worker_busy_seconds_total"] < 30
    assert now["fedlora_worker_base_loaded"] == 1
    assert now['fedlora_worker_device{name="pretend:1 (Pretend accelerator 1)"}'] == 1
    assert now['fedlora_worker_memory_bytes{state="used"}'] == cards[1].used >= 4000
    assert now['fedlora_worker_memory_bytes{state="free"}'] == 2**34 - cards[1].used
    assert len(now) == len(empty) + 3, "a device and two states, whatever is asked"
    with pytest.raises(OSError, match="refused"):
        scraped(port)


def test_a_port_that_is_taken_costs_the_figures_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with served(worker.Worker().figures, port):
            pass
    assert f"no figures on port {port}: Address already in use" in capsys.readouterr().err


def a_message(ttl: float = 60.0):
    from client_app.app import app
    from fedlora.launch.simulate.grid import LocalGrid, _name

    named = {"model.path": "m", "data.path": "d"}
    grid = LocalGrid(app, 1, named)
    job = Job(1, "run", "start", 0, {}, 0, 0, "", (), config=Config.read(named).identity())
    message = Message(RecordDict({"job": job.record()}), 1000, "query", ttl=ttl)
    _name(message)
    return message, grid.contexts[1000]


@pytest.mark.usefixtures("directory")
def test_a_worker_that_never_was_there_is_done_without() -> None:
    message, context = a_message()
    context.node_config["worker-socket"] = "nobody.sock"
    reply = answer("query", message, context)
    assert reply.content.config_records["facts"]["client"] == 0


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BudgetSpent("x"), Code.BUDGET_SPENT),
        (TrainingCheckError("x"), Code.UNTRAINABLE),
        (PrivacyError("the privacy budget is spent"), Code.FAILED),
        (RuntimeError("the privacy budget is spent"), Code.BUG),
    ],
)
@pytest.mark.parametrize("how", ["warm", "alone"])
def test_an_error_keeps_its_code_all_the_way(
    warm: str, monkeypatch: pytest.MonkeyPatch, error: Exception, code: Code, how: str
) -> None:
    from fedlora.federation.client import handlers as client

    def fails(*_: object) -> RecordDict:
        raise error

    monkeypatch.setattr(client, "train", fails)
    message, context = a_message()
    if how == "warm":
        context.node_config["worker-socket"] = warm
    reply = answer("train", message, context)
    assert reply.error.code == code
    assert str(reply.error.reason).startswith(f"{type(error).__name__}: {error}")


DYING = """
import os, sys, time
from pathlib import Path
from fedlora.launch.deploy import worker
def echo(data):
    return worker.assembled(data, worker.unpack, lambda whole: whole[1])[1]
def answer(self, data):
    {what}
worker.Worker._reply = answer
light = type(sys)("light")
sys.modules["fedlora.federation.client.handlers"] = light
sys.modules["fedlora.training.quiet"] = light
sys.modules["fedlora.training.quiet"].quiet_libraries = lambda: None
sys.argv = ["", "--socket", "w.sock"]
worker.main()
"""


@pytest.fixture
def dying(directory: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen]:
    assert directory == Path.cwd()
    process = subprocess.Popen([sys.executable, "-c", DYING.format(what=request.param)])
    end = time.monotonic() + 20
    while not Path("w.sock").exists() and time.monotonic() < end:
        time.sleep(0.05)
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("dying", ["os._exit(9)"], indirect=True)
@pytest.mark.usefixtures("dying")
def test_a_crash_of_the_worker_is_an_error_reply() -> None:
    message, context = a_message()
    context.node_config["worker-socket"] = "w.sock"
    reply = answer("train", message, context)
    assert reply.error.code == Code.WORKER_LOST
    assert "was lost with this message in hand" in reply.error.reason


@pytest.mark.parametrize("dying", ["time.sleep(600)"], indirect=True)
def test_a_worker_that_hangs_is_an_error_reply_at_the_deadline_and_a_new_start(
    dying: subprocess.Popen,
) -> None:
    message, context = a_message(ttl=2.0)
    context.node_config["worker-socket"] = "w.sock"
    begun = time.monotonic()
    reply = answer("train", message, context)
    assert reply.error.code == Code.WORKER_LOST
    assert "DEADLINE" in reply.error.reason
    assert time.monotonic() - begun < 8
    patience = worker.MERCY + 8
    assert dying.wait(patience) == worker.ABANDONED, (
        "nobody waits for that: its supervisor restarts"
    )


SLOW_ONCE = "n = answer.n = getattr(answer, 'n', 0) + 1; time.sleep(4 / n**3); return echo(data)"


@pytest.mark.parametrize("dying", [SLOW_ONCE], indirect=True)
def test_a_worker_that_is_only_slow_is_warm_for_the_next_message(dying: subprocess.Popen) -> None:
    """Ended at its deadline it would load the model anew for each message, and never be in time."""
    message, context = a_message(ttl=2.0)
    context.node_config["worker-socket"] = "w.sock"
    late = answer("train", message, context)
    assert "DEADLINE" in late.error.reason
    message, context = a_message(ttl=10.0)
    context.node_config["worker-socket"] = "w.sock"
    reply = answer("train", message, context)
    assert not reply.has_error() or "was lost" not in reply.error.reason
    assert dying.poll() is None


GIVES_UP = """
import sys, threading, time
from importlib.metadata import EntryPoint
from fedlora.launch.deploy import node
threading.Thread(target=time.sleep, args=(600,)).start()  # what serves its ClientApps
EntryPoint.load = lambda self: lambda: print("gave up on", self.name)
node.main()
"""


def test_a_node_that_gave_up_on_its_server_ends_so_that_it_is_started_again() -> None:
    done = subprocess.run(
        [sys.executable, "-c", GIVES_UP], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "gave up on flower-supernode\n"
    assert done.returncode == node.LOST


def test_a_broken_installation_is_an_error_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedlora.federation.client import handlers as client

    monkeypatch.delattr(client, "train")  # as where the installed version is another
    message, context = a_message()
    reply = answer("train", message, context)
    assert reply.error.code == Code.BUG
    assert "AttributeError" in reply.error.reason
