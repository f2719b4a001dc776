"""The parts of a deployment, as its deploy.toml keeps them.

DIR/deploy.toml
DIR/ca/            the authority's key and certificate: stays with the operator
DIR/server/        goes to the server's machine
DIR/nodes/node-0/  goes to that node's machine
DIR/app/           the Flower app that `flwr run` sends; the experiment is in its pyproject.toml
"""

import contextlib
import random
import shlex
import socket
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tomli_w

from fedlora.errors import DeployError

CONNECTION = "fedlora"
"""The name of the SuperLink in the operator's Flower config."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class Plan:
    directory: Path
    clients: int
    ranks: tuple[int, ...]
    host: str = "127.0.0.1"
    """Where nodes find the server."""
    port: int = 8000
    """The SuperLink's, always on loopback: it serves Control too, which knows no users."""
    gate_port: int = 0
    """What nodes of other machines connect to: only /v1/fleet/* passes. 0: nodes are local."""
    node_ports: tuple[int, ...] = ()
    """Each node's own runtime port, on its loopback."""
    secure: bool = True
    own_data: bool = True
    """Each node reads the rows in its directory; else its part of the experiment's data."""
    warm: bool = True
    """Each node keeps a worker that holds the model between messages."""
    node_restart: float = 65.0
    """Seconds before a node that ended is started again; the SuperLink refuses it for 60."""
    code: tuple[str, ...] = ()
    """What of the user's own code a node may run, "py:package.module:function" each."""
    keys_here: bool = True
    """Were all nodes' keys made here, so that who made the deployment has them all?"""
    trust_remote_code: bool = False
    """May a node run code that comes with a model?"""

    @property
    def quoted(self) -> str:
        """The directory as a word of a shell's command."""
        return shlex.quote(str(self.directory))

    @property
    def server(self) -> Path:
        return self.directory / "server"

    @property
    def app(self) -> Path:
        return self.directory / "app"

    @property
    def run_directory(self) -> Path:
        """Process ids and logs of what `up` started here."""
        return self.directory / "run"

    def node(self, i: int) -> Path:
        return self.directory / "nodes" / f"node-{i}"

    def rank(self, i: int) -> int:
        return self.ranks[i % len(self.ranks)]

    @property
    def fleet_address(self) -> str:
        """What a node is told to connect to."""
        return f"{self.host}:{self.gate_port or self.port}"

    def save(self) -> None:
        tree = {k: v for k, v in asdict(self).items() if k != "directory"}
        text = tomli_w.dumps({k: list(v) if isinstance(v, tuple) else v for k, v in tree.items()})
        (self.directory / "deploy.toml").write_text(text)

    @classmethod
    def load(cls, directory: Path) -> "Plan":
        """
        Raises:
            DeployError: the directory holds no deployment.
        """
        path = directory / "deploy.toml"
        try:
            tree = tomllib.loads(path.read_text())
            lists: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in tree.items()
            }
            return cls(directory=directory.resolve(), **lists)
        except FileNotFoundError:
            raise DeployError(
                f"{directory} holds no deployment; make one with "
                f"`fedlora deploy init {shlex.quote(str(directory))}`"
            ) from None
        except (OSError, ValueError, TypeError) as e:
            raise DeployError(f"{path} is damaged: {e}") from None


def free_ports(count: int) -> tuple[int, ...]:
    """Ports of the loopback that nothing listens on now, below those the system gives out."""
    found: list[int] = []
    for port in random.sample(range(20_000, 32_000), 2_000):
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return tuple(found)
    raise DeployError(f"no {count} free ports between 20000 and 32000 on the loopback")
