"""`up`, `down`, `status`, `run`: a whole deployment on one host."""

import json
import math
import os
import shlex
import signal
import sqlite3
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.config.toml_file import read_toml
from fedlora.errors import ConfigError, DeployError
from fedlora.launch.deploy.bundle import MANIFEST, manifest
from fedlora.launch.deploy.disk import Disk
from fedlora.launch.deploy.expiry import warnings
from fedlora.launch.deploy.log_lines import harmless
from fedlora.launch.deploy.operator import Operator, environment
from fedlora.launch.deploy.plan import CONNECTION, Plan
from fedlora.launch.deploy.registering import (
    register,
    registered,
    registered_file,
    revoked,
    take_new_keys,
)
from fedlora.launch.deploy.scripts import DATABASE
from fedlora.launch.deploy.supervise import end, is_running, read_state, state_file
from fedlora.launch.deploy.watch import check_alone
from fedlora.reports.outcome import judged_by

if TYPE_CHECKING:
    from fedlora.config.reader import Config

Say = Callable[[str], None]
PATIENCE = 300.0
"""Seconds that `follow` bears a SuperLink that does not answer."""
QUIET = 6.0
"""The most seconds in which a command that waits says nothing."""


def up(plan: Plan, say: Say, timeout: float = 180.0) -> None:
    """Start what does not run, register new nodes, and wait until all of them are connected.

    Again and again, too: where all is up nothing happens, and an `up` that was cut short goes on.

    Raises:
        DeployError: it did not come up in time; says where the logs are.
    """
    check_keys(plan)
    until = time.monotonic() + timeout
    state = read_state(plan)
    if not (state and is_running(state["supervisor"])):
        plan.run_directory.mkdir(mode=0o700, exist_ok=True)
        down(plan, say)  # what a killed supervisor left behind
        if not (plan.server / "state.db").exists():
            registered_file(plan).unlink(missing_ok=True)
        _supervise(plan)
        say("starting the server's processes, the workers and the nodes")
    _wait(lambda: healthy(plan), until, plan, "the SuperLink", say)
    say("the SuperLink answers")
    with Operator(plan) as operator:
        if len(registered(plan)) < plan.clients * plan.secure or not registered_file(plan).exists():
            register(plan, operator)
            say(f"{plan.clients} nodes registered")
        take_new_keys(plan, operator, say)
        for name in (gone := revoked(plan, operator)):
            key = plan.directory / "nodes" / name / "node.pub"
            say(
                f"{name} was taken off the SuperLink's list, and is not waited for; to have it "
                f"back: "
                f"flwr supernode register {shlex.quote(str(key))} {CONNECTION} --name {name}"
            )
        due = plan.clients - len(gone)
        _wait(lambda: online(operator) >= due, until, plan, f"all {due} nodes", say)
    say(f"{due} nodes are connected")
    for line in (*warnings(plan), *Disk(plan).news()):
        say(line)


def register_all(plan: Plan, say: Say, timeout: float = 180.0) -> None:
    """Wait for the SuperLink, and make every node's key known to it.

    Raises:
        DeployError: it did not answer in time, or refused one; or a node has no key.
    """
    check_keys(plan)
    plan.run_directory.mkdir(mode=0o700, exist_ok=True)
    _wait(lambda: healthy(plan), time.monotonic() + timeout, plan, "the SuperLink", say)
    with Operator(plan) as operator:
        register(plan, operator)
    say(f"{plan.clients} nodes registered")


def check_keys(plan: Plan) -> None:
    """Nothing, where every node here has its keys.

    Raises:
        DeployError: one has none; says how it gets them.
    """
    for i in range(plan.clients) if plan.secure else ():
        if not (plan.node(i) / "node.key").exists():
            raise DeployError(
                f"node {i} has no keys: they are made on the node, `fedlora node init "
                f"{shlex.quote(str(plan.node(i) / 'node.toml'))}`. For a trial in which all nodes "
                "are on this host, make the deployment with `fedlora deploy init --one-host-trial`"
            )


def _supervise(plan: Plan) -> None:
    """Start the supervisor in a session of its own, for it outlives this process."""
    log = str(plan.run_directory / "supervisor.log")
    command = [sys.executable, "-m", "fedlora.launch.deploy.supervise", str(plan.directory)]
    os.posix_spawn(
        sys.executable,
        command,
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )


