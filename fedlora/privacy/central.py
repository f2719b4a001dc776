"""Client-level DP at the server: a clipped, uniformly weighted, noised mean of what clients send.

    Delta_i = sent_i - what it would have sent untrained      over all its tensors, as one vector
    S       = sum_i min(1, C / |Delta_i|) Delta_i + z C N(0, 1)
    mean    = S / m           m: the planned cohort, or q N under Poisson sampling, not the replies

McMahan et al., "Learning Differentially Private Recurrent Language Models", 2018,
https://arxiv.org/abs/1710.06963; adaptive clipping after Andrew et al., "Differentially Private
Learning with Adaptive Clipping", 2021, https://arxiv.org/abs/1905.03871:

    b = (sum_i ([|Delta_i| <= C] - 1/2) + N(0, s_b^2)) / m + 1/2
    C <- C exp(-rate (b - gamma))
    z for the sum: (z^-2 - (2 s_b)^-2)^(-1/2), so that both together cost what z alone would

The strategy then aggregates one upload, the private mean, and stays unaware of DP. That is right
exactly where its aggregate depends on the uploads through their mean: `follows_the_mean` measures
it. It holds for averages of factors (both, B alone, A alone) and of Fed-SB's R. It fails for exact
strategies, which need each B_i A_i: noise on sum_i B_i A_i has full rank d k, which no adapter can
carry, so those are refused.

Formal guarantee
    The server's states are (epsilon, delta)-DP for adding or removing one client, epsilon from the
    server's ledger. The server itself sees every update and is trusted. A fixed cohort claims no
    amplification: every round counts whole. Under privacy.sample-rate, each client is in a round
    with that probability, drawn from the system, not from run.seed.

Edge cases
    an update of norm 0           contributes 0; the factor is 1
    no reply, or none sampled     the noise alone, divided by m as always
    clip norm that adapts         noise uses the C that clipped; the new C serves the next round
    late or refused replies       lower the sum, never the noise or m
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedlora.config.reader import Config
from fedlora.errors import PrivacyError, StrategyError
from fedlora.privacy.accounting import Spend, calibrate
from fedlora.privacy.chance import Chance
from fedlora.privacy.charges import Charge
from fedlora.privacy.delta import delta_problem
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.mechanism import rounded
from fedlora.strategies.base import Client, Round, Strategy, Upload
from fedlora.strategies.probing import begun, factors, follows_the_mean, same, untrained, vector


@dataclass
class CentralPrivacy:
    """One run's mechanism at the server. `C` is all that it carries from round to round."""

    config: Config
    ledger: Ledger
    N: int
    C: float
    epsilon: float = 0.0
    unclipped: float | None = None
    start: Upload | None = None
    """What any client would send this round if it did not train."""

    @classmethod
    def of(cls, config: Config, C: float = 0.0) -> "CentralPrivacy | None":
        """The config's, or None where client-level DP is off. `C`: of a run that is resumed."""
        p = config.privacy
        if not p.by_client:
            return None
        if problem := delta_problem(config):
            raise PrivacyError(problem)
        root = Path(p.ledger) if p.ledger else Path(config.run.out, config.run.name, "privacy")
        return cls(config, Ledger(root, "clients"), config.clients.count, C or p.clip_norm)

    @property
    def q(self) -> float:
        """The sampling rate of the accounting: 1 where the cohort's size is fixed."""
        return self.config.privacy.sample_rate or 1.0

    @property
    def m(self) -> float:
        """What a sum is divided by."""
        if self.config.privacy.sample_rate:
            return self.q * self.N
        return float(min(self.config.clients.per_round or self.N, self.N))

    @property
    def z(self) -> float:
        p = self.config.privacy
        return p.noise_multiplier or calibrate(p.epsilon, p.delta, self.q, self.config.run.planned)

    @property
    def z_sum(self) -> float:
        """The sum's noise multiplier, where part of the budget goes to the count of unclipped."""
        if not self.config.privacy.clip_quantile:
            return self.z
        return float((self.z**-2 - (2 * self.s_b) ** -2) ** -0.5)

    @property
    def s_b(self) -> float:
        return max(self.m / 20, self.z)

    def noise_to_signal(self, numbers: int) -> float:
        """Norm of the mean's noise over the largest norm that the mean can have without noise."""
        return self.z_sum * math.sqrt(numbers) / self.m

    @property
    def poisson(self) -> bool:
        """Is each client in a round by chance of its own?"""
        return bool(self.config.privacy.sample_rate)

    def open_round(
        self,
        strategy: Strategy[Any],
        state: Any,
        clients: Sequence[Client],
        round: Round,
        run: str,
        say: Callable[[str], None],
    ) -> None:
        """Check that the round can be private, and charge for it, before anything is sent.

        Raises:
            StrategyError: these clients, or this strategy, cannot be made private.
            BudgetSpent: the budget does not allow another round.
        """
        check(strategy, state, clients, round)
        first, self.start = self.start is None, untrained(strategy, state, clients[0], round)
        self.pay(run, round.number)
        if first:
            numbers = sum(x.numel() for x in vector(self.start.sent).values())
            say(
                f"client-level DP: noise multiplier {self.z_sum:.3g} on {numbers} numbers and a "
                f"cohort of {self.m:g}: the mean's noise is {self.noise_to_signal(numbers):.2g} "
                "times the longest that the mean itself can be"
            )

    def pay(self, run: str, round: int) -> None:
        """Charge the ledger for a round."""
        budget = self.config.privacy.epsilon
        self.epsilon = self.ledger.reserve(self._charge(run, round), budget).epsilon

    def afford(self) -> float:
        """The total epsilon with one more round, which is not charged.

        Raises:
            BudgetSpent: `pay` would raise it.
        """
        return self.ledger.afford(self._charge("", 1), self.config.privacy.epsilon)

    def _charge(self, run: str, round: int) -> Charge:
        p = self.config.privacy
        noise = "reproducible" if p.insecure_reproducible_noise else "system"
        return Charge(
            Spend(self.q, self.z, 1), self.C, p.delta, "client", run=run, round=round, noise=noise
        )

    def cohort(self, there: Sequence[int], round: Round) -> list[int]:
        """A Poisson sample of the clients; its size is as secret as its members."""
        u = self._chance(round, "sampling").uniforms(len(there))
        return [i for i, x in zip(there, u.tolist(), strict=True) if x < self.q]

    def mean(self, uploads: Iterable[Upload], round: Round) -> Iterator[Upload]:
        """The private mean, as a single upload."""
        assert self.start is not None
        chance = self._chance(round, "noise")
        start = vector(self.start.sent)
        total = {key: torch.zeros(x.shape, dtype=torch.float64) for key, x in start.items()}
        bits = 0.0
        for upload in uploads:
            delta = {k: x.double() - start[k].double() for k, x in vector(upload.sent).items()}
            norm = math.sqrt(sum(float(x.square().sum()) for x in delta.values()))
            factor = min(1.0, self.C * (1 - 1e-9) / norm) if norm else 1.0
            for key, x in delta.items():
                total[key].add_(x, alpha=factor)
            bits += (norm <= self.C) - 0.5
        std = self.z_sum * self.C
        sent = {}
        for key, x in total.items():
            z = chance.gaussians(x.numel()).view(x.shape)
            noised = rounded(x.add_(z, alpha=std), std) / self.m
            sent[key] = (start[key].double() + noised).to(start[key].dtype)
        self._adapt(bits, chance)
        yield replace(self.start, sent=factors(sent, self.start.sent), num_examples=1)

    def record(self) -> dict[str, Any]:
        p = self.config.privacy
        return {
            "level": "client",
            "epsilon": self.epsilon,
            "delta": p.delta,
            "sigma": self.z,
            "q": self.q,
            "next_clip": self.C,
            "unclipped": self.unclipped,
            "noise": "reproducible" if p.insecure_reproducible_noise else "system",
        }

    def _adapt(self, bits: float, chance: Chance) -> None:
        p = self.config.privacy
        if not p.clip_quantile:
            return
        noise = float(chance.gaussians(1)) * self.s_b
        self.unclipped = (bits + noise) / self.m + 0.5
        self.C *= math.exp(-p.clip_rate * (self.unclipped - p.clip_quantile))

    def _chance(self, round: Round, purpose: str) -> Chance:
        if self.config.privacy.insecure_reproducible_noise:
            return Chance.reproducible(round.seed, round.number, -1, purpose)
        return Chance()


def check(strategy: Strategy[Any], state: Any, clients: Sequence[Client], round: Round) -> None:
    """Check that updates can be made private: each round, before anything is sent.

    Raises:
        StrategyError: these clients, or this strategy's aggregate, cannot be made private.
    """
    first = begun(strategy, state, clients[0], round)
    if any(not same(first, begun(strategy, state, c, round)) for c in clients[1:]):
        raise StrategyError(
            "privacy.level = 'client' clips updates of one model, but the clients start the round "
            "from different factors (ranks, layers, or a choice of the strategy); set one rank in "
            "clients.ranks, or privacy.level = 'example'"
        )
    if not follows_the_mean(strategy, state, clients[0], round):
        raise StrategyError(
            f"privacy.level = 'client': {type(strategy).__name__} does not aggregate through the "
            "mean of what clients send, so noise on that mean would not cover it (an exact "
            "aggregate of B_i A_i needs noise of full rank, which no adapter carries); use "
            "fedavg, ffa, rolora, fedsvd or fedsb, or privacy.level = 'example'"
        )
