"""The same two apps on Flower's own simulation engine, in a namespace with loopback only."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w

from fedlora.config.reader import Config
from fedlora.launch.simulate.run import commands
from tests.support.tiny_federation import ROOT, Ran, federate, quick

Settings = Callable[..., dict[str, object]]
ALONE = ["unshare", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "-"]


def namespaces() -> bool:
    if not (shutil.which("unshare") and shutil.which("ip")):
        return False
    return subprocess.run([*ALONE, "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Flower's engine needs Ray")
@pytest.mark.skipif(not namespaces(), reason="no network namespaces here, and Ray listens widely")
def test_flowers_engine_ends_in_the_bytes_of_local_grid(settings: Settings, tmp_path: Path) -> None:
    given = settings(**quick("fedex", **{"evaluate.every": 1}))
    local = federate({**given, "run.name": "local"})
    experiment = tmp_path / "x.toml"
    experiment.write_text(tomli_w.dumps(Config.read({**given, "run.name": "engine"}).flat()))
    command = [sys.executable, "-m", "fedlora.cli", "simulate", str(experiment)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": "/usr/sbin:/usr/bin:/bin"}
    done = subprocess.run(
        [*ALONE, *command, "--engine", "flower"],
        env=env, capture_output=True, text=True, timeout=800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    engine = Ran(tmp_path / "engine")
    assert engine.adapter == local.adapter
    assert [r["evaluation"] for r in engine.rounds] == [r["evaluation"] for r in local.rounds]


def test_flowers_commands_are_found_where_this_interpreter_is(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert commands().split(os.pathsep)[0] == str(Path(sys.executable).parent)
