"""The privacy lab: what an experiment's privacy costs, and what attacks get out of it.

    fedlora privacy audit simulations/experiments/privacy.toml
    fedlora privacy audit simulations/experiments/privacy.toml --quick

    utility      accuracy by strategy and epsilon, beside a linear probe under the same epsilon
    membership   LiRA-lite and the loss threshold on models; the server's seat on single updates
    canaries     a measured lower bound on epsilon, and the same with bugs planted
    inversion    how much of a sentence one upload gives away, by strategy, rank and budget

An experiment may say in its [audit] table what the lab compares:

    [audit]
    epsilons = [0, 8, 3, 1]             0: without privacy
    strategies = ["fedavg", "ffa"]
    seeds = [0, 1]
    [audit.open]                        keys where there is no privacy
    "train.optimizer" = "adamw"
    [audit.at.1]                        keys at epsilon 1
    [audit.set.fedsb]                   keys of one strategy, whatever the budget
    [audit.quick]                       keys of --quick

Each measurement is a row in a file of its own, OUT/rows/NAME.json, so what is done is not done
again: the same command goes on where it was stopped. The report is OUT/privacy.html.
"""

import itertools
import json
import os
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedlora import preflight
from fedlora.config.reader import Config
from fedlora.errors import ConfigError, FedLoraError
from fedlora.launch.experiment_file import load
from fedlora.launch.lab import attacks, utility
from fedlora.lora.tree_file import write_atomically
from fedlora.reports.units import duration
from fedlora.strategies import STRATEGIES

Row = dict[str, Any]

KEYS = {"epsilons", "strategies", "seeds", "open", "at", "set", "quick"}


@dataclass(frozen=True)
class Size:
    """How much the attacks take."""

    pool: int = 240
    """Rows of which each shadow model has half."""
    shadows: int = 8
    memorise: float = 20.0
    """Epochs of a shadow model without privacy."""
    rows: Sequence[int] = (16, 128)
    """Of a client whose single update is attacked."""
    trials: int = 3
    tokens: int = 9
    """Of the sentence that is to be read from an update."""
    ranks: Sequence[int] = (4, 16, 64)
    canaries: int = 0
    """0: as many as tell every planted bug."""


QUICK = Size(40, 4, 2.0, (4,), 1, 9, (16,), 2000)


PARTS: Mapping[str, Callable[..., Row]] = {
    "canaries": attacks.canary,
    "probe": utility.probe,
    "inversion": attacks.inversion,
    "shadows": attacks.shadows,
    "seat": attacks.server_seat,
    "utility": utility.federation,
}
"""Each takes the lab and its row's labels, and gives what it measured."""


@dataclass(frozen=True)
class Job:
    """One measurement: a row of one table."""

    part: str
    labels: Mapping[str, Any]

    @property
    def name(self) -> str:
        values = (f"{x:g}" if isinstance(x, float) else str(x) for x in self.labels.values())
        return "-".join([self.part, *values]).replace(" ", "-").replace(",", "").replace("/", "-")