def down(plan: Plan, say: Say) -> None:
    """End exactly the processes that `up` started, nodes first. Does nothing where none are."""
    state = read_state(plan)
    if not state:
        return
    if is_running(state["supervisor"]):
        say("ending all processes, the nodes first, so that they sign off")
        os.kill(state["supervisor"]["pid"], signal.SIGTERM)
        _until(lambda: not is_running(state["supervisor"]), time.monotonic() + 90, "their end", say)
    left = [c for c in read_state(plan).get("children", {}).values() if is_running(c)]
    if left:
        say(f"ending {len(left)} processes that a killed supervisor left")
        end([c["pid"] for c in left])
    state_file(plan).unlink(missing_ok=True)
    say("down")


def healthy(plan: Plan) -> bool:
    """Does the SuperLink answer, with the certificate that it should have?"""
    scheme, context = "http", None
    if plan.secure:
        scheme, context = "https", ssl.create_default_context(cafile=plan.server / "ca.crt")
    address = f"{scheme}://127.0.0.1:{plan.port}/health"
    try:
        with urllib.request.urlopen(address, timeout=2, context=context) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def said(plan: Plan, run_id: str, lines: int) -> str:
    """The last lines of what a run's ServerApp printed, as Flower kept them."""
    found = subprocess.run(
        [str(Path(sys.executable).parent / "flwr"), "log", run_id, CONNECTION, "--show"],
        env=environment(plan.directory / "operator"),
        capture_output=True,
        timeout=60,
    )
    return "\n".join(
        map(harmless, found.stdout.decode(errors="replace").rstrip().split("\n")[-lines:])
    )


def shrink(plan: Plan, patience: float = 30.0) -> bool:
    """Give the disk back what the SuperLink's database held of runs that have ended.

    Flower deletes a run's messages once somebody asks for its status, and keeps the file as large
    as it ever was. False where it stays busy for `patience` seconds: it is as before.
    """
    with closing(sqlite3.connect(plan.server / DATABASE, timeout=patience)) as database:
        try:
            database.execute("VACUUM")
        except sqlite3.OperationalError:
            return False
    return True


def online(operator: Operator) -> int:
    return sum(node.get("status") == "online" for node in operator.nodes())


@contextmanager
def operating(plan: Plan) -> Iterator[Operator]:
    """An operator of a deployment that is up here."""
    if not healthy(plan):
        raise DeployError(
            f"no SuperLink answers on 127.0.0.1:{plan.port}; `fedlora deploy up {plan.quoted}`"
        )
    with Operator(plan) as operator:
        yield operator


def start_run(plan: Plan, operator: Operator, overrides: Mapping[str, Any]) -> tuple[str, Path]:
    """Send the app and start a run; its id, and the directory of its results.

    Raises:
        ConfigError: the experiment with these overrides cannot be used. Nothing was sent.
        DeployError: a run of its name is there, or goes on.
    """
    import tomllib

    import tomli_w

    config, results = planned(plan, overrides)
    check_alone(plan, results)
    if (results / "rounds.jsonl").exists() and not config.run.resume:
        ended = (results / "summary.json").exists()
        raise DeployError(
            f"{results} holds a run of this name, {'finished' if ended else 'not finished'}: "
            f"`{resuming(plan, overrides)}` goes on with it, "
            "`--set run.name=another` begins another"
        )
    path = plan.run_directory / "run-config.toml"
    path.write_text(tomli_w.dumps(tomllib.loads(config.toml())))
    (plan.app / MANIFEST).write_text(manifest())
    answer = operator("run", str(plan.app), CONNECTION, "--run-config", str(path))
    return str(answer["run-id"]), results


def planned(plan: Plan, overrides: Mapping[str, Any]) -> "tuple[Config, Path]":
    """The experiment with these overrides, and the directory of its results.

    Raises:
        ConfigError: it cannot be used.
    """
    from fedlora import preflight

    config = preflight.load(plan.app / "pyproject.toml", overrides)
    return config, plan.server / config.run.out / config.run.name


def resuming(plan: Plan, overrides: Mapping[str, Any]) -> str:
    """The command that goes on with a run that was begun with these overrides."""
    given = {key: value for key, value in overrides.items() if key != "run.resume"}
    sets = [f" --set {shlex.quote(_override(key, value))}" for key, value in given.items()]
    return f"fedlora deploy run {plan.quoted} --resume{''.join(sets)}"


