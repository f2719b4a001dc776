"""What Flower and this machine would trip over."""

import importlib.metadata
import importlib.util
import os
import socket
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from fedlora.config import processes
from fedlora.launch.doctor.finding import Finding
from fedlora.launch.doctor.the_memory import machine_devices

FLOWER_PORT = 39091
"""Where `flwr run` looks for a managed SuperLink, unless told otherwise."""
FAB_LIMIT = 10_000_000


def machine() -> Iterator[Finding]:
    """What Flower and this machine would trip over."""
    versions = {p: importlib.metadata.version(p) for p in ("flwr", "torch", "peft")}
    said = ", ".join(f"{p} {v}" for p, v in versions.items())
    yield Finding("ok", f"{said}; {os.cpu_count()} cores")
    yield machine_devices()
    if sys.platform != "linux":
        lacks = "" if processes.deployable() else ", and `fedlora deploy` does not run"
        yield Finding(
            "note",
            f"{sys.platform} is not among the platforms that fedlora is tested on (Linux)",
            f"simulations run in one process unless simulate.workers says more{lacks}",
        )
    minor = tuple(int(n) for n in versions["flwr"].split(".")[:2])
    if not (1, 41) <= minor < (1, 43):
        yield Finding(
            "problem",
            f"flwr {versions['flwr']} is outside the range fedlora is tested with",
            "pip install 'flwr>=1.41,<1.43'",
        )
    if importlib.util.find_spec("ray") is None:
        yield Finding(
            "note",
            "ray is not installed: `fedlora simulate` works, `flwr run` does not",
            "pip install 'fedlora[flower-simulation]' if you want Flower's own engine",
        )
    if os.environ.get("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION") != "1":
        yield Finding(
            "note",
            "`flwr run` would resolve the app's dependencies anew for every run (torch included)",
            "export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 before it starts; "
            "`fedlora simulate --engine flower` does so by itself",
        )
    yield from _port()
    yield from _bundle(Path("pyproject.toml"))


def _port() -> Iterator[Finding]:
    """Is a SuperLink that someone else started in the way?"""
    port = int(os.environ.get("FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", FLOWER_PORT))
    with socket.socket() as s:
        s.settimeout(0.3)
        taken = s.connect_ex(("127.0.0.1", port)) == 0
    if not taken:
        yield Finding("ok", f"port {port} is free for `flwr run`'s SuperLink")
        return
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as answer:
            healthy = answer.status == 200
    except OSError:
        healthy = False
    what = "a SuperLink that is running already" if healthy else "another program"
    yield Finding(
        "note",
        f"port {port} belongs to {what}; `flwr run` finds its SuperLink by port alone and would "
        "run there, in that one's environment",
        "export FLWR_LOCAL_SUPERLINK_HTTP_API_PORT to a free port",
    )


def _bundle(pyproject: Path) -> Iterator[Finding]:
    """What `flwr build` would put into the app bundle here, and whether it would take it."""
    import tomllib

    if not pyproject.exists() or "flwr" not in (
        tree := tomllib.loads(pyproject.read_text()).get("tool", {})
    ):
        return
    project = tomllib.loads(pyproject.read_text())["project"]
    if not isinstance(project.get("license"), dict):
        yield Finding(
            "problem",
            "pyproject.toml: project.license is a string; an app bundle of format 1 refuses that",
            'license = { file = "LICENSE" }',
        )
    app = tree["flwr"].get("app", {})
    size = 0
    for pattern in app.get("fab-include", []):
        found = list(Path().glob(pattern))
        size += sum(p.stat().st_size for p in found if p.is_file())
        if not found:
            yield Finding("problem", f"fab-include: {pattern} matches nothing", "remove it")
    if size > FAB_LIMIT:
        yield Finding("problem", f"the app bundle holds {size:,} bytes", f"limit {FAB_LIMIT:,}")
    elif size:
        yield Finding("ok", f"the app bundle's files take {size / 1e3:.0f} kB")
