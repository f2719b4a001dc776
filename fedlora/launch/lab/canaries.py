"""A measured lower bound on epsilon: many canaries in one run, and how many are told apart.

Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run", 2023,
https://arxiv.org/abs/2305.08846, algorithm 1; the bound is `bound.py`'s

    each of m canaries is in the data with probability 1/2; the attacker guesses for the highest
    scores "in" and for the lowest "out"

Formal guarantee
    A mechanism that is (epsilon, delta)-DP exceeds its epsilon here with probability 0.05 at most.
    The other way round nothing is proved: a small bound is no privacy. It sees missing clipping and
    noise that is too small by half; 10 % too little noise is for the test of its deviation.

The number of guesses is fixed beforehand: the best of several would overstate the bound.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedlora.launch.lab.bound import Guesses
from fedlora.privacy.accounting import calibrate
from fedlora.privacy.chance import Chance
from fedlora.privacy.mechanism import ClippedSum
from fedlora.privacy.per_example import Dense

FRACTION = 0.02
"""Of the canaries, guessed "in"; and as many "out"."""

BLOCK = 500
"""Canaries that share one parameter: a canary's gradient is zero in all the others."""

Gradients = Iterator[Mapping[nn.Parameter, Tensor]]
"""Chunk by chunk, each example's gradient (b, BLOCK) of the parameters where it is not zero."""

Release = Callable[[Sequence[nn.Parameter], Gradients, float, float, Chance], Tensor]
"""(parameters, gradients, C, sigma, chance) -> what is published, (m,)."""


def released(
    params: Sequence[nn.Parameter], gradients: Gradients, C: float, sigma: float, chance: Chance
) -> Tensor:
    """One step's noised sum by the code that trains."""
    clipped = ClippedSum(tuple(params), C)
    for found in gradients:
        clipped.add({p: Dense(G) for p, G in found.items()})
    noised = clipped.noised(sigma, chance)
    return torch.cat([noised[p] for p in params])


def audit(
    sigma: float, delta: float, m: int = 10_000, release: Release = released, steps: int = 1
) -> float:
    """The lower bound on epsilon of `steps` full-batch steps with noise multiplier sigma.

    Canary i is an example whose gradient is far too long and lies along coordinate i alone, where
    nothing else is: the worst case that clipping has to hold against.
    """
    C = 1.0
    params = [nn.Parameter(torch.zeros(min(BLOCK, m - at))) for at in range(0, m, BLOCK)]
    is_in = Chance().uniforms(m) < 0.5
    chance = Chance()
    scores = torch.zeros(m, dtype=torch.float64)
    for _ in range(steps):
        scores += release(params, _canaries(params, is_in, 10 * C), C, sigma, chance)
    return lower_bound(scores, is_in, delta)


# -- bugs that it has to find ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Case:
    """A mechanism to audit, and how many releases at the claimed sigma it is accounted as."""

    release: Release
    releases: int = 1
    broken: bool = True


def half_the_noise(
    params: Sequence[nn.Parameter], gradients: Gradients, C: float, sigma: float, chance: Chance
) -> Tensor:
    """Half the noise, sigma / 2, of what is accounted for, sigma."""
    return released(params, gradients, C, sigma / 2, chance)


def without_clipping(
    params: Sequence[nn.Parameter], gradients: Gradients, C: float, sigma: float, chance: Chance
) -> Tensor:
    """The sum of the gradients as they are, with noise as for clipped ones."""
    total = {p: torch.zeros(p.shape, dtype=torch.float64) for p in params}
    for found in gradients:
        for p, G in found.items():
            total[p] += G.double().sum(0)
    summed = torch.cat([total[p] for p in params])
    return summed + chance.gaussians(len(summed)) * sigma * C


def two_steps(
    params: Sequence[nn.Parameter], gradients: Gradients, C: float, sigma: float, chance: Chance
) -> Tensor:
    """One step, less a second in which the canaries have no gradient.

    The server chooses the model of every round, and so one at which they have none.
    """
    first = released(params, gradients, C, sigma, chance)
    return first - released(params, iter(()), C, sigma, chance)


def reused_noise(
    params: Sequence[nn.Parameter], gradients: Gradients, C: float, sigma: float, chance: Chance
) -> Tensor:
    """The same two steps where both draw the same noise, as from a generator seeded by round."""
    again = _Again(chance.gaussians(sum(p.numel() for p in params)))
    return two_steps(params, gradients, C, sigma, again)  # type: ignore[arg-type]


class _Again:
    """Gives the same numbers each time."""

    def __init__(self, z: Tensor) -> None:
        self.z = z

    def gaussians(self, n: int) -> Tensor:
        return self.z[:n].clone()


CASES: Mapping[str, Case] = {
    "as it is": Case(released, broken=False),
    "as it is, two steps": Case(two_steps, 2, broken=False),
    "half the noise": Case(half_the_noise),
    "no clipping": Case(without_clipping),
    "noise used twice": Case(reused_noise, 2),
}

SHARP = (2.0, 1e-5, 40_000)
"""epsilon, delta and canaries at which every broken case is flagged in nearly every run: half the
noise measures 2.45 with a standard deviation of 0.08. A larger claim hides more, since k right
guesses of k prove an epsilon of about log(k / 3) at most; fewer canaries blur."""


def mechanisms(epsilons: Sequence[float]) -> list[tuple[str, float]]:
    """What is audited at which claimed epsilon: the mechanism at each budget, then planted bugs."""
    sound = next(iter(CASES))
    return [*((sound, e) for e in epsilons if e and e != SHARP[0]), *((c, SHARP[0]) for c in CASES)]


def audited(case: Case, epsilon: float, delta: float, m: int) -> float:
    """The measurements of a case that claims this epsilon."""
    sigma = calibrate(epsilon, delta, 1.0, case.releases)
    return audit(sigma, delta, m, case.release)


# -- the bound ------------------------------------------------------------------------------------


def lower_bound(scores: Tensor, is_in: Tensor, delta: float) -> float:
    """The epsilon below which these scores tell the canaries apart too well, at 95 %."""
    r = 2 * max(1, int(len(scores) * FRACTION))
    return Guesses.made(scores, is_in, r).bound(delta)


def _canaries(params: Sequence[nn.Parameter], is_in: Tensor, length: float) -> Gradients:
    for p, here in zip(params, is_in.split(BLOCK), strict=True):
        numbers = torch.nonzero(here).flatten()
        G = torch.zeros(len(numbers), len(p))
        G[range(len(numbers)), numbers] = length
        yield {p: G}
