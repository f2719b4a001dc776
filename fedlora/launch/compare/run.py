"""`fedlora compare`: one experiment, many strategies and seeds, one table.

    fedlora compare mixed-ranks --strategies all --seeds 0,1,2,3,4
    fedlora compare many-clients --equal bytes --set run.rounds=6
    fedlora compare synthetic

An experiment is a config file, and may say in its [compare] table what to compare:

    [compare]
    strategies = ["fedavg", "ffa"]      what --strategies means by default
    seeds = [0, 1, 2]
    base = "fifty"                      a variant: differences are from it, strategy by strategy
    [compare.set.ffa]                   keys of one strategy: its own learning rate, say
    "train.lr" = 0.02
    [compare.variants.fifty]            the whole grid once for each variant
    "clients.count" = 50
    [compare.variants.fifty.set.ffa]    keys of one strategy in it, over those above
    "train.lr" = 0.04
    [compare.variants.poisoned]
    hostile = "flipped"                 one client that means harm: launch/simulate/hostile.py
    [compare.full]                      keys of --full
    "data.limit" = 0
    [compare.quick]                     keys of --quick, with strategies of its own, on one seed
    strategies = ["ffa"]
    [compare.search]                    chosen for each strategy and variant from these
    "train.lr" = [0.001, 0.01]

Each cell, one variant x strategy x seed, is a run of `fedlora simulate` in a process of its own,
in OUT/cells/VARIANT/STRATEGY/seed-N, forked from one that has imported everything. Cells that are
done are kept, ones that were begun go on, so the same command continues a grid that was stopped.
What a strategy refuses is in the table too.

A key in [compare.search] is given to each strategy as it does best with on validation rows: before
the grid, one run of half the rounds for each of its values, on a seed that the grid has not; the
best two again on two fresh seeds, by which the winner is named. --set of it ends the search.

--rates own gives every strategy its default train.lr, --rates own,0.004 the grid a second time at
that rate for all; `rates = ["own"]` in [compare] is the same.

--equal bytes gives every strategy as many rounds as it takes to move the bytes that the first one
moves in run.rounds, measured by two rounds of one step, at most MOST_ROUNDS times run.rounds.
"""

import functools
import math
import multiprocessing
import os
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from fedlora.config.older import of_strategy
from fedlora.config.origins import BY_MODULES, RECORD, origin
from fedlora.config.processes import can_fork, end_with_parent
from fedlora.config.reader import NOT_THE_EXPERIMENT
from fedlora.errors import CompareError, ConfigError, FedLoraError, StrategyError
from fedlora.launch.compare.experiment import (
    FRESH_SEEDS,
    OWN,
    SEARCH_SEED,
    Cell,
    Experiment,
    again,
    cells,
    chosen,
    trials,
)
from fedlora.launch.compare.row import Row, row
from fedlora.launch.compare.table import MARK, write
from fedlora.launch.experiment_file import load, of_run
from fedlora.launch.guard import guarded
from fedlora.launch.simulate.run import local, resumed
from fedlora.reports.console import printable
from fedlora.reports.outcome import finite, judged_by
from fedlora.reports.record_types import RoundRecord, SummaryRecord, record_in
from fedlora.reports.run_files import records
from fedlora.reports.units import duration
from fedlora.strategies import list_strategies

MOST_ROUNDS = 4
PRELOAD = [
    "fedlora.federation.server.loop",
    "fedlora.launch.client_app",
    "fedlora.launch.simulate.grid",
    "fedlora.launch.simulate.run",
]
REFUSED = ("ConfigError", "StrategyError")
REFUSAL = 3
"""How a cell's process ends where its config or strategy cannot run."""


def run(experiment: Experiment, grid: Sequence[Cell], workers: int, say: Any = print) -> None:
    """Run what is not done, `workers` cells at a time, saying each as it ends."""
    todo = [c for c in grid if not _settled(c, experiment)]
    if kept := sum(c.done for c in grid if not c.refused):
        say(f"{kept} of {len(grid)} cells are done already")
    waiting = list(todo)
    running: dict[int, tuple[BaseProcess, float]] = {}  # by the cell's place
    count = 0
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                place = len(todo) - len(waiting)
                running[place] = (_start(waiting.pop(0), experiment), time.monotonic())
            time.sleep(0.2)
            for place in [n for n, (p, _) in running.items() if not p.is_alive()]:
                process, begun = running.pop(place)
                cell = todo[place]
                count += 1
                cell.refused = process.exitcode == REFUSAL
                _finish(cell)
                took = duration(time.monotonic() - begun)
                say(f"[{count}/{len(todo)}] {cell.name}: {_result(cell)}  {took}")
    finally:
        for process, _ in running.values():
            process.terminate()


