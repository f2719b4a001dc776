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
CHANGES = 8.0
"""What a change of the certificate's numbers may be, over its public scale: see `public_scales`."""
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
    colluding: int = 0
    """Clients that may help the server."""

    @classmethod
    def of(cls, config: "Config", cohort: int) -> "Terms":
        s = config.secure
        shares = min(s.num_shares or cohort, cohort)
        threshold = s.reconstruction_threshold or (shares + s.colluding) // 2 + 1
        weight = 1 if config.privacy.on else s.max_weight
        bits, range = s.modulus_bits, s.clipping_range
        return cls(cohort, shares, threshold, bits, range, weight, s.colluding)

    @property
    def fewest(self) -> int:
        """The fewest clients of a sum: never two, nor one beside those that help the server."""
        return max(self.threshold, SMALLEST, self.colluding + 2)

    @property
    def together(self) -> int:
        """The fewest of one kind: what they alone send is a sum over them."""
        return self.colluding + 2

    @property
    def ring(self) -> bool:
        """Are a client's neighbours some of the cohort only? Then no stories are compared."""
        return self.shares < self.cohort

    def problem(self, colluding: int | None = None) -> str:
        """Why no sum can keep its promise with so many colluding clients; empty where it can.

        colluding: by default the terms' own. Two sets of `threshold` neighbours, told two stories,
        share more than that many clients (2 t > n + c), so an honest one, who goes along with one
        story only; and those who are honest are enough for a sum (t <= n - c).
        """
        c = self.colluding if colluding is None else colluding
        t, n, low = self.threshold, self.shares, (self.shares + c) // 2 + 1
        of = f"{n} neighbours of each (secure.num-shares)" if self.ring else f"{n} clients a round"
        if self.cohort < SMALLEST:
            return (
                f"a sum over {self.cohort} clients: must be {SMALLEST} at least, since of a sum of "
                "two either knows the other's part; raise clients.count or clients.per-round"
            )
        if n < 3 * c + 1:
            return (
                f"secure.colluding = {c} takes {3 * c + 1} clients at least, and there are {of}: "
                f"have more, or set it to {(n - 1) // 3}; 0 is for clients that never help the "
                "server against each other"
            )
        if not low <= t <= n - c or self.fewest < c + 2:
            return (
                f"secure.reconstruction-threshold = {t}: must be {low} to {n - c} of {of} with "
                f"secure.colluding = {c}: more than half of both together, so that no two sets of "
                "clients can be told two stories, and no more than are left without them"
            )
        return ""

    @property
    def levels(self) -> int:
        """The largest integer of one client: no sum of the cohort's reaches 2^(bits - 1)."""
        most: int = 2 ** (self.bits - 1) - 1
        return min(most // self.cohort, EXACT)

    @property
    def unit(self) -> float:
        """How many integer steps there are to 1 of n * value."""
        return self.levels / (self.range * self.weight)

    @property
    def change_unit(self) -> float:
        """The same of the certificate's changes, whose range is their own."""
        return self.levels / (CHANGES * self.weight)

    def error(self, clients: int, examples: float) -> float:
        """The most that quantisation moves a mean over so many clients and examples.

        Half a step a client, and what float64 loses on the way to the integer.
        """
        return (0.5 + self.levels * 2.0**-52) * clients / (self.unit * examples)

    def change_error(self, clients: int, examples: float) -> float:
        """The same of a change of the certificate, over its public scale."""
        return self.error(clients, examples) * CHANGES / self.range


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
