"""Epsilon of the steps that were taken, and the noise that a budget of epsilon needs.

Numerical composition of privacy loss random variables (Gopi, Lee and Wutschitz, 2021,
https://arxiv.org/abs/2106.02848), through Opacus. Its upper bound is what counts; tests compare it
with the PLD accountant of dp-accounting. Central-limit accounting (GDP) is never used: it is too
low by up to a third.

Formal guarantee
    `epsilon(spends, delta)` bounds the (epsilon, delta) of all the spends together, adjacency
    add/remove one unit. `calibrate` gives a sigma with which it stays within the target.

Edge cases
    no spend, no step, q = 0      0
    sigma = 0                     infinite
    different sigma or q          composed; equal ones are first added up, whatever their order
"""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

from fedlora.errors import PrivacyError

PRECISION = 0.01
"""Of epsilon, on the safe side: what the accountant adds for its discretisation."""


@dataclass(frozen=True, slots=True)
class Spend:
    """`steps` Gaussian mechanisms of noise multiplier sigma, each on a Poisson sample of rate q."""

    q: float
    sigma: float
    steps: int


def epsilon(spends: Iterable[Spend], delta: float) -> float:
    """The epsilon of all of them together at this delta: an upper bound."""
    totals: dict[tuple[float, float], int] = {}
    for s in spends:
        if s.steps and s.q:
            totals[s.sigma, s.q] = totals.get((s.sigma, s.q), 0) + s.steps
    history = tuple((sigma, q, steps) for (sigma, q), steps in sorted(totals.items()))
    return _composed(history, delta)


@functools.lru_cache(maxsize=4096)
def _composed(history: tuple[tuple[float, float, int], ...], delta: float) -> float:
    if not history:
        return 0.0
    if any(sigma <= 0 for sigma, _, _ in history):
        return math.inf
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = list(history)
    found = float(accountant.get_epsilon(delta, eps_error=PRECISION, delta_error=delta / 1000))
    return max(found, 0.0)


@functools.lru_cache(maxsize=4096)
def calibrate(target: float, delta: float, q: float, steps: int) -> float:
    """The least sigma, to within 0.5 %, whose epsilon over all the steps is at most the target.

    Raises:
        PrivacyError: no noise reaches it.
    """
    low, high = 0.0, 0.5

    def within(sigma: float) -> bool:
        return epsilon([Spend(q, sigma, steps)], delta) <= target

    while not within(high):
        low, high = high, high * 2
        if high > 1e4:
            raise PrivacyError(
                f"no noise keeps {steps} steps at q = {q:g} within epsilon = {target:g} at "
                f"delta = {delta:g}: the accountant's own precision is {PRECISION}"
            )
    while high - low > 0.005 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if within(middle) else (middle, high)
        if high < 1e-2:
            break
    return high
