"""Epsilon of the steps that were taken, and the noise that a budget of epsilon needs.

Numerical composition of privacy loss random variables (Gopi, Lee and Wutschitz, 2021,
https://arxiv.org/abs/2106.02848), through Opacus. Its upper bound is what counts; tests compare it
with the PLD accountant of dp-accounting. Central-limit accounting (GDP) is never used: it is too
low by up to a third.

Formal guarantee
    `epsilon(spends, delta)` bounds the (epsilon, delta) of all the spends together, adjacency
    add/remove one unit. Up to NO_PRIVACY it is at most 0.02 or 1 % above the optimistic estimate of
    dp-accounting's PLD. `calibrate` gives a sigma with which it stays within the target.

Edge cases
    no spend, no step, q = 0      0
    sigma = 0                     infinite
    different sigma or q          composed; equal ones are first added up, whatever their order
"""

import functools
import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from fedlora.errors import PrivacyError

PRECISION = 0.01
"""What the accountant adds to epsilon for its discretisation, at least: on the safe side."""

NO_PRIVACY = 200.0
"""An epsilon above it says nothing: it is told as such, and no budget may be larger."""

LARGE, SHARE, COARSEST = 50.0, 0.008, 2.0
"""Where the RDP bound is above LARGE, the error may be this share of epsilon; and at most."""

POINTS = 2**24
"""Of the accountant's grid, at most. Where COARSEST needs more, the RDP bound is given as it is."""

OVERFLOWS = 600.0
"""Above it the accountant may be far too low: what e^epsilon is made of is no number any more."""

ORDERS = [*range(2, 33), 40, 48, 64, 96, 128, 192, 256, 512, 1024]
"""Of the RDP bound: whole numbers, for which it is a closed form."""


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
    if any(sigma <= 0 for sigma, _, _ in history):
        return math.inf
    return _composed(history, delta) if history else 0.0


@functools.lru_cache(maxsize=4096)
def _composed(history: tuple[tuple[float, float, int], ...], delta: float) -> float:
    from opacus.accountants import PRVAccountant

    bound = _loose(history, delta)
    accountant = PRVAccountant()
    accountant.history = list(history)
    found, finest = bound, _finest(history, delta)
    while True:  # twice at most: with an error fit for the bound, then with one fit for the result
        share = SHARE * found if bound > LARGE else 0.0
        error = max(PRECISION, min(share, COARSEST), finest)
        if error > COARSEST:
            return found
        try:
            with _quiet():
                better = accountant.get_epsilon(delta, eps_error=error, delta_error=delta / 1000)
        except (RuntimeError, ValueError, IndexError):  # its grid cannot tell
            return found
        if not better < found + error or better > OVERFLOWS:
            return found
        found = max(float(better), 0.0)
        if error <= max(PRECISION, SHARE * found, finest):
            return found


def _finest(history: tuple[tuple[float, float, int], ...], delta: float) -> float:
    """The smallest error of epsilon for which POINTS are enough.

    The grid reaches as far as an RDP bound at a thousandth of delta on either side, in steps of
    the error over the root of steps * log(12000 / delta) / 2 (section 5 of the paper). Where ours
    says that it is too far, the accountant's own, of orders near 1 too, is asked.
    """
    steps = sum(n for _, _, n in history)
    share = 2 * math.sqrt(steps * math.log(12000 / delta) / 2) / POINTS
    finest = share * (_loose(history, delta / 4000) + 3)
    return finest if finest <= PRECISION else share * _reach(history, delta)


def _reach(history: tuple[tuple[float, float, int], ...], delta: float) -> float:
    """How far the accountant's grid reaches."""
    from opacus.accountants.analysis.prv.domain import compute_safe_domain_size
    from opacus.accountants.analysis.prv.prvs import PoissonSubsampledGaussianPRV

    steps = [n for _, _, n in history]
    each = [PoissonSubsampledGaussianPRV(q, sigma) for sigma, q, _ in history]
    with _quiet():
        return float(compute_safe_domain_size(each, steps, PRECISION, delta / 1000))


@functools.lru_cache(maxsize=4096)
def _loose(history: tuple[tuple[float, float, int], ...], delta: float) -> float:
    """The RDP bound: an upper bound too, computed at once."""
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = list(history)
    with _quiet():
        return float(accountant.get_epsilon(delta, alphas=ORDERS))


def in_words(epsilon: float) -> str:
    """In words for a reader: the number, or that there is no privacy."""
    return f"{epsilon:.4g}" if epsilon <= NO_PRIVACY else f"no privacy (> {NO_PRIVACY:g})"


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield


@functools.lru_cache(maxsize=4096)
def calibrate(target: float, delta: float, q: float, steps: int) -> float:
    """A sigma whose epsilon over all the steps is at most the target, and hardly below it.

    The RDP bound gives one that is enough; a search on logarithms brings it down until epsilon is
    within 1 % or the accountant's precision of the target.

    Raises:
        PrivacyError: no noise reaches it.
    """
    high = _enough(target, delta, q, steps)
    low, at_low, at_high = 0.0, 0.0, epsilon([Spend(q, high, steps)], delta)
    for _ in range(8):
        if at_high >= target - max(PRECISION, target / 100):
            break
        if not low:  # epsilon falls at least as fast as 1 / sigma
            middle = high * (at_high / (0.996 * target)) ** (1 / 1.3)
        elif at_low < NO_PRIVACY:
            slope = math.log(at_low / at_high) / math.log(low / high)
            middle = min(high * (0.996 * target / at_high) ** (1 / slope), 0.999 * high)
        else:
            middle = math.sqrt(low * high)
        found = epsilon([Spend(q, middle, steps)], delta)
        if found <= target:
            high, at_high = middle, found
        else:
            low, at_low = middle, found
    return high


def _enough(target: float, delta: float, q: float, steps: int) -> float:
    """Some sigma that keeps the target."""
    low, high = 0.0, 1.0
    while _loose(((high, q, steps),), delta) > target and high < 1e3:
        low, high = high, high * 2
    while high - low > 0.01 * high:
        middle = (low + high) / 2
        within = _loose(((middle, q, steps),), delta) <= target
        low, high = (low, middle) if within else (middle, high)
    while epsilon([Spend(q, high, steps)], delta) > target:
        high *= 1.5
        if high > 1e5:
            raise PrivacyError(
                f"no noise keeps {steps} steps at q = {q:g} within epsilon = {target:g} at "
                f"delta = {delta:g}: the accountant's own precision is {PRECISION}"
            )
    return high
