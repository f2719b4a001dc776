"""The keys with which a finished run goes on to more rounds."""

import shlex
from pathlib import Path
from typing import Any

from fedlora.config.fields import flat_list
from fedlora.config.run_section import EXTENSIONS
from fedlora.errors import BudgetSpent, CheckpointError, ConfigError
from fedlora.federation.server.journal import Journal, Member, Saved, state_types
from fedlora.launch.experiment_file import of_run
from fedlora.privacy.extension import problems
from fedlora.reports.record_types import SummaryRecord, record_in


def extended(directory: Path, rounds: int, schedule: str = "restart") -> dict[str, Any]:
    """The keys that make the finished run in this directory go on to so many rounds in all.

    Of a run that was killed as it was extended so, none: it is resumed.

    Raises:
        ConfigError: there is no such schedule.
        CheckpointError: it is not at its end, was stopped before, has as many rounds already, or
            has no checkpoint.
        BudgetSpent: its privacy budget does not allow so many.
    """
    if schedule not in EXTENSIONS:
        raise ConfigError([f"--schedule {schedule}: must be one of {', '.join(EXTENSIONS)}"])
    where = {"run.out": str(directory.parent), "run.name": directory.name}
    config = of_run(directory / "config.toml", where)
    run, again = config.run, shlex.join(["fedlora", "simulate", "--resume", str(directory)])
    summary = record_in(SummaryRecord, directory / "summary.json")
    last = next(reversed(run.extended), "")
    if not summary and rounds == run.rounds and last.endswith(f":{schedule}"):
        return {}
    if not summary:
        raise CheckpointError(
            f"{directory} has not come to its end, round {run.rounds}, so it cannot be extended; "
            f"go on to there first: {again}"
        )
    if stopped := summary.get("stopped"):
        raise CheckpointError(f"{directory} cannot be extended: it was stopped {stopped}")
    if why := (summary.get("chosen") or {}).get("ended"):
        raise CheckpointError(f"{directory} cannot be extended: it ended {why}")
    if rounds <= run.rounds:
        raise CheckpointError(
            f"--rounds {rounds}: {directory} has {run.rounds} rounds already; name more, all of "
            "them together"
        )
    strategy = config.build_strategy()
    if (found := Journal(config).last(Saved, Member, *state_types(strategy))) is None:
        raise CheckpointError(f"{directory} has no checkpoint, so it cannot be extended")
    if over := [*problems(config, found[0].token, rounds - run.rounds)]:
        raise BudgetSpent(f"{directory} cannot be extended: {over[0]}")
    ends = [*run.extended, f"{run.rounds}:{schedule}"]
    return {"run.rounds": rounds, "run.extended": flat_list(ends)}
