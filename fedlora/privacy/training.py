"""Local training under example-level DP: DP-SGD on the factors, paid for before it begins.

    charge the ledger for this round's steps              (on disk before the first step)
    each step:  sample examples, each with probability q
                sum_i clip_C(g_i) + sigma C z             (`mechanism`)
                / (q n), plus the gradient of penalties   (they see no data: post-processing)
                optimiser step

A unit of data.unit-column may have k rows. In a step at least one of them is drawn with probability
1 - (1 - q)^k, and all together move the sum by k C at most: noise sigma / k at that rate bounds it,
since more rows drawn, or further apart, only tell more (Choquette-Choo et al., 2023,
https://arxiv.org/abs/2310.15526, on mixtures of Gaussians). So it is charged, and calibrated.

Formal guarantee
    What leaves after this round is a function of the noised sums of all rounds so far, whose
    epsilon is the ledger's. The server knows every setting, the number of examples n, and every
    update; it does not know who was sampled, the noise, or dropout's masks, which come from the
    operating system and never from run.seed.

Edge cases
    empty sample            the model is not called; a step with noise alone, and it counts
    q = 1                   every example in every step; no amplification is claimed
    budget spent            BudgetSpent before the first step; nothing leaves
    delta >= 1/n            PrivacyError: such a delta allows publishing an example outright
    gradient clipping       train.grad-clip applies to the noised mean: post-processing
"""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from fedlora.config.reader import Config
from fedlora.errors import PrivacyError
from fedlora.privacy.accounting import Spend, calibrate
from fedlora.privacy.chance import Chance
from fedlora.privacy.charges import Charge
from fedlora.privacy.keeper import Payer
from fedlora.privacy.ledger import Acknowledged
from fedlora.privacy.mechanism import ClippedSum, poisson
from fedlora.privacy.microbatch import microbatches, width_of
from fedlora.privacy.per_example import Sink, kept_apart
from fedlora.privacy.probe import Way, check_apart, steady
from fedlora.privacy.units import Units
from fedlora.strategies.base import Penalty
from fedlora.training.data.batches import Encoded
from fedlora.training.draws import own_draws
from fedlora.training.embedding_noise import noised
from fedlora.training.model.model import Model
from fedlora.training.optimizers import build_optimizer
from fedlora.training.schedule import Stepper, full_rate, scheduled
from fedlora.training.train import Fit, example_losses, extra_loss

Ways = Mapping[int, Way]
"""How examples of each width are computed."""

RATE = 0.1
"""Of a step's sample where privacy.sample-rate is not set: large steps bear their noise better."""


@dataclass(frozen=True, slots=True)
class PrivacyPlan:
    """One client's DP-SGD parameters: the same in every round of a run."""

    n: int
    q: float
    steps: int
    sigma: float
    C: float
    delta: float
    k: int = 1
    """The most rows of one unit."""

    @classmethod
    def of(cls, config: Config, n: int, k: int = 1) -> "PrivacyPlan":
        """For n examples. Where epsilon is given, sigma is calibrated to it over the rounds that
        the run was begun for; an extension keeps it.

        Raises:
            PrivacyError: there is nothing to train on, or delta is too large for n.
        """
        p, train = config.privacy, config.train
        if not n:
            raise PrivacyError("there are no training examples")
        if p.delta >= 1 / n:
            raise PrivacyError(
                f"privacy.delta = {p.delta:g} must be below 1/n = {1 / n:.2g}, n = {n} examples"
            )
        q = p.sample_rate or min(1.0, max(RATE, train.batch_size / n))
        steps = train.steps or max(1, round(train.epochs / q))
        steps = min(steps, train.max_steps or steps)
        planned = steps * config.run.planned
        sigma = p.noise_multiplier or k * calibrate(p.epsilon, p.delta, any_of(k, q), planned)
        return cls(n, q, steps, sigma, p.clip_norm, p.delta, k)

    def charge(self, config: Config, run: str, round: int, client: int) -> Charge:
        noise = "reproducible" if config.privacy.insecure_reproducible_noise else "system"
        spend = Spend(any_of(self.k, self.q), self.sigma / self.k, self.steps)
        return Charge(spend, self.C, self.delta, run=run, round=round, noise=noise, client=client)


def any_of(k: int, q: float) -> float:
    """The chance that at least one of k rows is drawn."""
    return 1 - (1 - q) ** k if k > 1 else q


@dataclass(frozen=True, slots=True)
class Payments:
    """Where a client's rounds are paid for."""

    ledger: Payer
    units: Units | None = None
    """Of its training rows; None: any."""
    run: str = ""
    acknowledged: Acknowledged | None = None
    """What the server has of the ledger."""


