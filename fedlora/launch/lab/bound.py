"""A lower bound on epsilon from guesses who was in the data, of one run.

Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run", 2023,
https://arxiv.org/abs/2305.08846, theorem 5.2 and algorithm 1

    each of m canaries is in the data by a fair coin; the attacker guesses about r of them, v right.
    Under (epsilon, delta)-DP, with f(v) = P[Binomial(r, e^eps / (1 + e^eps)) >= v],

        P[right >= v] <= f(v) + 2 m delta max_{1 <= i <= v} (f(v - i) - f(v)) / i

Formal guarantee
    A mechanism that is (epsilon, delta)-DP exceeds its epsilon here with probability 1 - confidence
    at most, whatever the attacker does, as long as r is fixed before the scores are seen: the best
    of several r would overstate the bound. A small bound proves nothing.

Edge cases
    guesses no better than chance    0
    all of r guesses right           about log(r / 3) at 95 %, so few guesses prove little
    no bound below 60                60
"""

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

HIGHEST = 60.0


@dataclass(frozen=True, slots=True)
class Guesses:
    """How many canaries there were, were guessed about, and were guessed right."""

    m: int
    r: int
    right: int

    @classmethod
    def made(cls, scores: Tensor, is_in: Tensor, r: int) -> "Guesses":
        """ "In" of the r / 2 canaries of the highest scores, "out" of as many of the lowest."""
        k = max(1, r // 2)
        order = scores.argsort(descending=True, stable=True)
        right = int(is_in[order[:k]].sum()) + int((~is_in[order[-k:]]).sum())
        return cls(len(scores), 2 * k, right)

    def bound(self, delta: float, confidence: float = 0.95) -> float:
        """The epsilon below which so many right guesses have probability 1 - confidence."""
        p = 1 - confidence
        if self.chance(0.0, delta) > p:
            return 0.0
        low, high = 0.0, HIGHEST
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if self.chance(middle, delta) < p else (low, middle)
        return low

    def chance(self, epsilon: float, delta: float) -> float:
        """At most this is the probability of so many right guesses under (epsilon, delta)-DP."""
        from scipy.stats import binom

        wrong, v = 1 / (1 + math.exp(epsilon)), self.right
        f = float(binom.sf(v - 1, self.r, 1 - wrong))
        i = np.arange(1, v + 1)
        gains = np.cumsum(binom.pmf(v - i, self.r, 1 - wrong)) / i  # f(v - i) - f(v), over i
        return min(1.0, f + 2 * self.m * delta * float(gains.max(initial=0.0)))
