"""`fedlora deploy init`: write a deployment's directory, ready to start."""

import json
import shutil
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w

from fedlora.config.members import Members, public_key
from fedlora.config.reader import Config
from fedlora.config.task_names import kind_of
from fedlora.errors import DeployError
from fedlora.federation.client.secure_book import SecureBook
from fedlora.launch.deploy import containers, keys, policy_file, scripts
from fedlora.launch.deploy.bundle import MANIFEST, manifest
from fedlora.launch.deploy.guide import readme
from fedlora.launch.deploy.plan import CONNECTION, LOOPBACK, Plan, free_ports
from fedlora.launch.experiment_file import load
from fedlora.launch.shim import app_files
from fedlora.privacy.ledger import Ledger
from fedlora.training.user_code import named

GATE_PORT = 9443


@dataclass(frozen=True, slots=True)
class Wanted:
    """What `init` was asked for."""

    directory: Path
    clients: int
    experiment: Path | None = None
    overrides: Mapping[str, Any] | None = None
    host: str = "127.0.0.1"
    ranks: tuple[int, ...] = ()
    secure: bool = True
    own_data: bool = True
    warm: bool = True
    days: float = 365.0
    one_host_trial: bool = False
    """Make every node's keys here. Else each node makes its own, whose public halves leave it."""


def init(wanted: Wanted) -> Plan:
    """Write the whole directory.

    Raises:
        DeployError: something is there already, or the numbers make no deployment.
        ConfigError: the experiment cannot be used.
    """
    directory = wanted.directory.resolve()
    if directory.exists() and any(directory.iterdir()):
        raise DeployError(f"{directory} is not empty: choose another directory, or remove it")
    if wanted.clients < 1:
        raise DeployError(f"--clients {wanted.clients}: must be at least 1")
    config = _experiment(wanted)
    local = wanted.host in LOOPBACK
    ports = free_ports(wanted.clients + 1)
    plan = Plan(
        directory,
        wanted.clients,
        config.clients.ranks,
        wanted.host,
        ports[0],
        0 if local else GATE_PORT,
        ports[1:],
        wanted.secure,
        wanted.own_data and _expressible(config),
        wanted.warm,
        code=tuple(value for _, value in named(config)),
        keys_here=wanted.one_host_trial,
        trust_remote_code=config.model.trust_remote_code,
    )
    directory.mkdir(parents=True, exist_ok=True)
    if plan.own_data:
        _write_rows(plan, config)
    _write_server(plan, wanted.days)
    for i in range(plan.clients):
        _write_node(plan, i, config)
    if plan.secure and plan.keys_here:
        _write_members(plan)
    _write_app(plan, config)
    _write_around(plan, config)
    plan.save()
    return plan


def renew(plan: Plan, days: float) -> None:
    """A new server certificate of the same authority; nodes need nothing new."""
    ca = keys.load_authority(plan.directory / "ca")
    keys.server_certificate(plan.server, ca, _hosts(plan), days)


def _experiment(wanted: Wanted) -> Config:
    """The experiment as it will be deployed: this many clients, paths that do not move."""
    given = dict(wanted.overrides or {})
    given |= {"clients.count": wanted.clients, "run.out": "runs"}
    if wanted.ranks:
        given["clients.ranks"] = ",".join(map(str, wanted.ranks))
    config = load(wanted.experiment or "quickstart", given)
    flat = config.flat()
    for key in ("model.path", "data.path", "data.test-path", "data.validation-path"):
        value = str(flat[key])
        if value and not value.startswith("pkg:") and Path(value).exists():
            flat[key] = str(Path(value).resolve())
    sites = [
        {**site.model_dump(), "path": str(Path(site.path).resolve())}
        if Path(site.path).exists()
        else site.model_dump()
        for site in config.data.clients
    ]
    return Config.read({**flat, "data.clients": sites})


def _expressible(config: Config) -> bool:
    """Can a client's rows be written so that the run config's columns find them again?"""
    templated = kind_of(config.model.task).generates and "{" in config.data.prompt
    return bool(config.data.path) and not templated


def _write_rows(plan: Plan, config: Config) -> None:
    """Each node's part of the experiment's data, as files of its own for it to replace."""
    from fedlora.training import cache
    from fedlora.training.tasks import task_of

    corpus = cache.corpus(config)
    for i in range(plan.clients):
        rows = corpus.client(i)
        for name, part in (("train", rows.train), ("test", rows.test)):
            columns = task_of(config.model.task).written(part, config.data)
            full = {k: v for k, v in columns.items() if k and v}
            table = zip(*full.values(), strict=True)
            lines = [json.dumps(dict(zip(full, row, strict=True))) + "\n" for row in table]
            path = plan.node(i) / "data" / f"{name}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(lines))


