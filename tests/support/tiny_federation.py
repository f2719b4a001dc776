"""A whole federation on LocalGrid in a second or two, and what it leaves on disk."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from client_app.app import app as client_app
from fedlora import preflight
from fedlora.config.reader import Config
from fedlora.federation.server.loop import FederatedLora
from fedlora.launch.simulate.cards import grid_of
from fedlora.strategies import STRATEGIES

ROOT = Path(__file__).parents[2]
QUICK: dict[str, object] = {
    "run.rounds": 2,
    "clients.count": 3,
    "train.steps": 1,
    "evaluate.clients": False,
    "evaluate.every": 0,
}
EQUAL_RANKS = {name for name, cls in STRATEGIES.items() if cls().needs().equal_ranks}


def quick(name: str, **changes: object) -> dict[str, object]:
    """Settings of a strategy's shortest run, at ranks it can take."""
    return {**QUICK, "strategy.name": name, "clients.ranks": ranks_for(name), **changes}


def ranks_for(name: str) -> str:
    if name in EQUAL_RANKS:
        return "3"
    return {"ravan": "4,8,12", "fed-plora": "2,4,6"}.get(name, "2,3,5")


@dataclass
class Ran:
    """A run's directory, read."""

    directory: Path

    @property
    def rounds(self) -> list[dict[str, Any]]:
        lines = [json.loads(x) for x in (self.directory / "rounds.jsonl").read_text().splitlines()]
        return [{k: x for k, x in line.items() if k != "digest"} for line in lines]

    @property
    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.directory / "summary.json").read_text())
        return found

    @property
    def adapter(self) -> bytes:
        return (self.directory / "adapter" / "adapter_model.safetensors").read_bytes()

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rounds without what a clock says."""
        return [timeless(r) for r in self.rounds]

    def update(self, round: int, client: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """An accepted update's tensors by name, and {"scale": ..., "num_examples": ...}."""
        path = self.directory / f"updates/round-{round:03}/client-{client}.safetensors"
        tensors, notes = read_tensors(path)
        n, scale = int(notes["num_examples"]), json.loads(notes["scale"])
        return tensors, {"num_examples": n, "scale": scale}


def timeless(x: Any) -> Any:
    if isinstance(x, Mapping):
        return {k: timeless(v) for k, v in x.items() if k != "time" and "seconds" not in k}
    return [timeless(v) for v in x] if isinstance(x, list) else x


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as f:
        return {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}  # noqa: SIM118


def directory_of(settings: Mapping[str, object]) -> Path:
    return Path(str(settings["run.out"]), str(settings["run.name"]))


def federate(
    settings: Mapping[str, object],
    app: Callable[..., Any] = client_app,
    before: Callable[[FederatedLora], None] = lambda _: None,
    nodes: Mapping[int, Mapping[str, object]] | None = None,
    unasked: bool = False,
) -> Ran:
    """Run to the end in this process; `before` may reach into the server before it starts.

    `nodes` are the clients' own node configs, as a deployed node has one. unasked: preflight is not
    asked, so that the server is alone with what it finds.
    """
    config = Config.read(settings) if unasked else preflight.read(settings)
    with grid_of(config, app, nodes) as grid:  # type: ignore[arg-type]
        server = FederatedLora(config)
        before(server)
        server.start(grid)
    return Ran(directory_of(settings))


def python(
    code: str, *args: str, timeout: float = 120, environment: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process that sees this project."""
    env = {**environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        env=env, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
