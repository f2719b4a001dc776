"""The same two apps on Flower's own simulation engine, in a namespace with loopback only."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w
import torch

from fedlora.config.reader import Config
from fedlora.errors import ConfigError
from fedlora.launch.simulate.flower_resources import resources_of
from fedlora.launch.simulate.run import commands
from fedlora.training import devices as accelerators
from fedlora.training.devices import visible
from tests.support.pretend_device import Card, Module, plugged_in
from tests.support.tiny_federation import ROOT, Ran, federate, quick

Settings = Callable[..., dict[str, object]]
ALONE = ["unshare", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "-"]


def namespaces() -> bool:
    if not (shutil.which("unshare") and shutil.which("ip")):
        return False
    return subprocess.run([*ALONE, "true"], capture_output=True, check=False).returncode == 0


needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Flower's engine needs Ray"
)
needs_namespaces = pytest.mark.skipif(
    not namespaces(), reason="no network namespaces here, and Ray listens widely"
)


def engine(given: dict[str, object], tmp_path: Path, **environment: str) -> Ran:
    """The run of these settings on Flower's engine."""
    experiment = tmp_path / "x.toml"
    experiment.write_text(tomli_w.dumps(Config.read({**given, "run.name": "engine"}).flat()))
    command = [sys.executable, "-m", "fedlora.cli", "simulate", str(experiment)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        [*ALONE, *command, "--engine", "flower"],
        env={**env, "PATH": "/usr/sbin:/usr/bin:/bin"},
        capture_output=True, text=True, timeout=800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return Ran(tmp_path / "engine")


@pytest.mark.slow
@needs_ray
@needs_namespaces
def test_flowers_engine_ends_in_the_bytes_of_local_grid(settings: Settings, tmp_path: Path) -> None:
    given = settings(**quick("fedex", **{"evaluate.every": 1}))
    local = federate({**given, "run.name": "local"})
    ran = engine(given, tmp_path)
    assert ran.adapter == local.adapter
    assert [r["evaluation"] for r in ran.rounds] == [r["evaluation"] for r in local.rounds]


@pytest.mark.slow
@needs_ray
@needs_namespaces
def test_on_two_cards_each_process_of_flowers_engine_has_the_one_that_ray_gave_it(
    settings: Settings, cards: list[Card], tmp_path: Path
) -> None:
    """Pretend cards, which obey the variable that Ray sets, and end in the bytes of one."""
    given = settings(**quick("fedex", **{"model.attention": "eager", "clients.count": 4}))
    one = federate({**given, "run.name": "one", "simulate.devices": "pretend:0"})
    log = tmp_path / "log"
    log.mkdir()
    own = {"simulate.devices": "auto", "simulate.workers": 0}
    ran = engine({**given, **own}, tmp_path, **plugged_in(log))
    assert ran.adapter == one.adapter
    said = [json.loads(path.read_text()) for path in log.glob("*.json")]
    used = [{place for place, had in x.items() if had["peak"]} for x in said]
    assert {"1"} in used, used
    assert all(len(x) <= 1 for x in used), "no process used two cards"


@pytest.mark.parametrize(
    ("devices", "workers", "options"),
    [
        ("cpu", 3, "init-args-num-cpus=3"),
        ("auto", 0, "client-resources-num-gpus=1 init-args-num-cpus=2 init-args-num-gpus=2"),
        ("pretend", 1, "client-resources-num-gpus=1 init-args-num-cpus=1 init-args-num-gpus=1"),
        ("auto", 3, "client-resources-num-gpus=0.5 init-args-num-cpus=3 init-args-num-gpus=2"),
        ("auto", 6, "client-resources-num-gpus=0.3333 init-args-num-cpus=6 init-args-num-gpus=2"),
    ],
)
def test_ray_is_told_of_the_cards_and_of_each_processs_share(
    settings: Settings, cards: list[Card], devices: str, workers: int, options: str
) -> None:
    """Flower makes floor(cards / share) processes, and as many as there are processors at most."""
    given = {"simulate.devices": devices, "simulate.workers": workers}
    found = resources_of(Config.read(settings(**given)))
    assert found.options == f"num-supernodes=4 client-resources-num-cpus=1 {options}"
    assert found.devices == ("cpu" if devices == "cpu" else "pretend")
    assert found.environment == {}


def test_one_card_of_two_is_one_in_the_string(settings: Settings, cards: list[Card]) -> None:
    del cards[1]
    try:
        found = resources_of(Config.read(settings(**{"simulate.workers": 0})))
    finally:
        cards.append(Card(1))
    assert found.options.endswith("num-gpus=1 init-args-num-cpus=1 init-args-num-gpus=1")


def test_some_of_the_cards_are_masked_in_the_variable_of_their_kind(
    settings: Settings, cards: list[Card], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerators, "module_of", lambda _: Module)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    two = [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert visible(two) == {}
    assert visible(two[1:]) == {"CUDA_VISIBLE_DEVICES": "1"}
    assert visible(two[::-1]) == {"CUDA_VISIBLE_DEVICES": "1,0"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7f")
    assert visible(two[1:]) == {"CUDA_VISIBLE_DEVICES": "GPU-7f"}
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert visible(two[1:]) == {"HIP_VISIBLE_DEVICES": "1"}
    with pytest.raises(
        ConfigError, match=r"simulate\.devices: Flower's engine cannot be given some"
    ):
        resources_of(Config.read(settings(**{"simulate.devices": "pretend:1"})))


def test_flowers_commands_are_found_where_this_interpreter_is(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert commands().split(os.pathsep)[0] == str(Path(sys.executable).parent)
