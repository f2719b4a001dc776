"""Whether a strategy at its own default learns as much as the reference at its own.

    python -m benchmarks.verdict

Of the rows that `python -m benchmarks.rates verdict` made, paired by seed and rows: the gap is the
reference's accuracy less the strategy's. Named before the runs: a strategy **passes** where the
one-sided 95 % upper end of the mean gap, by Student's t over the seeds, is below MARGIN; it
**fails** where the lower end is above it; else it is **inconclusive**. Each must pass by itself, so
nothing is corrected.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

from benchmarks.rates import REFERENCE, RESULTS, SEEDS_OF_VERDICT, default, ordered
from benchmarks.short_runs import ranks_of, read

MARGIN = 0.02
"""The gap, of accuracy, that a strategy must be shown to be within."""
LEVEL = 0.95
TRUE = 0.01
"""The true gap at which the power is given."""

BECAUSE: Mapping[str, str] = {
    "ffa": "inherent, because A stays as it was drawn",
    "fedsvd": "inherent, because the rows of A span what they spanned when they were drawn",
    "lora-a2": "inherent, because of a client's update only the ranks that it chose count, and B "
    "and A train in turn",
    "fedsb": "inherent, because at these ranks it trains 16 to 256 numbers a module between fixed "
    "frames, where LoRA trains 3,072 to 12,288",
    "ravan": "inherent, because at these ranks it trains 16 to 64 numbers a module between drawn "
    "frames, where LoRA trains 3,072 to 12,288",
}
"""Of each strategy that fails, why; benchmarks/otherwise.py has the runs that show it."""


@dataclass(frozen=True)
class Verdict:
    """Mean gap and its one-sided ends, over so many seeds; the word; the power at TRUE."""

    seeds: int
    mean: float
    low: float
    high: float
    word: str
    power: float


def judged(gaps: Sequence[float]) -> Verdict:
    """The verdict on the gaps of two seeds or more."""
    n, mean, sd = len(gaps), statistics.fmean(gaps), statistics.stdev(gaps)
    half = float(stats.t.ppf(LEVEL, n - 1)) * sd / n**0.5
    low, high = mean - half, mean + half
    word = "passes" if high < MARGIN else "fails" if low > MARGIN else "inconclusive"
    return Verdict(n, mean, low, high, word, power(sd, n))


def power(sd: float, n: int) -> float:
    """How probably a strategy passes whose true gap is TRUE, if gaps spread by sd."""
    if sd == 0:
        return 1.0
    away = (TRUE - MARGIN) / (sd / n**0.5)
    return float(stats.nct.cdf(-stats.t.ppf(LEVEL, n - 1), n - 1, away))


def gaps(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """Of each seed that has both: the reference's accuracy less the strategy's, each at the
    default that it has now. The reference has the same ranks."""
    factor = "rank 8" if ranks_of(name) else ""

    def scores(of: str, factor: str) -> dict[int, float]:
        return {r["seed"]: r["accuracy"] for r in rows if r["stage"] == "verdict"
                and r["seed"] in SEEDS_OF_VERDICT and r["strategy"] == of and r["factor"] == factor
                and r["lr"] == default(of)}  # fmt: skip

    reference, mine = scores(REFERENCE, factor), scores(name, "")
    return [reference[s] - mine[s] for s in sorted(reference.keys() & mine.keys())]


def verdicts(rows: Sequence[Mapping[str, Any]]) -> dict[str, Verdict]:
    """By strategy, of those whose seeds were all run: a look before is no verdict."""
    found = {name: gaps(rows, name) for name in ordered() if name != REFERENCE}
    return {name: judged(x) for name, x in found.items() if len(x) == len(SEEDS_OF_VERDICT)}


def main() -> None:
    for name, v in verdicts(read(RESULTS)).items():
        mean, low, high = (f"{100 * x:+.1f}" for x in (v.mean, v.low, v.high))
        print(f"{name}: {v.word}, gap {mean} ({low} to {high}), {v.seeds} seeds, "
              f"power {v.power:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