@dataclass
class Lab:
    """One experiment under audit."""

    config: Config
    out: Path
    epsilons: Sequence[float] = (0.0, 8.0, 3.0, 1.0)
    strategies: Sequence[str] = ("fedavg", "ffa", "fedex", "flora", "fedsa", "fedsb")
    seeds: Sequence[int] = (0,)
    table: Mapping[str, Any] = field(default_factory=dict)
    """[audit], for what depends on strategy and budget."""
    size: Size = Size()

    @classmethod
    def load(
        cls,
        path: Path,
        overrides: Mapping[str, Any],
        out: Path,
        quick: bool = False,
        **chosen: Sequence[Any] | None,
    ) -> "Lab":
        """By the experiment's file; `chosen` are epsilons, strategies, seeds in place of its own.

        Raises:
            ConfigError: the file or its [audit] table is wrong, or there is no such strategy.
        """
        config = load(path, overrides)
        table = tomllib.loads(path.read_text()).get("audit", {})
        if wrong := sorted(set(table) - KEYS):
            raise ConfigError([f"{path}: audit.{wrong[0]}: must be one of {sorted(KEYS)}"])
        if quick:
            config = preflight.read({**config.flat(), **table.get("quick", {}), **overrides})
        found = {k: chosen.get(k) or table.get(k) or getattr(cls, k) for k in
                 ("epsilons", "strategies", "seeds")}  # fmt: skip
        if unknown := [s for s in found["strategies"] if s not in STRATEGIES]:
            raise ConfigError([f"--strategies: {unknown[0]} is none of {', '.join(STRATEGIES)}"])
        if quick:  # one seed, without privacy and under the smallest budget
            found["seeds"] = found["seeds"][:1]
            found["epsilons"] = [
                found["epsilons"][i] for i in sorted({0, len(found["epsilons"]) - 1})
            ]
        lab = cls(config, out, **found, table=table, size=QUICK if quick else Size())
        for strategy in lab.strategies:  # all that is wrong with them is said before anything runs
            for epsilon in lab.epsilons:
                lab.at(strategy, epsilon)
        return lab

    def at(self, strategy: str, epsilon: float, seed: int | None = None) -> Config:
        """The experiment with this strategy and budget, in a run of its own."""
        seed = self.config.run.seed if seed is None else seed
        table = self.table
        changes: dict[str, Any] = {
            **table.get("set", {}).get(strategy, {}),
            **(table.get("at", {}).get(f"{epsilon:g}", {}) if epsilon else table.get("open", {})),
            "strategy.name": strategy,
            "privacy.epsilon": float(epsilon),
            "privacy.noise-multiplier": 0.0,
            "run.seed": seed,
            "run.out": str(self.out / "runs"),
            "run.name": f"{strategy}-{epsilon:g}-{seed}",
            "evaluate.baselines": False,
            "evaluate.clients": False,
            "output.plots": False,
            "simulate.workers": 1,
        }
        if len(set(self.config.clients.ranks)) > 1:
            changes["clients.ranks"] = str(max(self.config.clients.ranks))
        return preflight.read({**self.config.flat(), **changes})

    # -- what there is to measure ---------------------------------------------------------------

    def jobs(self) -> list[Job]:
        """Everything, cheapest first; runs of one model one after the other, so it loads once."""
        small = {"strategy": self.strategies, "epsilon": self.epsilons}
        found = [Job("canaries", dict(zip(("mechanism", "epsilon"), x, strict=True)))
                 for x in attacks.mechanisms(self.epsilons)]  # fmt: skip
        if self.config.model.task == "classification":
            found += grid("probe", seed=self.seeds, epsilon=self.epsilons)
        found += grid("inversion", strategy=self.strategies, rank=self.size.ranks)
        found += grid("shadows", epsilon=self.epsilons)
        found += grid("seat", rows=self.size.rows, **small)
        runs = grid("utility", seed=self.seeds, **small)
        return found + sorted(runs, key=self._loads)

    def _loads(self, job: Job) -> tuple[int, str]:
        """What of a run's config makes it load another model."""
        seed, strategy, epsilon = job.labels.values()
        return self.seeds.index(seed), str(self.at(strategy, epsilon).lora)

    # -- measuring --------------------------------------------------------------------------------

    def run(self, workers: int = 1, say: Callable[[str], None] = print) -> None:
        """Measure what has not been, `workers` rows at a time.

        Raises:
            FedLoraError: the directory belongs to another experiment, or something could not be
                measured; everything else has been.
        """
        self._open()
        jobs = self.jobs()
        todo = [job for job in jobs if self.row(job) is None]
        if len(todo) < len(jobs):
            say(f"{len(jobs) - len(todo)} of {len(jobs)} measurements are done already")
        with tempfile.TemporaryDirectory() as claims:
            children = [_forked(self, todo, Path(claims), say) for _ in range(workers - 1)]
            try:
                self._work(todo, Path(claims), say)
            finally:
                for pid in children:
                    os.waitpid(pid, 0)
        if missing := [job.name for job in todo if self.row(job) is None]:
            raise FedLoraError(f"not measured: {', '.join(missing)}; the reasons stand above")

    def _work(self, todo: Sequence[Job], claims: Path, say: Callable[[str], None]) -> None:
        """Take jobs that no other process has taken, until there are none."""
        for n, job in enumerate(todo, 1):
            try:
                os.close(os.open(claims / str(n), os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            begun = time.monotonic()
            try:
                row = {**job.labels, **PARTS[job.part](self, **job.labels)}
            except FedLoraError as e:
                say(f"[{n}/{len(todo)}] {job.name}: {type(e).__name__}: {e}")
                continue
            row["seconds"] = time.monotonic() - begun
            write_atomically(self.file(job), (json.dumps(row, indent=1) + "\n").encode())
            took = duration(row["seconds"])
            say(f"[{n}/{len(todo)}] {job.name}: {brief(row, job.labels)}  {took}")

    def _open(self) -> None:
        """Make the directory this experiment's, or see that it is."""
        path = self.out / "experiment.json"
        mine = {"config": self.config.flat(), "audit": dict(self.table), "size": asdict(self.size)}
        mine["config"] = {k: v for k, v in mine["config"].items() if not k.startswith("run.out")}
        text = json.dumps(mine, indent=1, sort_keys=True) + "\n"
        if path.exists() and path.read_text() != text:
            raise FedLoraError(
                f"{self.out} has measurements of another experiment or of another size; choose "
                "another --out, or remove it"
            )
        (self.out / "rows").mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())

    def file(self, job: Job) -> Path:
        return self.out / "rows" / f"{job.name}.json"

    def row(self, job: Job) -> Row | None:
        """What was measured; None where nothing was yet."""
        path = self.file(job)
        return json.loads(path.read_text()) if path.exists() else None

    def rows(self, part: str) -> list[Row]:
        """What was measured of one part, in the order of its jobs."""
        found = (self.row(job) for job in self.jobs() if job.part == part)
        return [row for row in found if row is not None]


def grid(part: str, **axes: Sequence[Any]) -> list[Job]:
    """One job for each combination; the last axis changes fastest."""
    every = itertools.product(*axes.values())
    return [Job(part, dict(zip(axes, values, strict=True))) for values in every]


def brief(row: Row, labels: Mapping[str, Any]) -> str:
    """A row's first numbers, for its progress line."""
    numbers = [(k, v) for k, v in row.items() if isinstance(v, float) and k not in labels]
    return ", ".join(f"{k} {v:.3g}" for k, v in numbers[:3] if k != "seconds")


def _forked(lab: Lab, todo: Sequence[Job], claims: Path, say: Callable[[str], None]) -> int:
    """A process of its own that works on the same jobs; its id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        lab._work(todo, claims, say)
        status = 0
    except KeyboardInterrupt:
        status = 130
    finally:
        sys.stdout.flush()
        os._exit(status)


def main(lab: Lab, workers: int, command: str) -> Path:
    """The whole command; where its report is. However it ends, the report has what was measured."""
    from fedlora.launch.lab.page import write

    def say(text: str) -> None:
        print(text, flush=True)

    try:
        lab.run(workers, say)
    except KeyboardInterrupt:
        say(f"stopped; the same command goes on where it was: {command}")
        raise
    finally:
        if (lab.out / "rows").exists():
            page = write(lab, command)
            say(f"report: {page}")
    return page
