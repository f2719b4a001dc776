"""A run that is begun again by itself, from its checkpoint, where its ServerApp died or hung.

What became of a ServerApp is asked of its record and of its process, so nothing waits for the
minute after which Flower gives it up. One that ended by an error of its own is left alone: the
error would come again.
"""

import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from fedlora.errors import DeployError
from fedlora.launch.deploy.disk import Disk
from fedlora.launch.deploy.expiry import warnings
from fedlora.launch.deploy.host import (
    PATIENCE,
    Say,
    follow,
    healthy,
    planned,
    recorded_rounds,
    resuming,
    start_run,
)
from fedlora.launch.deploy.operator import Operator
from fedlora.launch.deploy.plan import CONNECTION, Plan
from fedlora.launch.deploy.watch import ServerWatch, going


def run(
    plan: Plan,
    operator: Operator,
    overrides: Mapping[str, Any],
    attempts: int,
    say: Say,
    every: float = 3.0,
) -> tuple[str, Path, str]:
    """Run the experiment to its end: Flower's id and last status, and the run's directory.

    attempts: how often it is begun again, from the checkpoint, because its ServerApp died, did not
    answer or lost the SuperLink; never where it ended by an error of its own, or was stopped.

    Raises:
        ConfigError, DeployError: it cannot be begun.
    """
    for line in warnings(plan):
        say(line)
    run_id, results = _under_way(plan, overrides, say) or start_run(plan, operator, overrides)
    try:
        return _to_its_end(plan, operator, overrides, attempts, say, every, run_id, results)
    except KeyboardInterrupt:
        say(
            f"the run goes on without this command, and nobody begins it again: `"
            f"{resuming(plan, overrides)}` follows it; to end it: FLWR_HOME={plan.quoted}/operator "
            f"flwr stop {shlex.quote(run_id)} {CONNECTION}"
        )
        raise


def _under_way(plan: Plan, overrides: Mapping[str, Any], say: Say) -> tuple[str, Path] | None:
    """The run that is to go on, where it does already: it is followed, and not begun twice."""
    if not overrides.get("run.resume"):
        return None
    _, results = planned(plan, overrides)
    for run_id, pid in going(plan, results):
        say(f"it is going on already, in process {pid}")
        return run_id, results
    return None


def _to_its_end(
    plan: Plan,
    operator: Operator,
    overrides: Mapping[str, Any],
    attempts: int,
    say: Say,
    every: float,
    run_id: str,
    results: Path,
) -> tuple[str, Path, str]:
    """As `run`, of a run that was begun."""
    seen, disk = 0, Disk(plan)
    for again in range(attempts + 1):
        say(f"run {run_id}; results in {results}")
        watch = ServerWatch(plan, run_id)
        news = partial(_news, watch, disk)
        status = follow(operator, run_id, results, say, every, watch.lost, seen, news)
        if not (why := watch.why_again(status)):
            break
        watch.end()
        with suppress(DeployError):  # Flower may have given it up by itself
            operator("stop", run_id, CONNECTION)
        if again == attempts:
            say(f"the ServerApp {why}; it was begun again {attempts} times, and that is enough")
            status = "finished:failed"
            break
        say(f"the ServerApp {why}: on from the checkpoint, time {again + 1} of {attempts}")
        _wait_for_superlink(plan, overrides)
        seen = recorded_rounds(results)
        run_id, results = start_run(plan, operator, {**overrides, "run.resume": True})
    return run_id, results, status


def _news(watch: ServerWatch, disk: Disk) -> Iterator[str]:
    """What there is to say beside the rounds: of the ServerApp, and of the server's disk."""
    yield from watch.notes()
    yield from disk.news()


def _wait_for_superlink(plan: Plan, overrides: Mapping[str, Any]) -> None:
    until = time.monotonic() + PATIENCE
    while not healthy(plan):
        if time.monotonic() > until:
            raise DeployError(
                f"no SuperLink answers any more; `fedlora deploy up {plan.quoted}`, then "
                f"`{resuming(plan, overrides)}`"
            )
        time.sleep(0.5)
