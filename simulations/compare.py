"""`fedlora compare`: one experiment, many strategies and seeds, one table.

    fedlora compare mixed-ranks --strategies all --seeds 0,1,2,3,4
    fedlora compare many-clients --equal bytes --set run.rounds=6
    fedlora compare synthetic

An experiment is a config file, and may say in its [compare] table what to compare:

    [compare]
    strategies = ["fedavg", "ffa"]      what --strategies means by default
    seeds = [0, 1, 2]
    [compare.set.ffa]                   keys of one strategy: its own learning rate, say
    "train.lr" = 0.02
    [compare.variants.fifty]            the whole grid once for each variant
    "clients.count" = 50
    [compare.full]                      keys of --full
    "data.limit" = 0

Each cell, one variant x strategy x seed, is a run of `fedlora simulate` in a process of its own,
in OUT/cells/VARIANT/STRATEGY/seed-N, forked from one that has imported everything. Cells that are
done are kept, ones that were begun go on, so the same command continues a grid that was stopped.
What a strategy refuses is in the table too.

--equal bytes gives every strategy as many rounds as it takes to move the bytes that the first one
moves in run.rounds, measured by two rounds of one step, at most MOST_ROUNDS times run.rounds.
"""

import functools
import json
import multiprocessing
import os
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from fedlora.config import Config
from fedlora.console import printable
from fedlora.errors import ConfigError, FedLoraError
from fedlora.journal import NOT_THE_EXPERIMENT
from fedlora.strategies import STRATEGIES
from fedlora.units import duration
from simulations.compare_table import Row, row, write

SHIPPED = Path(__file__).parent / "experiments"
MOST_ROUNDS = 4
PRELOAD = ["fedlora.server", "client_app.app", "simulations.grid", "simulations.run"]
REFUSED = ("ConfigError", "StrategyError")


@dataclass(frozen=True)
class Experiment:
    """A config file and its [compare] table."""

    path: Path
    claim: str
    """The comment that the file begins with."""
    strategies: Sequence[str]
    seeds: Sequence[int]
    settings: Mapping[str, Mapping[str, Any]]
    variants: Mapping[str, Mapping[str, Any]]
    full: Mapping[str, Any]

    @classmethod
    def load(cls, name: str) -> "Experiment":
        """By path, or by the name of one that is shipped.

        Raises:
            ConfigError: it is not there, or its [compare] table has a key that is none.
        """
        path = Path(name) if Path(name).exists() else SHIPPED / f"{name}.toml"
        if not path.exists():
            have = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.toml")))
            raise ConfigError([f"{name}: no such file, nor one of {have}, synthetic"])
        text = path.read_text()
        try:
            table = tomllib.loads(text).get("compare", {})
        except tomllib.TOMLDecodeError as e:
            raise ConfigError([f"{path}: not TOML: {e}"]) from None
        known = {"strategies", "seeds", "set", "variants", "full"}
        if wrong := sorted(set(table) - known):
            raise ConfigError([f"{path}: compare.{wrong[0]}: must be one of {sorted(known)}"])
        comment = []
        for line in text.splitlines():
            if not line.startswith("#"):
                break
            if not line.startswith("#     fedlora "):
                comment.append(line.removeprefix("#").strip())
        return cls(
            path,
            "\n".join(comment).strip(),
            table.get("strategies", list(STRATEGIES)),
            table.get("seeds", [0, 1, 2]),
            table.get("set", {}),
            table.get("variants", {"": {}}),
            table.get("full", {}),
        )


@dataclass
class Cell:
    """One run of the grid."""

    variant: str
    strategy: str
    seed: int
    directory: Path
    given: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    """Why it has no result, where it has none."""

    @property
    def name(self) -> str:
        return " ".join(x for x in (self.variant, self.strategy, f"seed {self.seed}") if x)

    @property
    def done(self) -> bool:
        summary = self.directory / "summary.json"
        return summary.exists() and not json.loads(summary.read_text()).get("stopped")


def chosen(strategies: str | None, experiment: Experiment) -> list[str]:
    """ "all", "a,b", or what the experiment says.

    Raises:
        ConfigError: one of them is none; lists those that are.
    """
    names = list(experiment.strategies)
    if strategies:
        names = [*STRATEGIES] if strategies == "all" else strategies.replace(" ", "").split(",")
    if wrong := [n for n in names if n not in STRATEGIES]:
        raise ConfigError([f"--strategies: {wrong[0]} is none of {', '.join(STRATEGIES)}"])
    return names


def cells(
    experiment: Experiment,
    names: Sequence[str],
    seeds: Sequence[int],
    overrides: Mapping[str, Any],
    out: Path,
    full: bool,
) -> list[Cell]:
    """The grid, seed by seed, so that a grid that is stopped early compares like with like."""
    grid = []
    for seed in seeds:
        for variant, changes in experiment.variants.items():
            for name in names:
                path = out / "cells" / (variant or "all") / name / f"seed-{seed}"
                given = {
                    **(experiment.full if full else {}),
                    **changes,
                    **experiment.settings.get(name, {}),
                    **overrides,
                    "strategy.name": name,
                    "run.seed": seed,
                    "run.out": str(path.parent),
                    "run.name": path.name,
                    "output.plots": False,
                    "simulate.workers": 1,
                    "evaluate.baselines": name == names[0]
                    and variant == next(iter(experiment.variants)),
                }
                grid.append(Cell(variant, name, seed, path, given))
    return grid