def search(
    experiment: Experiment,
    grid: Sequence[Cell],
    overrides: Mapping[str, Any],
    out: Path,
    workers: int,
    say: Any = print,
) -> None:
    """Give every cell the values in [compare.search] with which its strategy scores best.

    The best few of one seed run again on fresh ones, which alone name the winner. Of equals it is
    the first. A strategy whose config is refused keeps what it has.

    Raises:
        ConfigError: the grid has a seed of the search, whose choice would then be no stranger's.
    """
    keys = {k: values for k, values in experiment.search.items() if k not in overrides}
    if not keys:
        return
    if taken := sorted({cell.seed for cell in grid} & {SEARCH_SEED, *FRESH_SEEDS}):
        raise ConfigError([f"--seeds {taken[0]}: [compare.search] runs on it; take another"])
    say(f"half the rounds with each of the values of {', '.join(keys)}")
    groups = trials(experiment, grid, keys, out)
    run(experiment, [t for tried in groups.values() for t in tried], workers, say)
    fresh = {group: again(tried, _standing) for group, tried in groups.items()}
    if runs := [t for tried in fresh.values() for t in tried]:
        say("the best of them again, on fresh seeds")
        run(experiment, runs, workers, say)
    for (variant, name), tried in groups.items():
        best = winner(fresh[variant, name] or tried)
        for cell in grid:
            if (cell.variant, cell.strategy) == (variant, name):
                cell.searched = best.searched
                cell.given.update(best.searched)


def winner(tried: Sequence[Cell]) -> Cell:
    """A trial of the values whose trials stand highest in the mean; of equals the first."""
    standings: dict[str, list[float]] = {}
    for cell in tried:
        standings.setdefault(repr(cell.searched), []).append(_standing(cell))
    return max(tried, key=lambda cell: statistics.fmean(standings[repr(cell.searched)]))


def _standing(cell: Cell) -> float:
    """A run's score with its sign turned where lower is better; the worst without one.

    On its validation rows; on its test rows only where its data are made by code, which gives the
    server no others.
    """
    path = cell.directory / "summary.json"
    found = record_in(SummaryRecord, path) if cell.done else {}
    scores = found.get("validation") or found.get("final")
    metric = judged_by([scores])
    value = finite(scores, metric.key)
    if value is None:
        return -math.inf
    return value if metric.better(1, 0) else -value


def equal_bytes(
    experiment: Experiment, grid: Sequence[Cell], workers: int, say: Any = print
) -> None:
    """Give every cell as many rounds as move the bytes of the first strategy."""
    sizes: dict[tuple[str, str], Cell] = {}
    for cell in grid:
        key = (cell.variant, cell.strategy)
        if key not in sizes:
            path = cell.directory.parent / "bytes"
            small = {
                "run.rounds": 2, "train.steps": 1, "evaluate.every": 0, "evaluate.clients": False,
                "evaluate.baselines": False, "run.name": path.name, "personalize.epochs": 0.0,
                "personalize.alone": False,
            }  # fmt: skip
            given = {**cell.given, **small}
            sizes[key] = Cell(cell.variant, cell.strategy, cell.seed, path, given)
    say("two rounds of one step each, to count bytes")
    run(experiment, list(sizes.values()), workers, say)
    budgets: dict[str, float] = {}
    for (variant, name), cell in sizes.items():
        if not cell.done:
            continue
        once, per_round = _bytes(cell.directory)
        mine = [c for c in grid if (c.variant, c.strategy) == (variant, name)]
        rounds = load(experiment.path, mine[0].given).run.rounds
        budget = budgets.setdefault(variant, once + rounds * per_round)
        fits = int((budget - once) / per_round)
        for c in mine:
            c.given["run.rounds"] = max(1, min(fits, MOST_ROUNDS * rounds))


def rows(grid: Sequence[Cell]) -> list[Row]:
    """The table: one row for each variant and strategy."""
    found = []
    for variant, name in dict.fromkeys((c.variant, c.strategy) for c in grid):
        mine = [c for c in grid if (c.variant, c.strategy) == (variant, name)]
        reason = next((c.reason for c in mine if c.reason), "")
        done = [c.directory for c in mine if c.done]
        found.append(row(variant, name, list_strategies()[name]().promise, done, reason))
        found[-1].searched = mine[0].searched
    return found


def main(
    name: str,
    strategies: str | None,
    seeds: Sequence[int] | None,
    overrides: Mapping[str, Any],
    equal: str,
    out: Path | None,
    full: bool,
    workers: int,
    quick: bool = False,
    rates: Sequence[str | float] = (),
) -> Path:
    """The whole command; the directory with table.csv, table.md and table.html.

    Raises:
        ConfigError: nothing of it can run, or it says two things.
        CompareError: cells began and died. The table is written, and says so too.
    """
    experiment = Experiment.load(name)
    size = ("-full" if full else "-quick" if quick else "") + ("-bytes" if equal == "bytes" else "")
    experiment = experiment.small() if quick else experiment
    if rates and "train.lr" in overrides:
        raise ConfigError(["--rates: so does --set train.lr say what the rate is; leave one out"])
    if "train.lr" not in overrides:
        experiment = experiment.at_rates(rates or experiment.rates)
    out = out or Path("runs", "compare", experiment.path.stem + size)
    names = chosen(strategies, experiment)
    grid = cells(experiment, names, seeds or experiment.seeds, overrides, out, full or quick)
    search(experiment, grid, overrides, out, workers)
    if equal == "bytes":
        equal_bytes(experiment, grid, workers)
    run(experiment, grid, workers)
    found = rows(grid)
    write(
        out, experiment.path.stem, experiment.claim, found, _command(), experiment.search,
        experiment.base,
    )  # fmt: skip
    if all(c.refused for c in grid):
        raise ConfigError([*dict.fromkeys(c.reason for c in grid)])
    if died := [c for c in grid if not c.done and not c.refused]:
        first = died[0]
        raise CompareError(
            f"{len(died)} of {len(grid)} cells began and died; the first is {first.name}: "
            f"{first.reason or 'no result'}\nits log: {first.beside('log')}; the table of the "
            f"others: {out / 'table.md'}; mend the cause, then give the same command"
        )
    return out


