"""The plan of a privacy lab: one experiment, what to measure of it, and where the results lie.

An experiment may say in its [audit] table what the lab compares:

    [audit]
    epsilons = [0, 8, 3, 1]             0: without privacy
    strategies = ["fedavg", "ffa"]
    seeds = [0, 1]
    [audit.open]                        keys where there is no privacy
    "train.optimizer" = "adamw"
    [audit.at.1]                        keys at epsilon 1
    [audit.set.fedsb]                   keys of one strategy, whatever the budget
    [audit.language]                    keys of the language model, where the experiment has none
    [audit.quick]                       keys of --quick

`study.py` measures; this file imports none of the attacks.
"""

import itertools
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fedlora import preflight
from fedlora.config.reader import Config
from fedlora.config.task_names import kind_of
from fedlora.errors import ConfigError, FedLoraError
from fedlora.launch.experiment_file import find, load
from fedlora.launch.lab.canaries import mechanisms
from fedlora.launch.lab.cut_model import cut_gpt2
from fedlora.launch.lab.leaks import FIELDS
from fedlora.launch.lab.secure_server import STORIES
from fedlora.lora.tree_file import write_atomically
from fedlora.strategies import list_strategies

Row = dict[str, Any]

AXES = ("epsilons", "strategies", "seeds")
KEYS = {*AXES, "open", "at", "set", "quick", "language"}


@dataclass(frozen=True)
class LabSize:
    """How many rows, models and trials the attacks use."""

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
    planted: int = 1000
    """Canaries of a whole run, and of these"""
    guesses: int = 200
    """are guessed about, in or out."""
    confidence: float = 0.95
    candidates: int = 255
    """Secrets that were not planted, which one that was is compared with."""
    descent: int = 200
    """Steps of the inversion by optimisation, from each start."""
    games: int = 200
    """Trials of the game on the certificate's fields."""
    cut: bool = False
    """Language models: a GPT-2 of two layers with random weights, in place of the experiment's."""

    def sized(self, canaries: int, guesses: int, confidence: float) -> "LabSize":
        """The same with these of a whole run's audit; 0: its own.

        Raises:
            ConfigError: there are fewer canaries than guesses, or the confidence is none.
        """
        m, p = canaries or self.planted, confidence or self.confidence
        r = guesses or min(self.guesses, m)
        wrong = []
        if not 2 <= r <= m:
            wrong.append(f"--guesses {r}: must be 2 to the {m} canaries")
        if not 0 < p < 1:
            wrong.append(f"--confidence {p:g}: must be between 0 and 1, as 0.95")
        if wrong:
            raise ConfigError(wrong, "These are options of the command.")
        return replace(self, planted=m, guesses=r, confidence=p)


QUICK = LabSize(40, 4, 2.0, (4,), 1, 9, (16,), 2000, 400, 80, 0.95, 31, 40, 40, True)


