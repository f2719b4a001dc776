"""Server optimisers: treat a round's mean as a step's end, and take a better step.

Reddi et al., "Adaptive Federated Optimization", ICLR 2021, https://arxiv.org/abs/2003.00295
(FedAvgM: Hsu et al., 2019, https://arxiv.org/abs/1909.06335)

    Delta = mean - x                                     the pseudo-gradient, factor by factor
    FedAvgM       m = beta m + Delta                     x <- x + lr m
    the others    m = beta1 m + (1 - beta1) Delta        x <- x + lr m / (sqrt(v) + tau)
      FedAdagrad  v = v + Delta^2
      FedAdam     v = beta2 v + (1 - beta2) Delta^2
      FedYogi     v = v - (1 - beta2) Delta^2 sign(v - Delta^2)          v_0 = tau^2

Only what the round trained moves: a factor that was frozen, or that no one sent, stays bit for
bit, and so do its moments. FedAvgM with lr = 1, beta = 0 is the plain mean.

A step leaves the mean on purpose, so the model after it is not (E) even where the aggregation
was: prove the aggregation first, then step.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fedlora.errors import StrategyError
from fedlora.lora.adapter import COLUMNS, Factors
from fedlora.lora.lowrank import wide
from fedlora.strategies.base import Strategy


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """The optimiser's memory, by the factors it steps; empty before the first step."""

    m: Factors = field(default_factory=Factors)
    v: Factors = field(default_factory=Factors)


class ServerOptimizer(Protocol):
    def moved(
        self, x: Tensor, delta: Tensor, m: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x, m and v after one step, all in float32 at least."""

    def first(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """m and v before the first step."""


@dataclass(frozen=True, slots=True)
class FedAvgM:
    lr: float = 1.0
    beta: float = 0.9

    def first(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(x), torch.zeros_like(x)

    def moved(
        self, x: Tensor, delta: Tensor, m: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        m = self.beta * m + delta
        return x + self.lr * m, m, v


@dataclass(frozen=True, slots=True)
class FedAdagrad:
    lr: float = 0.01
    beta1: float = 0.0
    tau: float = 1e-3

    def first(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(x), torch.full_like(x, self.tau**2)

    def moved(
        self, x: Tensor, delta: Tensor, m: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        m, v = self.beta1 * m + (1 - self.beta1) * delta, v + delta.square()
        return x + self.lr * m / (v.sqrt() + self.tau), m, v


@dataclass(frozen=True, slots=True)
class FedAdam:
    lr: float = 0.001
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def first(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(x), torch.full_like(x, self.tau**2)

    def moved(
        self, x: Tensor, delta: Tensor, m: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        m = self.beta1 * m + (1 - self.beta1) * delta
        v = self.beta2 * v + (1 - self.beta2) * delta.square()
        return x + self.lr * m / (v.sqrt() + self.tau), m, v


@dataclass(frozen=True, slots=True)
class FedYogi:
    lr: float = 0.001
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def first(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(x), torch.full_like(x, self.tau**2)

    def moved(
        self, x: Tensor, delta: Tensor, m: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        m = self.beta1 * m + (1 - self.beta1) * delta
        square = delta.square()
        v = v - (1 - self.beta2) * square * (v - square).sign()
        return x + self.lr * m / (v.sqrt() + self.tau), m, v


SERVER_OPTIMIZERS: dict[str, Callable[..., ServerOptimizer]] = {
    "fedavgm": FedAvgM,
    "fedadagrad": FedAdagrad,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
}


def build_optimizer(config: Any) -> ServerOptimizer | None:
    """The optimiser of the config's [server] section; None where it asks for none."""
    if config.optimizer == "none":
        return None
    given = {"lr": config.lr, "beta": config.beta1, "beta1": config.beta1}
    given |= {"beta2": config.beta2, "tau": config.tau}
    make = SERVER_OPTIMIZERS[config.optimizer]
    takes = inspect.signature(make).parameters
    return make(**{name: value for name, value in given.items() if name in takes})


def problem(strategy: Strategy[Any]) -> str | None:
    """Why no server optimiser goes with this strategy; None if one does."""
    name = type(strategy).__name__
    use = "use fedavg, ffa, rolora, fedsa, fedsb or fslora"
    if strategy.needs().moving_base:
        return (
            f"{name} keeps its model in the base, which takes the round's change whole; a step "
            f"of the factors alone would part the two; {use}"
        )
    if strategy.needs().own_gauge:
        return (
            f"{name} refactors the model each round, so the difference of two rounds' factors is "
            f"no direction of it; {use}"
        )
    return None


def step(
    optimizer: ServerOptimizer,
    moments: Moments,
    before: Factors,
    mean: Factors,
    trained: frozenset[str],
) -> tuple[Factors, Moments]:
    """The factors to go on with, and the moments.

    before, mean: the strategy's factors before and after its `aggregate`; trained: the columns
    that the round's downloads named. Returned in the dtype of `before`, moments in float32 at
    least.
    """
    x = {c: dict(getattr(mean, c)) for c in COLUMNS}
    m = {c: dict(getattr(moments.m, c)) for c in COLUMNS}
    v = {c: dict(getattr(moments.v, c)) for c in COLUMNS}
    for c in sorted(trained):
        for name, end in getattr(mean, c).items():
            begin = getattr(before, c)[name]
            if end is begin:  # no one sent it
                continue
            start = wide(begin)
            if name not in m[c]:
                m[c][name], v[c][name] = optimizer.first(start)
            moved, m[c][name], v[c][name] = optimizer.moved(
                start, wide(end) - start, m[c][name], v[c][name]
            )
            x[c][name] = moved.to(begin.dtype)
    return Factors(mean.scale, **x), Moments(Factors({}, **m), Factors({}, **v))


def stepped(
    optimizer: ServerOptimizer,
    moments: Moments,
    before: Any,
    after: Any,
    trained: frozenset[str],
) -> tuple[Any, Moments]:
    """`step` on a strategy's state, which is Factors or has them as its `factors`."""
    if isinstance(after, Factors):
        return step(optimizer, moments, before, after, trained)
    if not isinstance(getattr(after, "factors", None), Factors):
        raise StrategyError(f"a {type(after).__module__} state has no factors to step")
    factors, moments = step(optimizer, moments, before.factors, after.factors, trained)
    return replace(after, factors=factors), moments