# -- one cell -------------------------------------------------------------------------------------


def _settled(cell: Cell, experiment: Experiment) -> bool:
    """Whether the cell needs no process: it is done, or its config is refused.

    Raises:
        FedLoraError: it was run with another configuration.
    """
    try:
        config = load(experiment.path, cell.given)
    except ConfigError as e:
        cell.reason, cell.refused = "; ".join(e.problems), True
        return True
    if (cell.directory / "config.toml").exists():
        was = of_run(cell.directory / "config.toml").flat()
        differ = [
            key for key, value in config.flat().items()
            if was[key] != value and not key.startswith(NOT_THE_EXPERIMENT)
            and not (key == "lora.places" and not value)
            and not (key == "train.lr" and BY_MODULES in config.run.defaults
                     and origin(was[RECORD], key, was[key]))
            and of_strategy(key) in ("", cell.strategy)
        ]  # fmt: skip
        if differ:
            raise FedLoraError(
                f"{cell.directory} was run with another {differ[0]} ({was[differ[0]]!r}); choose "
                "another --out, or remove it"
            )
    return cell.done


def _start(cell: Cell, experiment: Experiment) -> BaseProcess:
    changes: dict[str, Any] = {}
    if (cell.directory / "checkpoint").exists():
        path, changes = resumed(cell.directory)
    else:
        config = load(experiment.path, cell.given)
        cell.directory.parent.mkdir(parents=True, exist_ok=True)
        path = cell.beside("toml")
        path.write_text(config.toml())
        (cell.directory / "rounds.jsonl").unlink(missing_ok=True)  # begun, without a checkpoint
    given = (path, changes, str(cell.beside("log")), cell.hostile)
    process = _context().Process(target=_cell, args=given)
    process.start()
    return process


@functools.cache
def _context() -> ForkServerContext | SpawnContext:
    """What cells are forked from: a process that has imported everything and computed nothing."""
    os.environ["OMP_NUM_THREADS"] = "1"  # cells share the cores
    if not can_fork():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def _cell(path: Path, changes: Mapping[str, Any], log: str, attack: str) -> None:
    """One run, as `fedlora simulate --quiet` does it, with all it says in the log."""
    with Path(log).open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    end_with_parent()
    with guarded():
        try:
            local(path, changes, quiet=True, attack=attack)
        except (ConfigError, StrategyError) as e:
            print(f"{type(e).__name__}: {e}", file=sys.stderr)
            sys.exit(REFUSAL)


def _finish(cell: Cell) -> None:
    """Why a cell that did not end well did not."""
    if cell.done:
        return
    log = cell.beside("log")
    text = log.read_text(errors="replace").strip() if log.exists() else "it ended before it began"
    kinds = [f"{kind}: " for kind in (*REFUSED, "Error")]
    at = next((text.rindex(k) for k in kinds if k in text), max(0, len(text) - 300))
    start = text.rfind("\n", 0, at) + 1
    cell.reason = " ".join(printable(text[start:].replace("\n", " ")).split())[:600]


def _result(cell: Cell) -> str:
    if not cell.done:
        return cell.reason.split(": ", 1)[0] if cell.reason else "no result"
    found = row("", cell.strategy, "", [cell.directory])
    told = found.metric.text(found.score[0]) if found.score else "done"
    return f"{told} {MARK}" if found.warnings else told


def _bytes(directory: Path) -> tuple[float, float]:
    """One-time bytes, and those of a round after it."""
    lines = [*records(RoundRecord, directory / "rounds.jsonl")]
    beforehand, first, second = (sum(r["bytes"].values()) for r in lines[:3])
    return beforehand + max(0.0, first - second), second


def parse_rates(text: str) -> list[str | float]:
    """ "own,0.004" as rates.

    Raises:
        ValueError: one is neither "own" nor a number above 0, or two are the same.
    """
    found: list[str | float] = [x if x == OWN else float(x) for x in text.split(",")]
    if len({*found}) < len(found) or not all(x == OWN or 0 < float(x) <= 1e6 for x in found):
        raise ValueError(text)
    return found


def _command() -> str:
    return shlex.join(["fedlora", *sys.argv[1:]])