def run(experiment: Experiment, grid: Sequence[Cell], workers: int, say: Any = print) -> None:
    """Run what is not done, `workers` cells at a time, saying each as it ends."""
    todo = [c for c in grid if not _settled(c, experiment)]
    if kept := len(grid) - len(todo):
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
                _, begun = running.pop(place)
                cell = todo[place]
                count += 1
                _finish(cell)
                took = duration(time.monotonic() - begun)
                say(f"[{count}/{len(todo)}] {cell.name}: {_result(cell)}  {took}")
    finally:
        for process, _ in running.values():
            process.terminate()


def equal_bytes(
    experiment: Experiment, grid: Sequence[Cell], workers: int, say: Any = print
) -> None:
    """Give every cell the rounds that move the first strategy's bytes."""
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
        rounds = Config.load(experiment.path, mine[0].given).run.rounds
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
        found.append(row(variant, name, STRATEGIES[name]().promise, done, reason))
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
) -> Path:
    """The whole command; the directory with table.csv, table.md and table.html."""
    experiment = Experiment.load(name)
    size = ("-full" if full else "") + ("-bytes" if equal == "bytes" else "")
    out = out or Path("runs", "compare", experiment.path.stem + size)
    names = chosen(strategies, experiment)
    grid = cells(experiment, names, seeds or experiment.seeds, overrides, out, full)
    if equal == "bytes":
        equal_bytes(experiment, grid, workers)
    run(experiment, grid, workers)
    write(out, experiment.path.stem, experiment.claim, rows(grid), _command())
    return out


# -- one cell -------------------------------------------------------------------------------------


def _settled(cell: Cell, experiment: Experiment) -> bool:
    """Whether the cell needs no process: it is done, or its config is refused.

    Raises:
        FedLoraError: it was run with another configuration.
    """
    try:
        config = Config.load(experiment.path, cell.given)
    except ConfigError as e:
        cell.reason = "; ".join(e.problems)
        return True
    if (cell.directory / "config.toml").exists():
        was = Config.load(cell.directory / "config.toml").flat()
        differ = [
            key for key, value in config.flat().items()
            if was[key] != value and not key.startswith(NOT_THE_EXPERIMENT)
        ]  # fmt: skip
        if differ:
            raise FedLoraError(
                f"{cell.directory} was run with another {differ[0]} ({was[differ[0]]!r}); choose "
                "another --out, or remove it"
            )
    return cell.done


def _start(cell: Cell, experiment: Experiment) -> BaseProcess:
    arguments = ["fedlora", "simulate", "--quiet"]
    if (cell.directory / "checkpoint").exists():
        arguments += ["--resume", str(cell.directory)]
    else:
        config = Config.load(experiment.path, cell.given)
        cell.directory.parent.mkdir(parents=True, exist_ok=True)
        path = cell.directory.with_suffix(".toml")
        path.write_text(config.toml())
        (cell.directory / "rounds.jsonl").unlink(missing_ok=True)  # begun, without a checkpoint
        arguments.append(str(path))
    process = _forkserver().Process(
        target=_cell, args=(arguments, str(cell.directory.with_suffix(".log")))
    )
    process.start()
    return process


@functools.cache
def _forkserver() -> ForkServerContext:
    """What cells are forked from: a process that has imported everything and computed nothing."""
    os.environ["OMP_NUM_THREADS"] = "1"  # cells share the cores
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def _cell(arguments: list[str], log: str) -> None:
    """One run, as the command would do it, with all it says in the log."""
    with Path(log).open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = arguments
    from fedlora.cli import main as command

    command()


def _finish(cell: Cell) -> None:
    """Why a cell that did not end well did not."""
    if cell.done:
        return
    text = cell.directory.with_suffix(".log").read_text(errors="replace").strip()
    kinds = [f"{kind}: " for kind in (*REFUSED, "Error")]
    at = next((text.rindex(k) for k in kinds if k in text), max(0, len(text) - 300))
    start = text.rfind("\n", 0, at) + 1
    cell.reason = " ".join(printable(text[start:].replace("\n", " ")).split())[:600]


def _result(cell: Cell) -> str:
    if not cell.done:
        return cell.reason.split(": ", 1)[0] if cell.reason else "no result"
    found = row("", cell.strategy, "", [cell.directory])
    return found.metric.text(found.score[0]) if found.score else "done"


def _bytes(directory: Path) -> tuple[float, float]:
    """One-time bytes, and those of a round after it."""
    lines = [json.loads(x) for x in (directory / "rounds.jsonl").read_text().splitlines()]
    first, second = (sum(r["bytes"].values()) for r in lines[1:3])
    return max(0.0, first - second), second


def _command() -> str:
    return " ".join(["fedlora", *sys.argv[1:]])