def _hosts(plan: Plan) -> list[str]:
    return [plan.host, "superlink"]  # the latter is its name among compose's containers


def _write_server(plan: Plan, days: float) -> None:
    plan.server.mkdir()
    if plan.secure:
        authority = plan.directory / "ca"
        authority.mkdir(mode=0o700)
        keys.server_certificate(
            plan.server, keys.authority(authority, max(days, 3650.0)), _hosts(plan), days
        )
        shutil.copy(authority / "ca.crt", plan.server)
    _script(plan.server / "env.sh", scripts.ENVIRONMENT)
    _script(plan.server / "superlink.sh", scripts.superlink(plan))
    _script(plan.server / "superexec.sh", scripts.superexec(plan))
    gated = plan if plan.gate_port else replace(plan, gate_port=GATE_PORT)
    _script(plan.server / "gate.sh", scripts.gate(gated))
    (plan.server / "nginx.conf").write_text(scripts.nginx(plan))
    for name in ("superlink", "superexec", "gate"):
        text = scripts.unit(f"fedlora {name}", "server", f"{name}.sh", 5, speaks=name == "gate")
        (plan.server / f"fedlora-{name}.service").write_text(text)
    _write_operator(plan)


def _write_operator(plan: Plan) -> None:
    """The Flower config that `flwr` commands of the operator use."""
    home = plan.directory / "operator"
    home.mkdir(mode=0o700)
    link: dict[str, Any] = {"address": f"127.0.0.1:{plan.port}"}
    if plan.secure:
        link["root-certificates"] = str(plan.server / "ca.crt")
    else:
        link["insecure"] = True
    tree = {"superlink": {"default": CONNECTION, CONNECTION: link}}
    (home / "config.toml").write_text(tomli_w.dumps(tree))


def _write_node(plan: Plan, i: int, config: Config) -> None:
    directory = plan.node(i)
    for name in ("memory", "data"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    directory.chmod(0o700)
    if plan.secure:
        if plan.keys_here:
            keys.own_keys(directory)
        shutil.copy(plan.directory / "ca" / "ca.crt", directory)
    (directory / policy_file.NAME).write_text(policy_file.policy_text(plan, i, config))
    Ledger(directory / "memory").begin()
    SecureBook(directory / "memory").begin()
    _script(directory / "env.sh", scripts.ENVIRONMENT)
    _script(directory / "node.sh", scripts.node(plan, i))
    fixed = scripts.NODES_OWN
    text = scripts.unit(f"fedlora node {i}", f"node-{i}", "node.sh", 65, fixed)
    (directory / "fedlora-node.service").write_text(text)
    if plan.warm:
        _script(directory / "worker.sh", scripts.worker(i))
        text = scripts.unit(f"fedlora worker of node {i}", f"node-{i}", "worker.sh", 5, fixed)
        (directory / "fedlora-worker.service").write_text(text)


def _write_members(plan: Plan) -> None:
    """Each node's list of all nodes' public keys."""
    each = {i: public_key((plan.node(i) / "member.pub").read_text()) for i in range(plan.clients)}
    for i in each:
        Members(each).save(plan.node(i) / policy_file.MEMBERS)


def _write_app(plan: Plan, config: Config) -> None:
    """The two apps as `flwr run` bundles them, with the experiment as their run config."""
    files = {**app_files("server"), **app_files("client"), MANIFEST: manifest()}
    for name, text in files.items():
        (plan.app / name).parent.mkdir(parents=True, exist_ok=True)
        (plan.app / name).write_text(text)
    tree: dict[str, Any] = {
        "project": {
            "name": "fedlora-app",
            "version": "1.0.0",
            "description": "A fedlora experiment",
            "license": "Apache-2.0",
            "dependencies": ["flwr>=1.41,<1.43"],
        },
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "fedlora",
                    "components": {
                        "serverapp": "server_app.app:app",
                        "clientapp": "client_app.app:app",
                    },
                    "config": tomllib.loads(config.toml()),
                }
            }
        },
    }
    (plan.app / "pyproject.toml").write_text(tomli_w.dumps(tree))


def _write_around(plan: Plan, config: Config) -> None:
    containers.write(plan, config)
    (plan.directory / "README.md").write_text(readme(plan))
    (plan.directory / ".gitignore").write_text("*\n")


def _script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)
