"""Each row's difference from another, seed by seed, and whether so many of them may be chance.

A seed decides the split and the test rows too, and rows share those; so the difference is taken
seed by seed. Its interval is 95 % of Student's t. Its p-value is of the paired t test, two-sided,
corrected by Holm's rule for all the rows of the table that are held against something: that any of
the corrected values is below 5 % has a chance of 5 % at most where no row differs.
"""

import math
import statistics
from collections.abc import Sequence

from fedlora.launch.compare.row import Row
from fedlora.reports.html import interval
from fedlora.reports.outcome import Metric


def compared(rows: Sequence[Row], base: str = "") -> str:
    """Fill in each row's difference from the first of its variant, and its p; the first's name.

    Where a variant has one strategy only, the difference is from the table's first row. With a
    base, it is from the same strategy under that variant.
    """
    scored = [r for r in rows if r.score]
    alone = len({r.variant for r in scored}) == len(scored) and not base
    against: list[tuple[Row, list[float]]] = []
    for r in scored:
        first = next((x for x in scored if _first(x, r, alone, base)), r)
        if r is not first and len(r.score) == len(first.score) > (0 if base else 1):
            against.append((r, [a - b for a, b in zip(r.score, first.score, strict=True)]))
    corrected = holm([paired_p(differences) for _, differences in against])
    for (r, differences), p in zip(against, corrected, strict=True):
        r.against, r.p = plus(differences, r.metric), p
    if not against:
        return ""
    return base or (scored[0].variant if alone else scored[0].strategy)


def _first(x: Row, r: Row, alone: bool, base: str) -> bool:
    """Is x what row r is held against, where it comes before all others of which that is so?"""
    if base:
        return (x.variant, x.strategy) == (base, r.strategy)
    return alone or x.variant == r.variant


def plus(differences: Sequence[float], metric: Metric) -> str:
    """ "+1.2 +- 0.8" of a share in points, or of a plain number."""
    unit, digits = (100, 1) if metric.share else (1, 3)
    half = interval(differences)
    if half is None:
        return f"{unit * statistics.fmean(differences):+.{digits}f}"
    return f"{unit * statistics.fmean(differences):+.{digits}f} +- {unit * half:.{digits}f}"


def paired_p(differences: Sequence[float]) -> float | None:
    """The two-sided p-value of their mean by Student's t; None of fewer than two."""
    n = len(differences)
    if n < 2:
        return None
    from scipy.stats import t

    mean, error = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(n)
    if error == 0:
        return 0.0 if mean else 1.0
    return float(2 * t.sf(abs(mean) / error, n - 1))


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """The p-values corrected for how many there are (Holm 1979), in their order; None stays."""
    there = sorted((p, n) for n, p in enumerate(ps) if p is not None)
    found: list[float | None] = [None] * len(ps)
    so_far = 0.0
    for place, (p, n) in enumerate(there):
        so_far = max(so_far, min(1.0, (len(there) - place) * p))
        found[n] = so_far
    return found
