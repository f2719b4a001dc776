"""How good a start is that was made from data, weights or a gradient: measured, said, refused.

A start takes the leading `rank` singular directions of some matrix of each module. Where that
matrix is zero, or has fewer directions, the rest of the start is arbitrary and looks like any
other: such a run trains, and learns little. So whoever makes a start measures it here.

    found       the matrix's numerical rank, counted up to `rank`
    energy      sum of the squares of the singular values kept over that of all
    condition   the largest kept singular value over the smallest
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

NOISE = 1e-5
"""Of the largest singular value: what is below is rounding, and no direction that was found."""
ILL = 1e4
"""A condition above this is said: the last directions are noise in float32."""


@dataclass(frozen=True, slots=True)
class Quality:
    """One module's start."""

    rank: int
    """Directions wanted."""
    found: int
    """Those that the matrix has, of the wanted ones."""
    energy: float
    """In [0, 1]; NaN where the matrix is zero."""
    condition: float
    """Infinite where some wanted direction is missing."""


def quality(S: Tensor, rank: int, total: float | None = None) -> Quality:
    """Of the matrix of these singular values, largest first; `total` is its squared Frobenius norm,
    where S has not all of them."""
    S = S.double()
    whole = float(S.square().sum()) if total is None else total
    kept = S[:rank]
    top = float(kept[0]) if len(kept) else 0.0
    found = int((kept > top * NOISE).sum()) if top > 0 and math.isfinite(top) else 0
    if not found:
        return Quality(rank, 0, math.nan, math.inf)
    energy = min(1.0, float(kept.square().sum()) / whole) if whole > 0 else math.nan
    condition = top / float(kept[-1]) if found == rank else math.inf
    return Quality(rank, found, energy, condition)


def nothing_learned(found: Mapping[str, Quality]) -> bool:
    """Has no module a direction to start from?"""
    return bool(found) and not any(q.found for q in found.values())


def lines(what: str, found: Mapping[str, Quality]) -> list[str]:
    """What is said of a start: one line of all modules, and one for those that lack directions."""
    made = {m: q for m, q in found.items() if q.found}
    short = {m: q for m, q in found.items() if q.found < q.rank}
    said = []
    if made:
        energies = [q.energy for q in made.values()]
        least = min(made, key=lambda m: made[m].energy)
        worst = max(q.condition for q in made.values())
        said.append(
            f"start {what}: keeps {100 * sum(energies) / len(energies):.0f} % of the energy "
            f"(least {100 * made[least].energy:.0f} %, {least}), condition "
            f"{'infinite' if math.isinf(worst) else f'{worst:.3g}'} at most"
            + (", ill-conditioned: lower clients.ranks" if worst > ILL else "")
        )
    if short:
        m, q = next(iter(short.items()))
        more = f", and {len(short) - 1} more modules like it" if len(short) > 1 else ""
        said.append(
            f"start {what}: {m} has {q.found} of {q.rank} directions{more}; the rest are arbitrary"
        )
    return said


def record(what: str, found: Mapping[str, Quality]) -> dict[str, object]:
    """What round 0's line of rounds.jsonl has of it."""
    by_module = {
        m: {"rank": q.rank, "found": q.found, "energy": q.energy, "condition": q.condition}
        for m, q in found.items()
    }
    return {"made_from": what, "lines": lines(what, found), "modules": by_module}


def of_matrix(M: Tensor, rank: int) -> Quality:
    """Of the matrix itself (d, k), by all its singular values.

    In float64, by the smaller side: an SVD in float32 finds as many directions as are asked for in
    a matrix of ones, at 2e-5 of the largest.
    """
    M = M.double()
    squares = M @ M.T if len(M) <= M.shape[1] else M.T @ M
    if not bool(squares.isfinite().all()):
        return quality(M.new_zeros(rank), rank)
    return quality(torch.linalg.eigvalsh(squares).flip(0).clamp(min=0).sqrt(), rank)