@dataclass(frozen=True)
class Measurement:
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
    size: LabSize = LabSize()
    only: Sequence[str] = ()
    """Attacks by name; none: all."""
    own: bool = False
    """Of one run as it is: its strategy, seed and noise."""

    @classmethod
    def load(
        cls,
        path: Path | str,
        overrides: Mapping[str, Any],
        out: Path,
        quick: bool = False,
        only: Sequence[str] = (),
        **chosen: Sequence[Any] | None,
    ) -> "Lab":
        """By the experiment's file or name, with `chosen` epsilons, strategies, seeds for its own.

        Of a run's directory its own config, whose epsilon, strategy and seed are then all. only:
        attacks by name.

        Raises:
            ConfigError: the file or its [audit] table is wrong, or there is no such strategy.
        """
        if own := Path(path, "config.toml").is_file():
            path = Path(path, "config.toml")
        path = find(path)
        config = load(path, overrides)
        if kind_of(config.model.task).pictured:
            raise ConfigError(
                [f"model.task = {config.model.task!r}: the attacks here are on texts"]
            )
        table = tomllib.loads(path.read_text()).get("audit", {})
        if wrong := sorted(set(table) - KEYS):
            raise ConfigError([f"{path}: audit.{wrong[0]}: must be one of {sorted(KEYS)}"])
        if quick:
            config = preflight.read({**config.flat(), **table.get("quick", {}), **overrides})
        its = cls.axes(config) if own else {k: getattr(cls, k) for k in AXES}
        found = {k: chosen.get(k) or table.get(k) or its[k] for k in AXES}
        if unknown := [s for s in found["strategies"] if s not in list_strategies()]:
            raise ConfigError(
                [f"--strategies: {unknown[0]} is none of {', '.join(list_strategies())}"]
            )
        if quick:  # one seed, without privacy and under the smallest budget
            found["seeds"] = found["seeds"][:1]
            found["epsilons"] = [
                found["epsilons"][i] for i in sorted({0, len(found["epsilons"]) - 1})
            ]
        size = QUICK if quick else LabSize()
        lab = cls(config, out, **found, table=table, size=size, only=only, own=own)
        for strategy in lab.strategies:  # all that is wrong with them is said before anything runs
            for epsilon in lab.epsilons:
                lab.at(strategy, epsilon)
        return lab

    @staticmethod
    def axes(config: Config) -> dict[str, Sequence[Any]]:
        """The one budget, strategy and seed of a run."""
        values = config.privacy.epsilon, config.strategy.name, config.run.seed
        return {k: [v] for k, v in zip(AXES, values, strict=True)}

    def whole(self, view: str, epsilon: float) -> Config:
        """The run that is audited as a whole, in a directory of this view's: a run's own config as
        it is, else by budget."""
        found, given = self.at(self.strategies[0], epsilon).flat(), self.config.flat()
        kept = ("privacy.noise-multiplier", "clients.ranks") if self.own else ()
        name = {"run.name": f"one-run-{view}-{epsilon:g}"}  # views are measured side by side
        return preflight.read({**found, **{key: given[key] for key in kept}, **name})

    @property
    def speaks(self) -> bool:
        """Is there a language model to attack?"""
        return self.config.model.task == "causal-lm" or "language" in self.table

    def language(self, epsilon: float) -> Config:
        """The experiment with its language model, at this budget."""
        config, table = self.at(self.strategies[0], epsilon), self.table.get("language", {})
        changes = dict(table) if config.model.task != "causal-lm" else {}
        if self.size.cut:
            changes |= {"model.path": str(cut_gpt2(self.out / "cut-gpt2", self.config)),
                        "lora.target-modules": "c_attn,c_fc", "lora.layers": ""}  # fmt: skip
        return preflight.read({**config.flat(), **changes})

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
            "privacy.ledger": "",  # an attack is paid for by nobody's budget
            "output.client-memory": "",
        }
        if len(set(self.config.clients.ranks)) > 1:
            changes["clients.ranks"] = str(max(self.config.clients.ranks))
        return preflight.read({**self.config.flat(), **changes})

    # -- what there is to measure ---------------------------------------------------------------

    def measurements(self) -> list[Measurement]:
        """Everything, cheapest first; runs of one model one after the other, so it loads once."""
        small = {"strategy": self.strategies, "epsilon": self.epsilons}
        found = [Measurement("canaries", dict(zip(("mechanism", "epsilon"), x, strict=True)))
                 for x in mechanisms(self.epsilons)]  # fmt: skip
        if self.config.model.task == "classification":
            found += grid("probe", seed=self.seeds, epsilon=self.epsilons)
        found += grid("one-run", view=("rounds", "final"), epsilon=self.claims())
        found += grid("power", view=("rounds", "final"), epsilon=(1.0, 4.0, 8.0))
        found += grid("inversion", strategy=self.strategies, rank=self.size.ranks)
        found += grid("optimised", rank=self.size.ranks)
        found += [Measurement("secure", {"story": s, "helpers": n}) for s, n in STORIES]
        found += grid("leaks", fields=FIELDS) if self.claims() else []
        if self.speaks:
            found += grid("language", epsilon=self.epsilons)
            found += grid("extraction", epsilon=self.epsilons)
        found += grid("shadows", epsilon=self.epsilons)
        found += grid("seat", rows=self.size.rows, **small)
        runs = grid("utility", seed=self.seeds, **small)
        return found + sorted(runs, key=self._loads)

    def chosen(self) -> list[Measurement]:
        """Those of the attacks that are asked for."""
        return [m for m in self.measurements() if not self.only or m.part in self.only]

    def claims(self) -> Sequence[float]:
        """The budgets that a whole run is audited at."""
        return self.epsilons if self.own else [e for e in self.epsilons if e]

    def _loads(self, measurement: Measurement) -> tuple[int, str]:
        """What of a run's config makes it load another model."""
        seed, strategy, epsilon = measurement.labels.values()
        return self.seeds.index(seed), str(self.at(strategy, epsilon).lora)

    # -- what was measured ---------------------------------------------------------------

    def open(self) -> None:
        """Claim the directory for this experiment, or check that it is claimed."""
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

    def file(self, measurement: Measurement) -> Path:
        return self.out / "rows" / f"{measurement.name}.json"

    def row(self, measurement: Measurement) -> Row | None:
        """What was measured; None where nothing was yet."""
        path = self.file(measurement)
        return json.loads(path.read_text()) if path.exists() else None

    def rows(self, part: str) -> list[Row]:
        """What was measured of one part, in the order of its measurements."""
        found = (self.row(m) for m in self.measurements() if m.part == part)
        return [row for row in found if row is not None]


def grid(part: str, **axes: Sequence[Any]) -> list[Measurement]:
    """One measurement for each combination; the last axis changes fastest."""
    every = itertools.product(*axes.values())
    return [Measurement(part, dict(zip(axes, values, strict=True))) for values in every]
