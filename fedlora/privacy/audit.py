"""A lower bound on epsilon, measured: many canaries, one run, and how many of them are told apart.

Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run", 2023,
https://arxiv.org/abs/2305.08846, theorem 5.2 and algorithm 1

    each of m canaries is in the data with probability 1/2; the attacker guesses for the k highest
    scores "in" and for the k lowest "out"; of its r = 2k guesses v are right
    under (epsilon, delta)-DP,  P[right >= v] <= P[Binomial(r, e^eps / (1 + e^eps)) >= v] + O(delta)

Formal guarantee
    A mechanism that is (epsilon, delta)-DP exceeds its epsilon here with probability `p` at most.
    The other way round nothing is proved: a small bound is no privacy. It sees missing clipping and
    noise that is too small by half; 10 % too little noise is for the test of its deviation.

The number of guesses is fixed beforehand: the best of several would overstate the bound.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from fedlora.privacy.chance import Chance
from fedlora.privacy.mechanism import ClippedSum
from fedlora.privacy.per_example import Dense

FRACTION = 0.02
"""Of the canaries, guessed "in"; and as many "out"."""

CHUNK = 250

Release = Callable[[nn.Parameter, Iterator[Tensor], float, float, Chance], Tensor]
"""(parameter, per-example gradients in chunks, C, sigma, chance) -> what is published."""


def released(
    p: nn.Parameter, gradients: Iterator[Tensor], C: float, sigma: float, chance: Chance
) -> Tensor:
    """One step's noised sum by the code that trains."""
    clipped = ClippedSum((p,), C)
    for G in gradients:
        clipped.add({p: Dense(G)})
    return clipped.noised(sigma, chance)[p]


def audit(
    sigma: float, delta: float, m: int = 10_000, release: Release = released, steps: int = 1
) -> float:
    """The lower bound on epsilon of `steps` full-batch steps with noise multiplier sigma.

    Canary i is an example whose gradient is far too long and lies along coordinate i alone, where
    nothing else is: the worst case that clipping has to hold against.
    """
    C = 1.0
    p = nn.Parameter(torch.zeros(m))
    is_in = Chance().uniforms(m) < 0.5
    chance = Chance()
    scores = torch.zeros(m, dtype=torch.float64)
    for _ in range(steps):
        scores += release(p, _canaries(m, is_in, 10 * C), C, sigma, chance)
    return lower_bound(scores, is_in, delta)


def lower_bound(scores: Tensor, is_in: Tensor, delta: float, p: float = 0.05) -> float:
    """The epsilon below which these scores tell the canaries apart too well, at confidence 1 - p.

    Edge cases: 0 where guessing is no better than chance allows; at most 60.
    """
    m = len(scores)
    k = max(1, int(m * FRACTION))
    order = scores.argsort(descending=True)
    right = int(is_in[order[:k]].sum()) + int((~is_in[order[-k:]]).sum())
    if _chance_of(m, 2 * k, right, 0.0, delta) > p:
        return 0.0
    low, high = 0.0, 60.0
    for _ in range(40):
        middle = (low + high) / 2
        if _chance_of(m, 2 * k, right, middle, delta) < p:
            low = middle
        else:
            high = middle
    return low


def _chance_of(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """At most this probability of v right guesses of r under (epsilon, delta)-DP."""
    from scipy.stats import binom

    q = 1 / (1 + math.exp(-epsilon))
    beta = float(binom.sf(v - 1, r, q))
    i = np.arange(1, v + 1)
    sums = np.cumsum(binom.pmf(v - i, r, q))
    alpha = max(0.0, float((sums / i).max())) if v else 0.0
    return min(beta + 2 * m * alpha * delta, 1.0)


def _canaries(m: int, is_in: Tensor, length: float) -> Iterator[Tensor]:
    numbers = torch.nonzero(is_in).flatten()
    for part in torch.split(numbers, CHUNK):
        G = torch.zeros(len(part), m)
        G[range(len(part)), part] = length
        yield G


def telling(members: Tensor, others: Tensor) -> tuple[float, float]:
    """AUC and true positive rate at 5 % false positives, of scores that are high for members."""
    scores = torch.cat([members, others]).double()
    ranks = scores.argsort().argsort().double() + 1
    n, k = len(members), len(others)
    auc = (float(ranks[:n].sum()) - n * (n + 1) / 2) / (n * k)
    threshold = float(torch.quantile(others.double(), 0.95))
    return auc, float((members.double() > threshold).double().mean())
