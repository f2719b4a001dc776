"""The warm worker: the same bytes, and an error reply whatever becomes of it."""

import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.app import Message, RecordDict

from fedlora.config.reader import Config
from fedlora.errors import BudgetSpent, PrivacyError, TrainingCheckError
from fedlora.federation.wire.codes import Code
from fedlora.federation.wire.job import Job
from fedlora.launch.client_app import answer
from fedlora.launch.deploy import node, worker


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


def final_bytes(settings, name: str, socket: str = "") -> bytes:
    from client_app.app import app
    from fedlora.config.reader import Config
    from fedlora.federation.server.loop import FederatedLora
    from fedlora.launch.simulate.grid import LocalGrid

    config = Config.read(settings(**{"run.name": name, "run.rounds": 2}))
    nodes = {i: {"worker-socket": socket} for i in range(config.clients.count)} if socket else None
    with LocalGrid(app, config.clients.count, config.flat(), 1, nodes) as grid:
        server = FederatedLora(config)
        server.start(grid)
    return (server.setting.journal.directory / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_federation_through_a_worker_ends_in_the_same_bytes(settings, warm: str) -> None:
    assert final_bytes(settings, "warm", warm) == final_bytes(settings, "alone")


def test_the_socket_is_its_owners_alone(warm: str) -> None:
    assert stat.S_IMODE(os.stat(warm).st_mode) & 0o077 == 0


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


SLOW_ONCE = "n = answer.n = getattr(answer, 'n', 0) + 1; time.sleep(4 / n**3); return b''"


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