def private_fit(
    model: Model,
    encoded: Encoded,
    columns: frozenset[str],
    config: Config,
    round: int,
    client: int,
    penalty: Penalty | None,
    payments: Payments,
) -> Fit:
    """Train the model's loaded factors in place, under DP. `Fit.loss` is for this machine only."""
    begun = time.perf_counter()
    units = payments.units
    plan = PrivacyPlan.of(config, len(encoded), units.most if units else 1)
    live = model.trainable(columns)
    check_apart(model, live)
    limits = [x for x in (config.privacy.epsilon, config.privacy.max_epsilon) if x]
    paid = payments.ledger.reserve(
        plan.charge(config, payments.run, round, client),
        min(limits, default=0.0),
        units,
        payments.acknowledged,
    )
    params = tuple(p for ps in live.values() for p in ps.values())
    widths = {width_of(n, config.data.max_length) for n in encoded.widths.tolist()}
    drawn = plan.q * plan.n
    ways = {width: steady(model, live, config, width, drawn) for width in sorted(widths)}
    received = {p: p.detach().clone() for p in params}
    built = build_optimizer(live, config.train, full_rate(config, round))
    optimizer = scheduled(built, config, round, plan.steps)
    noise, sampling, dropout = (
        chance(config, round, client, what) for what in ("noise", "sampling", "dropout")
    )
    total = seen = 0.0
    with (
        _training(model, dropout, config.train.neftune_noise_alpha),
        kept_apart(model.peft, model.active, frozenset(params), model.masks) as sink,
    ):
        for _ in range(plan.steps):
            chosen = poisson(plan.n, plan.q, sampling)
            extra = extra_loss(model.sides, received, penalty, config.train.prox)
            loss = private_step(
                model, encoded, chosen, params, optimizer, sink, plan, noise, config, ways, extra
            )
            total, seen = total + loss, seen + len(chosen)
    facts = {"epsilon": paid.epsilon, "sigma": plan.sigma, "q": plan.q, "delta": plan.delta}
    facts |= {"ledger": paid.ledger, "charges": paid.charges}
    mean = total / seen if seen else math.nan
    return Fit(mean, plan.steps, time.perf_counter() - begun, facts)


def private_step(
    model: Model,
    encoded: Encoded,
    chosen: torch.Tensor,
    params: tuple[nn.Parameter, ...],
    optimizer: Stepper,
    sink: Sink,
    plan: PrivacyPlan,
    noise: Chance,
    config: Config,
    ways: Ways,
    extra: torch.Tensor | float,
) -> float:
    """One step on the chosen examples, noised; the sum of their losses, for this machine only.

    `extra` are penalties, which see no data.
    """
    optimizer.zero_grad(set_to_none=True)
    clipped, loss = clipped_sum(model, encoded, chosen, params, sink, config, ways, plan.C)
    one = torch.ones(())
    for p, g in clipped.noised(plan.sigma, noise).items():
        p.grad = (g / (plan.q * plan.n)).to(p.dtype).to(p.device).mul_(model.masks.get(p, one))
    if isinstance(extra, torch.Tensor):
        extra.backward()
    if config.train.grad_clip:
        nn.utils.clip_grad_norm_(params, config.train.grad_clip)
    optimizer.step()
    return loss


def clipped_sum(
    model: Model,
    encoded: Encoded,
    chosen: torch.Tensor,
    params: tuple[nn.Parameter, ...],
    sink: Sink,
    config: Config,
    ways: Ways,
    C: float,
) -> tuple[ClippedSum, float]:
    """The gradients of the chosen examples, clipped to C and summed; and their losses' sum."""
    clipped = ClippedSum(params, C)
    loss, most = 0.0, config.data.max_length
    for part in microbatches(chosen, encoded.widths, lambda w: ways[w].size, most):
        losses = example_losses(model, part.batch(encoded), ways[part.width].precision)
        losses.sum().backward()
        clipped.add(sink.take(len(part.numbers)), part.real)
        loss += float(losses.detach()[: part.real].nansum())
    return clipped, loss


def chance(config: Config, round: int, client: int, purpose: str) -> Chance:
    """A stream of the system's own randomness; a reproducible one only if the config asks."""
    if config.privacy.insecure_reproducible_noise:
        return Chance.reproducible(config.run.seed, round, client, purpose)
    return Chance()


@contextmanager
def _training(model: Model, dropout: Chance, alpha: float) -> Iterator[None]:
    """Train mode; dropout's masks, and noise, are as secret as the sample they fall on."""
    base = model.peft.get_base_model()
    with own_draws(model.devices, dropout.seed()), noised(base, alpha):
        model.peft.train()
        try:
            yield
        finally:
            model.peft.eval()
