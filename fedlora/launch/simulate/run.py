"""`fedlora simulate`: an experiment on LocalGrid, or on Flower's own simulation engine."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w

from fedlora import preflight
from fedlora.config.reader import Config
from fedlora.errors import CommandError, RoundError
from fedlora.federation.wire.same_machine import SIMULATED
from fedlora.launch.experiment_file import load, meant, unchecked
from fedlora.launch.run import Run
from fedlora.launch.shim import shim
from fedlora.reports import report
from fedlora.reports.console import Observer, Progress, Silent, together
from fedlora.training.quiet import quiet_libraries
from fedlora.training.user_code import is_code, named


def simulate(
    config: Config | Path | str | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    *,
    strategy: Any = None,
    model: Any = None,
    tokenizer: Any = None,
    data: Any = None,
    loss: Any = None,
    metrics: Any = None,
    observers: Sequence[Observer] = (),
    quiet: bool = True,
) -> Run:
    """Run a federation on this machine, as `fedlora simulate` does.

    config: a `Config`, an experiment's file or name, or a mapping of keys; overrides go on top.
    strategy, model, tokenizer, data, loss, metrics: the user's own, as for `Federation`.
    observers: told of each round as it ends; the error of one stops the run, which can go on.
    quiet: print nothing.

    >>> from fedlora import simulate
    >>> run = simulate("quickstart", {
    ...     "run.name": "taste", "run.rounds": 2, "clients.count": 2, "train.steps": 2,
    ...     "data.limit": 300, "data.test-size": 60, "evaluate.baselines": False})
    >>> len(run.rounds)
    3

    Raises:
        ConfigError: it cannot run; with all the reasons, before anything is loaded.
        RoundError: too few clients answered. The run goes on with {"run.resume": True}.
    """
    from fedlora.launch.federation import with_own

    given = config if isinstance(config, Config) else unchecked(config, overrides)
    if isinstance(config, Config) and overrides:
        given = Config.read({**config.flat(), **overrides})
    own = with_own(given, strategy, model, tokenizer, data, loss, metrics)
    preflight.check(own)
    return Run(local(own, {}, quiet, observers))


def local(
    experiment: Config | Path,
    overrides: Mapping[str, Any],
    quiet: bool = False,
    observers: Sequence[Observer] = (),
    attack: str = "",
) -> Path:
    """Run on LocalGrid; the run's directory. A config is one that can run.

    attack: what its one hostile client does, of launch/simulate/hostile.py; empty: it has none.
    """
    quiet_libraries()
    config = experiment if isinstance(experiment, Config) else load(experiment, overrides)

    from fedlora.federation.server.loop import FederatedLora
    from fedlora.launch.client_app import client_app
    from fedlora.launch.simulate.cards import grid_of

    directory = Path(config.run.out, config.run.name)
    app: Any = client_app(value for _, value in named(config))
    if attack:
        from fedlora.launch.simulate.hostile import hostile

        app = hostile(app, attack)
    with (
        Silent() if quiet else Progress(config.run.rounds) as printer,
        _resumable(directory, printer),
        grid_of(config, app) as grid,
    ):
        FederatedLora(config, together([printer, *observers])).start(grid)
    report.write(directory, config.output.plots)
    return directory


def resumed(directory: Path) -> tuple[Path, dict[str, Any]]:
    """The config file of the run in this directory, and the keys that make a run go on there.

    Raises:
        CommandError: no run began there.
    """
    path = directory / "config.toml"
    if not os.path.isfile(path):  # a name of any length
        what = "is a file" if os.path.isfile(directory) else "has no config.toml"
        raise CommandError([f"{directory} {what}: name the directory of a run, as runs/first"])
    where = {"run.resume": True, "run.out": str(directory.parent), "run.name": directory.name}
    return path, {**meant(path), **where}


@contextmanager
def _resumable(directory: Path, observer: Any) -> Iterator[None]:
    """However a run ends early, say how to go on."""
    hint = f"continue with: {shlex.join(['fedlora', 'simulate', '--resume', str(directory)])}"
    try:
        yield
    except KeyboardInterrupt:
        observer.note(f"stopped; {hint}")
        raise
    except Exception as e:  # an observer of the user's own may raise anything
        if (directory / "checkpoint").exists():
            e.add_note(hint)
        raise


# -- Flower's own engine ------------------------------------------------------------------------


def flower(path: Path, overrides: Mapping[str, Any], quiet: bool = False) -> Path:
    """Run the same apps with `flwr run` on Flower's simulation engine (Ray), its traps closed.

    A SuperLink of its own on a free port, in a home of its own, that installs nothing; and the
    run's status read from JSON, since `flwr run` exits 0 when a run has failed, too.
    """
    from fedlora.launch.simulate.flower_resources import resources_of

    quiet_libraries()
    config = _absolute(load(path, overrides))
    resources = resources_of(config)
    config = Config.read({**config.flat(), "simulate.devices": resources.devices})
    directory = Path(config.run.out, config.run.name)
    search = commands()
    if shutil.which("flower-superlink", path=search) is None or not _has_ray():
        raise RoundError("Flower's engine needs Ray: pip install 'fedlora[flower-simulation]'")
    home = directory / "flower"
    app = write_app(home / "app", config)
    port = _free_port()
    environment = {
        **os.environ,
        "PATH": search,
        "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(Path.cwd())]),
        "FLWR_HOME": str(home / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TOKENIZERS_PARALLELISM": "false",
        SIMULATED: "1",
        **resources.environment,
    }
    own = {"address": f"127.0.0.1:{port}", "insecure": True}
    connection = {"superlink": {"default": "own", "own": own}}
    (home / "home").mkdir(parents=True, exist_ok=True)
    (home / "home" / "config.toml").write_text(tomli_w.dumps(connection))
    with (
        Silent() if quiet else Progress(config.run.rounds) as observer,
        _resumable(directory, observer),
        _superlink(port, home, environment),
    ):
        run_id = _submit(app, resources.options, environment)
        _follow(run_id, directory, environment, observer, home)
    report.write(directory, config.output.plots)
    return directory


def commands() -> str:
    """Where Flower's commands are: beside this interpreter, whether or not that is on PATH."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def write_app(directory: Path, config: Config) -> Path:
    """A Flower app of two shims and this config; fedlora itself comes from the environment."""
    directory.mkdir(parents=True, exist_ok=True)
    for kind in ("server", "client"):
        (directory / f"run_{kind}.py").write_text(shim(kind, config))
    (directory / "LICENSE").write_text("Apache-2.0\n")
    project = {
        "project": {
            "name": "fedlora-run",
            "version": "1.0.0",
            "license": {"file": "LICENSE"},
            "dependencies": ["flwr>=1.41,<1.43"],
        },
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "fedlora",
                    "fab-format-version": 1,
                    "flwr-version-target": "1.41.0",
                    "fab-include": ["run_server.py", "run_client.py", "LICENSE"],
                    "components": {"serverapp": "run_server:app", "clientapp": "run_client:app"},
                    "config": config.flat(),
                }
            }
        },
    }
    (directory / "pyproject.toml").write_text(tomli_w.dumps(project))
    return directory


