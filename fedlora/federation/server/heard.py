"""How much each client counted in the aggregate, fitted from the certificate's numbers alone.

A round's change is close to sum_i w_i change_i for some weights w, which should be q_i. Least
squares over all numbers of all modules finds w_i / q_i: 1 where a client counts as much as it
should, 0 where it was dropped. So a client that an approximate strategy forgets shows, where the
deviation alone is lost in what the strategy is off by anyway.

Modules count by how well the fit explains them: a head, which every strategy averages exactly, far
more than modules that are only close. What the numbers say nothing of, a client of a few examples
or two that moved alike, stays near 1. Ratios are over the round's median, so that a strategy that
moves by less than the mean, as sketches do, forgets nobody. `outcome` says what is too little.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedlora.training.certificate import K, Numbers, Witness

ROUNDS = 3
"""Refinements of how much each module counts."""
SMALLEST = 0.1
"""Of a median: where the model did not move by what clients trained, all are small."""
SPREAD = 1.0
"""How far from 1 a ratio is before the numbers say anything."""


def heard(before: Numbers, after: Numbers, witnesses: Mapping[int, Witness]) -> dict[int, float]:
    """w_i / q_i by client, over their median; none where the numbers are too few to tell."""
    here = [*witnesses.values()]
    names = [m for m in after if here and all(m in w.start for w in here)]
    names = [m for m in names if bool(torch.isfinite(after[m] - before[m]).all())]
    if len(here) < 2 or K * len(names) < 2 * len(here):
        return {}
    q = torch.tensor([w.weight for w in here], dtype=torch.float64)
    q = q / q.sum()
    X = [torch.stack([w.change(m) for w in here], 1) * q for m in names]  # (K, clients) each
    y = [after[m] - before[m] for m in names]
    ratios = torch.ones(len(here), dtype=torch.float64)
    variance = [float(x.square().sum(1).mean()) + 1e-30 for x in X]
    for _ in range(ROUNDS):
        ratios = _fitted(X, y, variance)
        variance = [
            float((x @ ratios - t).square().mean())
            + 1e-12 * float(x.square().sum(1).mean())
            + 1e-30
            for x, t in zip(X, y, strict=True)
        ]
    middle = max(float(ratios.median()), SMALLEST)
    return dict(zip(witnesses, (ratios / middle).tolist(), strict=True))


def _fitted(X: Sequence[Tensor], y: Sequence[Tensor], variance: Sequence[float]) -> Tensor:
    """The ratios r that explain y = X r best, each pulled to 1 as SPREAD says."""
    n = X[0].shape[1]
    left = torch.eye(n, dtype=torch.float64) / SPREAD**2
    right = torch.ones(n, dtype=torch.float64) / SPREAD**2
    for x, t, v in zip(X, y, variance, strict=True):
        left = left + x.T @ x / v
        right = right + x.T @ t / v
    found: Tensor = torch.linalg.solve(left, right)
    return found