def _override(key: str, value: Any) -> str:
    """What `--set` takes for this value."""
    import tomli_w

    from fedlora.config.reader import parse_overrides

    plain = f"{key}={value}"
    if parse_overrides([plain])[key] == value:
        return plain
    return f"{key}={tomli_w.dumps({'x': value}).removeprefix('x = ').strip()}"


def follow(
    operator: Operator,
    run_id: str,
    directory: Path,
    say: Say,
    every: float = 3.0,
    lost: Callable[[], str] = lambda: "",
    seen: int = 0,
    news: Callable[[], Iterable[str]] = tuple,
) -> str:
    """Print each round as it is recorded, until the run ends; the run's last status.

    What it is at is said at once, at each change, and where it lasts, every QUIET seconds.
    lost: says what befell the ServerApp, where that is over before Flower knows it: then so is
    this. seen: so many of the lines are known already. news: what else there is to say by now.
    """
    status, before, heard, first = "pending", "", 0.0, recorded_rounds(directory)
    begun = answered = time.monotonic()
    while not status.startswith("finished"):
        if status != before or time.monotonic() - heard > QUIET:
            say(f"{time.monotonic() - begun:.0f} s: {status}, {_at(directory, seen, first)}")
            before, heard = status, time.monotonic()
        time.sleep(every)
        gone = lost()  # before the status: who stops a run says so before its ServerApp is gone
        try:
            status, answered = operator.status(run_id), time.monotonic()
        except DeployError:  # the SuperLink may be starting again
            if time.monotonic() - answered > PATIENCE:
                raise
            gone = ""
        for line in news():
            say(line)
        lines = _lines(directory)
        for line in lines[min(seen, len(lines)) :]:  # fewer: a resumed run went back
            say(told(json.loads(line)))
            heard = time.monotonic()
        seen = len(lines)
        if gone:
            break
    return status


def recorded_rounds(directory: Path) -> int:
    """How many rounds are on record there, round 0 among them."""
    return len(_lines(directory))


def _lines(directory: Path) -> list[str]:
    """The whole lines of rounds.jsonl: a killed ServerApp's last may be half."""
    path = directory / "rounds.jsonl"
    text = path.read_text() if path.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def _at(directory: Path, recorded: int, first: int) -> str:
    """What a run is at that has recorded so many rounds. first: when it went on, or was begun."""
    if first and recorded in (0, first):
        return f"on after round {first - 1}"
    if recorded and recorded > _rounds(directory):
        return "after the last round: the last scores are taken, the adapter is written"
    if recorded:
        return f"round {recorded} under way"
    return (
        "before round 1: model and rows are loaded, any baselines scored, the nodes asked who they "
        "are"
    )


def _rounds(directory: Path) -> float:
    """How many rounds the run has, by the config in its directory."""
    with suppress(ConfigError):
        return float(read_toml(directory / "config.toml")[0]["run"]["rounds"])
    return math.inf


def told(record: Mapping[str, Any]) -> str:
    """A round in one line."""
    scores = record.get("evaluation") or {}
    parts = [f"round {record['round']}"]
    if record.get("train_loss") is not None:
        parts.append(f"train loss {record['train_loss']:.4f}")
    parts += [f"{k} {scores[k]:.4f}" for k in (judged_by([scores]).key, "loss") if k in scores]
    parts.append(f"{len(record['accepted'])} of {len(record['cohort'])} replies")
    parts += [f"client {f['client']}: {f['reason']}" for f in record["failures"]]
    parts.append(f"{record['seconds']['total']:.1f} s")
    return ", ".join(parts)


def _wait(done: Callable[[], bool], until: float, plan: Plan, what: str, say: Say) -> None:
    if not _until(done, until, what, say):
        raise DeployError(
            f"{what} did not come up in time; see the logs in {plan.run_directory}, then "
            f"`fedlora deploy down {plan.quoted}`"
        )


def _until(done: Callable[[], bool], until: float, what: str, say: Say) -> bool:
    """Wait, and say for what every QUIET seconds. False where it is not done in time."""
    begun = heard = time.monotonic()
    while not done():
        if (now := time.monotonic()) > until:
            return False
        if now - heard > QUIET:
            say(f"{now - begun:.0f} s: waiting for {what}")
            heard = now
        time.sleep(0.2)
    return True