def _absolute(config: Config) -> Config:
    """The same config with local paths made absolute: the apps run in another directory."""
    flat = config.flat()
    flat["run.out"] = str(Path(str(flat["run.out"])).resolve())
    paths = ("model.path", "data.path", "data.test-path", "data.validation-path")
    for key in (*paths, "model.adapter", "output.client-memory"):
        value = str(flat[key])
        if value and not value.startswith("pkg:") and not is_code(value) and Path(value).exists():
            flat[key] = str(Path(value).resolve())
    return Config.read(flat)


@contextmanager
def _superlink(port: int, home: Path, environment: Mapping[str, str]) -> Iterator[None]:
    command = [
        "flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess",
        "--host", "127.0.0.1", "--port", str(port), "--disable-runtime-dependency-installation",
    ]  # fmt: skip
    with (home / "superlink.log").open("w") as log:
        link = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        until = time.monotonic() + 120
        while not _listens(port):
            if link.poll() is not None or time.monotonic() > until:
                raise RoundError(f"Flower's SuperLink did not start; see {home / 'superlink.log'}")
            time.sleep(0.2)
        yield
    finally:
        _stop(link)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the SuperLink and what it started: the session that was made for it."""
    import signal

    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sent)
            process.wait(10)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def _submit(app: Path, federation: str, environment: Mapping[str, str]) -> str:
    command = ["flwr", "run", str(app), "own", "--federation-config", federation]
    done = subprocess.run(
        [*command, "--format", "json"], env=environment, capture_output=True, text=True, check=False
    )
    try:
        return str(_json(done.stdout)["run-id"])
    except (ValueError, KeyError):
        raise RoundError(f"flwr run refused the app: {done.stdout}{done.stderr}") from None


def _follow(
    run_id: str, directory: Path, environment: Mapping[str, str], observer: Any, home: Path
) -> None:
    """Show rounds as they are recorded, until the run has ended; its status says how."""
    seen = 0
    while True:
        status = _status(run_id, environment)
        records = directory / "rounds.jsonl"
        lines = records.read_text().splitlines() if records.exists() else []
        for line in lines[seen:]:
            observer.round_done(json.loads(line))
        seen = len(lines)
        if status.startswith("finished"):
            break
        time.sleep(1.0)
    if status != "finished:completed":
        log = subprocess.run(
            ["flwr", "log", run_id, "own", "--show"],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        (home / "run.log").write_text(log.stdout + log.stderr)
        last = [x for x in log.stdout.splitlines() if "Error" in x][-1:]
        raise RoundError(f"the run ended as {status}: {' '.join(last)} (see {home / 'run.log'})")


def _status(run_id: str, environment: Mapping[str, str]) -> str:
    done = subprocess.run(
        ["flwr", "list", "own", "--run-id", run_id, "--format", "json"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    try:
        return str(_json(done.stdout)["runs"][0]["status"])
    except (ValueError, KeyError, IndexError):
        return "unknown"


def _json(text: str) -> dict[str, Any]:
    """The JSON object in a command's output."""
    found: dict[str, Any] = json.loads(text[text.index("{") : text.rindex("}") + 1])
    return found


def _has_ray() -> bool:
    import importlib.util

    return importlib.util.find_spec("ray") is not None


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as s:
        s.settimeout(0.5)
        return s.connect_ex(("127.0.0.1", port)) == 0
