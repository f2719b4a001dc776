"""One row of a comparison: a strategy under a variant, with the numbers of its seeds' runs."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora.config.origins import origin
from fedlora.reports.html import interval
from fedlora.reports.outcome import ACCURACY, Metric, finite
from fedlora.reports.run_files import RunFiles, read


@dataclass
class Row:
    """One strategy under one variant."""

    variant: str
    strategy: str
    promise: str
    reason: str = ""
    metric: Metric = ACCURACY
    runs: list[RunFiles] = field(default_factory=list)
    score: list[float] = field(default_factory=list)
    """The final central score of each seed."""
    numbers: dict[str, float] = field(default_factory=dict)
    """Means over the seeds."""
    against: str = ""
    """The score less the first row's of the same seed, with its interval."""
    p: float | None = None
    """How probable so large a difference is by chance, corrected: compare/difference.py."""
    searched: Mapping[str, Any] = field(default_factory=dict)
    """Keys that were chosen for this row, and what they are."""
    idle: str = ""
    """Why it learned nothing, where the baselines say so."""

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.variant, self.strategy)))

    @property
    def warnings(self) -> list[str]:
        """The warnings of each of its runs that has any."""
        return [
            f"seed {run.summary['seed']}: {' '.join(run.summary['warnings'])}"
            for run in self.runs
            if run.summary["warnings"]
        ]

    @property
    def rate(self) -> str:
        """ "0.02 (own)": train.lr, and whether it is the strategy's default, searched or set."""
        if not self.runs or (lr := self.runs[0].config.get("train.lr")) is None:
            return "-"
        if "train.lr" in self.searched:
            return f"{lr:g} (searched)"
        config = self.runs[0].config
        own = origin(config.get("run.defaults", ""), "train.lr", lr)
        return f"{lr:g} ({'own' if own else 'set'})"

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.score) if self.score else None

    @property
    def half(self) -> float | None:
        return interval(self.score)


def row(
    variant: str, strategy: str, promise: str, directories: Sequence[Path], reason: str = ""
) -> Row:
    """A row from the runs of its seeds."""
    found = Row(variant, strategy, promise, reason, runs=[read(d) for d in directories])
    if not found.runs:
        return found
    found.metric = found.runs[0].metric
    key = found.metric.key
    found.score = [s for r in found.runs if (s := finite(r.summary.get("final"), key)) is not None]
    each = [_numbers(r, key) for r in found.runs]
    for name in {n: None for numbers in each for n in numbers}:
        values = [n[name] for n in each if name in n]
        found.numbers[name] = statistics.fmean(values)
    return found


def _numbers(run: RunFiles, key: str) -> dict[str, float]:
    """Every number of one run that the table has a column for."""
    rounds = run.trained
    numbers: dict[str, float | None] = {
        "rounds": float(len(rounds)),
        "up": float(_moved(run.rounds, "up")),
        "down": float(_moved(run.rounds, "down")),
        "once": float(once(run.rounds)),
        "deviation": max(
            (finite(r.get("proof"), "deviation") or 0.0 for r in rounds), default=None
        ),
        "seconds": finite(run.summary, "seconds"),
        "virtual": finite(run.summary, "virtual_seconds"),
    }
    waits = [finite(r.get("virtual"), "waiting") for r in rounds]
    if any(w is not None for w in waits):
        numbers["waiting"] = sum(w or 0.0 for w in waits) / len(waits)
    for kind, found in (run.summary.get("clients") or {}).items():
        numbers[f"own {kind}"] = finite(found, key)
        if kind == "final":
            numbers["worst tenth"] = finite(found, f"worst_tenth_{key}")
    return {name: value for name, value in numbers.items() if value is not None}


def _moved(rounds: Sequence[Mapping[str, Any]], way: str) -> int:
    return sum((r.get("bytes") or {}).get(way, 0) for r in rounds)


def once(rounds: Sequence[Mapping[str, Any]]) -> int:
    """Bytes before round 1, and those that came down only because a client was new: its first
    download less its second."""
    beforehand = sum(sum((r.get("bytes") or {}).values()) for r in rounds if not r["round"])
    seen: dict[str, list[int]] = {}
    for r in rounds:
        for i, facts in (r.get("clients") or {}).items():
            seen.setdefault(str(i), []).append(int(facts.get("bytes_down") or 0))
    new = sum(max(0, down[0] - down[1]) for down in seen.values() if len(down) > 1)
    return beforehand + new


def reached(run: RunFiles, target: float) -> tuple[float, float] | None:
    """Bytes and virtual seconds at the first evaluation that meets the target."""
    moved, key = 0.0, run.metric.key
    for r in run.rounds:
        moved += sum((r.get("bytes") or {}).values())
        value = finite(r.get("evaluation"), key)
        if (
            r["round"]
            and value is not None
            and (value == target or run.metric.better(value, target))
        ):
            return moved, finite(r.get("virtual"), "clock") or math.nan
    return None
