"""A SuperNode that runs no code of its server, and that ends when it is lost.

    python -m fedlora.launch.deploy.node ...        the arguments of flower-supernode

Flower's own unpacks the bundle that a server sends, and imports what that names. Under
`--isolation process` it starts nothing; a thread here takes its tasks and starts for each a
`message_process`, which runs the installed fedlora.

Flower retries whatever the network does, but takes a TLS handshake that is cut off for a wrong
certificate: it gives up, signs off, and its main thread returns; the thread that serves its
Runtime API keeps the process alive, connected to nothing, for ever. A SuperLink that dies in
mid-handshake does that, or a load balancer whose backend is gone.
"""

import argparse
import os
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from importlib.metadata import entry_points
from pathlib import Path

from fedlora.errors import DeployError
from fedlora.launch.deploy.expiry import keep_warning
from fedlora.launch.deploy.notify import Notify

LOST = 74
"""Exit status of a node that gave up on its server."""
UNFIT = 78
"""Exit status of a node that cannot start as it is installed."""
POLL = 0.2
"""Seconds between two looks for a task."""


def main() -> None:
    """Run flower-supernode and answer its tasks; end the process where it returns, or fails."""
    given = _arguments(sys.argv[1:])
    try:
        check_flower()
    except DeployError as e:
        print(f"DeployError: {e}", file=sys.stderr, flush=True)
        sys.exit(UNFIT)
    if given.root_certificates:
        keep_warning(given.superlink, Path(given.root_certificates))
    sys.argv[1:] = [*sys.argv[1:], "--isolation", "process"]
    host = f"[{given.host}]" if ":" in given.host else given.host
    taking = (f"{host}:{given.port}", given.ssl_ca_certfile)
    threading.Thread(target=_guarded, args=taking, name="fedlora-tasks", daemon=True).start()
    (found,) = entry_points(group="console_scripts", name="flower-supernode")
    try:
        found.load()()
    except SystemExit:  # Flower has seen to its threads
        raise
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(LOST)


def check_flower() -> None:
    """
    Raises:
        DeployError: this Flower is not one whose interface a node of fedlora knows.
    """
    try:
        from fedlora.launch.deploy.flower_runtime import check_version
    except ImportError as e:
        raise DeployError(
            f"Flower has another interface than fedlora's nodes know ({e}): "
            "pip install 'flwr>=1.41,<1.43'"
        ) from None
    check_version()


def take_tasks(address: str, certificates: str = "") -> None:
    """Start a process for each task of the SuperNode at this address, for as long as this lives.

    systemd is told that it lives for as long as the SuperNode answers.
    address: of its Runtime API, on this machine. certificates: a file of the authority that
    signed it; "" where it is plain HTTP.
    """
    import httpx

    from fedlora.launch.deploy.flower_runtime import connected, task

    client, notify = connected(address, certificates), Notify()
    running: list[subprocess.Popen[bytes]] = []
    while True:
        running = [p for p in running if p.poll() is None]
        try:
            token = task(client)
            notify.alive()
        except httpx.ConnectError:  # it is starting, or ending
            token = ""
        except httpx.HTTPError as e:
            print(
                f"the SuperNode's Runtime API does not answer: {e!r}", file=sys.stderr, flush=True
            )
            token = ""
        if token:
            running.append(_started(address, certificates, token))
        time.sleep(POLL)


def _started(address: str, certificates: str, token: str) -> subprocess.Popen[bytes]:
    """The process that answers a task. Its import path has no directory of the node (-P)."""
    command = [sys.executable, "-P", "-m", "fedlora.launch.deploy.message_process"]
    command += ["--runtime-api-address", address, "--parent-pid", str(os.getpid())]
    command += ["--root-certificates", certificates] if certificates else []
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    assert process.stdin is not None
    with suppress(BrokenPipeError), process.stdin as pipe:  # not an argument: `ps` shows those
        pipe.write(token.encode() + b"\n")
    return process


def _guarded(address: str, certificates: str) -> None:
    """A node that takes no tasks must not look connected."""
    try:
        take_tasks(address, certificates)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(LOST)


def _arguments(arguments: list[str]) -> argparse.Namespace:
    """Those of flower-supernode that say where its Runtime API is, and its server."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9094)
    parser.add_argument("--ssl-ca-certfile", "--appio-ssl-ca-certfile", default="")
    parser.add_argument("--superlink", default="")
    parser.add_argument("--root-certificates", default="")
    return parser.parse_known_args(arguments)[0]


if __name__ == "__main__":
    main()
