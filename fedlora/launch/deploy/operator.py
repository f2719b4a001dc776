"""Flower's command line, in a process of its own that answers many calls.

    with Operator(plan) as operator:
        operator("list")["runs"]

A call costs milliseconds after the first; Flower's exit codes are not trusted, its JSON is.
Run as a module it is that process: a JSON list of arguments a line in, a JSON object a line out.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from fedlora.errors import DeployError
from fedlora.launch.deploy.plan import CONNECTION, Plan


def environment(home: Path) -> dict[str, str]:
    """This process's environment with Flower's traps closed and its programs on the path."""
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }


class Operator:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Operator":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, *arguments: str) -> dict[str, Any]:
        """Run `flwr ... --format json`; its answer.

        Raises:
            DeployError: Flower refused, or cannot reach the SuperLink.
        """
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fedlora.launch.deploy.operator"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment(self.plan.directory / "operator"),
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([*arguments, "--format", "json"]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise DeployError(f"`flwr {' '.join(arguments)}` ended without an answer")
        answer: dict[str, Any] = json.loads(line)
        if not answer.get("success"):
            said = answer.get("error-message") or answer.get("said") or "no reason given"
            raise DeployError(f"`flwr {' '.join(arguments)}`: {str(said).strip()}")
        return answer

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.communicate()

    def nodes(self) -> list[dict[str, Any]]:
        """Every registered node."""
        answer = self("supernode", "list", CONNECTION)
        found = answer.get("nodes", [])
        return list(found)

    def keys(self) -> dict[str, str]:
        """Flower's id of every registered node, by its public key as PEM."""
        return dict(self("keys", CONNECTION)["keys"])

    def runs(self) -> list[dict[str, Any]]:
        return list(self("list", CONNECTION)["runs"])

    def status(self, run_id: str) -> str:
        """Such as "running", "finished:completed" or "finished:failed"."""
        run = self("list", CONNECTION, "--run-id", run_id)["runs"][0]
        return str(run["status"])


def _keys(connection: str, output: Annotated[str, Option("--format")]) -> None:
    """Print id and key of every node: `flwr supernode list` leaves the keys out."""
    from flwr.cli import utils
    from flwr.cli.flower_config import read_superlink_connection
    from flwr.proto.control_pb2 import ListNodesRequest

    with utils.cli_output_handler(output), utils.flwr_cli_exc_handler():
        client = utils.init_http_client_from_connection(read_superlink_connection(connection))
        try:
            nodes = client.ListNodes(ListNodesRequest()).nodes_info
        finally:
            client.close()
        keys = {n.public_key.decode(): str(n.node_id) for n in nodes if not n.unregistered_at}
        utils.print_json_to_stdout(json.dumps({"success": True, "keys": keys}))


def _serve() -> None:
    from flwr.cli.app import app
    from typer.main import get_command

    app.command("keys")(_keys)
    command = get_command(app)
    out = os.fdopen(os.dup(1), "w")  # commands print to whatever stdout was at their import
    for line in sys.stdin:
        answer: dict[str, Any] = {}
        with tempfile.TemporaryFile("w+") as said:
            os.dup2(said.fileno(), 1)
            try:
                command.main(json.loads(line), standalone_mode=False)
            except SystemExit:
                pass
            except Exception as e:
                answer = {"success": False, "said": f"{type(e).__name__}: {e}"}
            sys.stdout.flush()
            said.seek(0)
            text = said.read()
        print(json.dumps(_answer(text) or answer or {"said": text}), file=out, flush=True)


def _answer(text: str) -> dict[str, Any]:
    """The JSON object in what a command printed."""
    for start in (i for i, c in enumerate(text) if c == "{"):
        with contextlib.suppress(ValueError):
            found = json.JSONDecoder().raw_decode(text[start:])[0]
            if isinstance(found, dict):
                return found
    return {}


if __name__ == "__main__":
    _serve()
