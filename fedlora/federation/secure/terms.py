"""What a round's members agree on, from the config and the size of the cohort alone.

The client works it out itself: a server that sent a threshold of 1 would not be believed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fedlora.strategies.base import Round

if TYPE_CHECKING:
    from fedlora.config.reader import Config

SMALLEST = 3
"""Clients a round: of a sum of two, either client knows the other's part."""
EXACT = 2**50
"""The largest integer of one client: float64 computes it to a quarter."""


@dataclass(frozen=True, slots=True)
class Terms:
    cohort: int
    shares: int
    """Pieces of each secret: one for every neighbour, and one's own."""
    threshold: int
    """Pieces that put it together again, and the fewest clients of a sum."""
    bits: int
    """Of the integers that travel; sums are modulo 2^bits."""
    range: float
    """Values lie within +-range, or are refused."""
    weight: int
    """The most examples of one client."""

    @classmethod
    def of(cls, config: "Config", cohort: int) -> "Terms":
        s = config.secure
        shares = min(s.num_shares or cohort, cohort)
        threshold = s.reconstruction_threshold or shares // 2 + 1
        weight = 1 if config.privacy.on else s.max_weight
        return cls(cohort, shares, threshold, s.modulus_bits, s.clipping_range, weight)

    @property
    def fewest(self) -> int:
        """The fewest clients of a sum: the threshold, and never two."""
        return max(self.threshold, SMALLEST)

    @property
    def levels(self) -> int:
        """The largest integer of one client: no sum of the cohort's reaches 2^(bits - 1)."""
        most: int = 2 ** (self.bits - 1) - 1
        return min(most // self.cohort, EXACT)

    @property
    def unit(self) -> float:
        """How many integer steps there are to 1 of n * value."""
        return self.levels / (self.range * self.weight)

    def error(self, clients: int, examples: float) -> float:
        """The most that quantisation moves a mean over so many clients and examples.

        Half a step a client, and what float64 loses on the way to the integer.
        """
        return (0.5 + self.levels * 2.0**-52) * clients / (self.unit * examples)


def neighbours(clients: Sequence[int], shares: int, round: Round) -> dict[int, set[int]]:
    """Who holds shares of whose secrets, each also of its own: all clients, or a random ring.

    On the ring everyone has (shares - 1) / 2 on either side, so to be neighbours is mutual.
    """
    n, half = len(clients), shares // 2
    if shares >= n:
        return {i: set(clients) for i in clients}
    order = torch.randperm(n, generator=round.generator(0, "secure neighbours")).tolist()
    ring = [clients[at] for at in order]
    return {
        i: {ring[(at + step) % n] for step in range(-half, half + 1)} for at, i in enumerate(ring)
    }
