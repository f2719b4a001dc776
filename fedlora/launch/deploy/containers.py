"""A deployment on one host in containers: the image's recipe, and the compose file.

    image/Dockerfile, image/constraints.txt    a wheel of fedlora goes beside them
    compose.yaml                               the scripts, each in a container of its own

Control stays on the loopback that superlink, superexec, gate, register and operator share. No
container writes but to its part of the deployment's directory and to /tmp.
"""

import json
import os
from importlib.resources import files
from pathlib import Path

from fedlora.config.reader import Config
from fedlora.launch.deploy.plan import Plan

IMAGE = "localhost/fedlora"
"""No registry's: nobody can put another in its place."""
STRANGER = 10001
"""Who the containers run as, where whoever makes the deployment is root."""

DOCKERFILE = """\
# Put one wheel of fedlora beside this file (in a checkout: pip wheel --no-deps -w DIR .), then
#     docker build -t localhost/fedlora --build-arg BASE=python:3.11-slim .
# BASE: any image with Python 3.11 or newer and its venv.
# INDEX: where pip takes torch from, https://download.pytorch.org/whl/cpu for its small build.
# DATA: packages of which only the files are read, such as those of the quickstart.
ARG BASE=python:3.11-slim
FROM ${BASE}
ARG INDEX=""
ARG DATA=""
COPY *.whl constraints.txt /build/
RUN python3 -m venv /opt/fedlora \\
 && /opt/fedlora/bin/pip install --no-cache-dir -c /build/constraints.txt \\
      ${INDEX:+--index-url ${INDEX}} torch \\
 && /opt/fedlora/bin/pip install --no-cache-dir -c /build/constraints.txt /build/*.whl \\
 && if [ -n "${DATA}" ]; then \\
      /opt/fedlora/bin/pip install --no-cache-dir -c /build/constraints.txt --no-deps ${DATA}; fi
ENV PATH=/opt/fedlora/bin:/usr/local/bin:/usr/bin:/bin
USER 10001
"""


def write(plan: Plan, config: Config) -> None:
    """The image's directory, and compose.yaml."""
    image = plan.directory / "image"
    image.mkdir()
    (image / "Dockerfile").write_text(DOCKERFILE)
    (image / "constraints.txt").write_text(constraints())
    (plan.directory / "compose.yaml").write_text(compose(plan, config))


def constraints() -> str:
    """The versions that fedlora is tested with, which the wheel carries."""
    shipped = files("fedlora") / "constraints.txt"
    if shipped.is_file():
        return shipped.read_text()
    return (Path(__file__).parents[3] / "constraints.txt").read_text()


def compose(plan: Plan, config: Config) -> str:
    """The compose file: nodes reach the gate alone, and the server not even those."""
    server = [f"./server:{plan.server}", *_read(config, own_data=False)]
    whole = f".:{plan.directory}"
    beside = {"network_mode": "service:superlink"}
    operator = {"FLWR_HOME": str(plan.directory / "operator"), "FLWR_TELEMETRY_ENABLED": "0"}
    services: dict[str, object] = {
        "superlink": _service(plan.server, "superlink.sh", server, networks=["fleet"]),
        "superexec": _service(plan.server, "superexec.sh", server, **beside),
        "gate": _service(plan.server, "gate.sh", server, **beside),
        "register": _service(
            plan.directory, f"fedlora deploy register {plan.quoted}", [whole],
            restart="on-failure", **beside,
        ),
        "operator": _service(
            plan.directory, "flwr list fedlora", [whole],
            restart="no", profiles=["operator"], environment=operator, **beside,
        ),
    }  # fmt: skip
    for i in range(plan.clients):
        own = [f"./nodes/node-{i}:{plan.node(i)}", *_read(config, own_data=plan.own_data)]
        services[f"node-{i}"] = _service(
            plan.node(i), "node.sh", own,
            networks=["fleet"],
            environment={"FEDLORA_SUPERLINK": f"superlink:{plan.gate_port or 9443}"},
        )  # fmt: skip
        if plan.warm:
            services[f"worker-{i}"] = _service(plan.node(i), "worker.sh", own, network_mode="none")
    tree = {"services": services, "networks": {"fleet": {}}}
    return f"{NOTE.format(directory=plan.quoted)}\n{json.dumps(tree, indent=2)}\n"


NOTE = """\
# docker build -t localhost/fedlora image     (image/Dockerfile says how)
# docker compose up -d                        registers the nodes, too
# docker compose run --rm operator flwr run {directory}/app fedlora --stream
# Whoever the containers run as must own this directory: see `user`. (JSON is YAML.)"""


def _service(place: Path, command: str, volumes: list[str], **more: object) -> dict[str, object]:
    script = command.endswith(".sh")
    owner = os.getuid() or STRANGER
    environment = {"HOME": f"{place}/home", **more.pop("environment", {})}  # type: ignore[dict-item]
    return {
        "image": IMAGE,
        "restart": "always",
        "user": f"{owner}:{os.getgid() or STRANGER}",
        "read_only": True,
        "tmpfs": ["/tmp"],
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "volumes": volumes,
        "working_dir": str(place),
        "command": ["sh", f"{place}/{command}"] if script else ["sh", "-c", command],
        "environment": environment,
        **more,
    }


def _read(config: Config, own_data: bool) -> list[str]:
    """The experiment's own files and directories, at their places, to be read alone."""
    paths = [config.model.path]
    if not own_data:
        data = config.data
        paths += [data.path, data.test_path, data.validation_path, *(x.path for x in data.clients)]
    here = dict.fromkeys(p for p in paths if p and os.path.isabs(p) and os.path.exists(p))
    return [f"{path}:{path}:ro" for path in here]
