"""What a node uses of Flower's Runtime API, in one place.

    task(client)          the token of the next task that waits at the SuperNode of this machine
    received(client)      its message and context, and the bundle that the server sent, as bytes
    answered(client, ..)  its reply

The API is what `flower-superexec` and `flwr-clientapp` speak with a SuperNode under
`--isolation process`; a task may be an AgentApp's, if a server wants that, and is answered alike.
Of a Flower that is not KNOWN a node uses nothing: it never falls back to running a bundle.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import flwr
from flwr.app import Context, Message
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.app_utils import start_parent_process_monitor
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
)
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from fedlora.errors import DeployError

KNOWN = ("1.41.", "1.42.")
"""The versions of Flower whose API this is."""
TASKS = (TaskType.CLIENT_APP, TaskType.AGENT_APP)
"""All that a SuperNode makes of a server's messages."""


def check_version() -> None:
    """
    Raises:
        DeployError: this Flower is another than those whose API this is.
    """
    if not flwr.__version__.startswith(KNOWN):
        raise DeployError(
            f"flwr {flwr.__version__} is installed; a node of fedlora knows 1.41 and 1.42: "
            "pip install 'flwr>=1.41,<1.43'"
        )


def connected(address: str, certificates: str = "", token: str = "") -> RuntimeHttpClient:
    """A client of the SuperNode at host:port; with a task's token, one that does not give up."""
    version = RuntimeVersionHttpInterceptor(
        component_name="flwr-clientapp" if token else "SuperExec"
    )
    return RuntimeHttpClient.from_server_address(
        address,
        insecure=not certificates,
        root_certificates=Path(certificates).read_bytes() if certificates else None,
        interceptors=[version, RuntimeTokenHttpInterceptor(token)] if token else [version],
        retry_invoker=make_simple_http_retry_invoker() if token else None,
    )


def task(client: RuntimeHttpClient) -> str:
    """The token of the oldest task that waits, which is now the caller's; "" where none does."""
    found = client.AcquireTask(AcquireTaskRequest(supported_task_types=TASKS))
    return str(found.token) if found.HasField("task") else ""


@contextmanager
def alive(client: RuntimeHttpClient, parent: int) -> Iterator[None]:
    """Tells the SuperNode all the while that this task is worked on.

    KeyboardInterrupt where the run was stopped or the parent process is gone.
    """
    start_parent_process_monitor(parent)
    beats = HeartbeatSender(make_task_heartbeat_fn_http(client))
    beats.start()
    try:
        yield
    finally:
        if beats.is_running:
            beats.stop()


def received(client: RuntimeHttpClient) -> tuple[Message, Context, bytes]:
    """The task's message and context, and the bundle as it came: nothing of it is unpacked."""
    message, context, _, fab = pull_task_input(client)
    return message, context, fab.content


def answered(client: RuntimeHttpClient, reply: Message, context: Context) -> None:
    """Hand the reply to the SuperNode; the task is done."""
    push_message(client, reply, context)
    push_task_output(client, context, "completed", "")
