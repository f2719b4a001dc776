"""A node with a policy, an honest message for it, and a server that changes one thing in it."""

import copy
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w
from flwr.app import ConfigRecord, Context, Message, RecordDict

from client_app.app import app as client_app
from fedlora.config.policy import Policy
from fedlora.config.reader import Config
from fedlora.errors import FedLoraError
from fedlora.federation.client.secure_book import SecureBook
from fedlora.federation.wire.same_machine import OWN_MACHINE
from fedlora.launch.simulate.grid import LocalGrid
from fedlora.privacy.ledger import Ledger
from fedlora.training import cache
from tests.support.tiny_federation import federate

Tree = dict[str, Any]


def written(directory: Path, base: str, rows: str, **sections: Mapping[str, Any]) -> Path:
    """A node.toml that allows this base and these rows, with what is given beside or instead."""
    tree: Tree = {
        "model": {"allowed": {base: {}}},
        "data": {"path": rows, "dedupe": False},
        "limits": {"steps": 50, "batch": 64, "rank": 16, "seconds": 120, "threads": 2},
    }
    for name, table in sections.items():
        tree[name] = {**tree.get(name, {}), **table}
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "node.toml"
    path.write_text(tomli_w.dumps(tree))
    Ledger(Policy.load(path).ledger).begin()
    SecureBook(Policy.load(path).ledger).begin()
    return path


def named(policy: Path) -> Tree:
    """The node config of a node under this policy."""
    return {OWN_MACHINE: False, "policy": str(policy)}


@dataclass
class Recorded:
    """What an honest server sent to client 0 in a run: its config, and a message of each kind."""

    config: Tree
    messages: dict[str, RecordDict] = field(default_factory=dict)


def recorded(settings: Mapping[str, object], policies: Mapping[int, Path]) -> Recorded:
    """An honest run of nodes under these policies, which ends well."""
    kept = Recorded(Config.read(settings).flat())

    def app(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 0:
            kept.messages.setdefault(message.metadata.message_type, copy.deepcopy(message.content))
        reply = client_app(message, context)
        assert not reply.has_error(), reply.error
        return reply

    federate(settings, app, nodes={i: named(path) for i, path in policies.items()})
    return kept


def asked(
    kept: Recorded,
    policy: Path,
    kind: str = "train",
    config: Mapping[str, Any] = {},
    records: Mapping[str, Mapping[str, Any]] = {},
    node: Mapping[str, Any] = {},
) -> Message:
    """The node's answer where the server's config, and fields of records, are others.

    The server's digest is of what it sends, as a server that lies about nothing else has it.
    """
    content = copy.deepcopy(kept.messages[kind])
    given = {**kept.config, **config}
    if config and "job" in content:
        try:
            digest = Config.read(given).identity()
        except (FedLoraError, RecursionError):
            digest = ""
        content["job"] = ConfigRecord({**content.config_records["job"], "config": digest})
    for name, fields in records.items():
        content[name] = ConfigRecord({**content.config_records[name], **fields})
    return sent(content, kind, given, policy, node)


def sent(
    content: RecordDict,
    kind: str,
    given: Mapping[str, Any],
    policy: Path,
    node: Mapping[str, Any] = {},
) -> Message:
    """The node's answer to a message of this content."""
    cache.forget_data()
    own = {0: {**named(policy), **node}}
    with LocalGrid(client_app, 1, given, node_configs=own) as grid:
        message = Message(content, 1000, kind)
        message.metadata.__dict__["_message_id"] = "0" * 32
        reply = client_app(message, grid.contexts[1000])
    assert reply is not None
    return reply


# -- what a process does meanwhile ----------------------------------------------------------------

WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod",
          "os.truncate", "shutil.rmtree", "shutil.move", "shutil.copyfile")  # fmt: skip
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork",
          "os.forkpty", "ctypes.dlopen")  # fmt: skip


@dataclass
class Deeds:
    """What a process did: paths, and names of modules."""

    read: set[str] = field(default_factory=set)
    wrote: set[str] = field(default_factory=set)
    imported: set[str] = field(default_factory=set)
    other: set[str] = field(default_factory=set)
    """Sockets and processes."""


_watching: list[Deeds] = []
_installed: list[bool] = []


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if not _watching:
        return
    deeds = _watching[-1]
    if event == "open":
        path, mode, flags = args
        if isinstance(path, str | bytes):
            changes = any(x in (mode or "") for x in "wax+")
            changes |= bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            (deeds.wrote if changes else deeds.read).add(os.fsdecode(path))
    elif event in WRITES:
        deeds.wrote.update(os.fsdecode(x) for x in args[:2] if isinstance(x, str | bytes))
    elif event == "import":
        deeds.imported.add(str(args[0]))
    elif event in STARTS or event.startswith("socket."):
        deeds.other.add(f"{event} {args[:2]}")


@contextmanager
def watched() -> Iterator[Deeds]:
    """What this process opens, imports, connects to and starts meanwhile."""
    if not _installed:
        sys.addaudithook(_hook)  # for good: there is no way to take one off
        _installed.append(True)
    _watching.append(Deeds())
    try:
        yield _watching[-1]
    finally:
        _watching.pop()
