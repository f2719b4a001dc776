"""The learning rate of each step, train.lr times a factor.

    train.lr-per = "round"    t = (round - 1) / rounds, one rate for all steps of a round
                              constant 1,  linear 1 - t,  cosine (1 + cos pi t) / 2
    train.lr-per = "step"     step i of a client that takes S a round: s = (round - 1) S + i of
                              T = rounds S in all, and W of them to warm up
                              s < W:   (s + 1) / W
                              else     t = (s - W) / (T - W), and as above

W is train.warmup-steps, or below 1 that share of T, rounded. Every client has a clock of its own,
which runs with the rounds whether it takes part or not: so a rate follows from the config, the
round and the client's rows alone, and a resumed run has the same. No rate is 0. Where a finished
run was extended, a round and the number of rounds are those of `RunConfig.place`.
"""

import math
from collections.abc import Iterable
from typing import Any, Protocol

from fedlora.config.reader import Config


class Stepper(Protocol):
    """An optimiser, or what stands in its place."""

    param_groups: list[dict[str, Any]]

    def zero_grad(self, set_to_none: bool = True) -> None: ...

    def step(self) -> Any: ...


def learning_rate(config: Config, round: int, steps: int = 1) -> float:
    """The largest rate of this round, from 1 on, for a client that takes so many steps in it."""
    number, of = config.run.place(round)
    if config.train.lr_per == "round":
        return config.train.lr * decay(config.train.lr_schedule, (number - 1) / of)
    return config.train.lr * max(factors(config, round, steps), default=0.0)


def factors(config: Config, round: int, steps: int) -> list[float]:
    """What train.lr is multiplied by in each step of a round, by step."""
    number, of = config.run.place(round)
    total, first = of * steps, (number - 1) * steps
    warm = config.train.warmup_steps
    W = int(warm * total + 0.5) if warm < 1 else int(warm)
    return [factor(config.train.lr_schedule, s, total, W) for s in range(first, first + steps)]


def factor(schedule: str, s: int, total: int, warm: int) -> float:
    """Of step s, from 0 on, of `total`, the first `warm` of which warm up."""
    if s < warm:
        return (s + 1) / warm
    return decay(schedule, (s - warm) / (total - warm))


def decay(schedule: str, t: float) -> float:
    """What is left of the rate at t in [0, 1) of the way."""
    match schedule:
        case "linear":
            return 1 - t
        case "cosine":
            return (1 + math.cos(math.pi * t)) / 2
    return 1.0


class Scheduled:
    """An optimiser of which every step taken has the next factor of its groups' rates.

    A step that a gradient scaler leaves out takes none.
    """

    def __init__(self, optimizer: Stepper, found: Iterable[float]) -> None:
        self.optimizer, self._factors = optimizer, iter(found)
        self._full = [float(group["lr"]) for group in optimizer.param_groups]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self) -> Any:
        now = next(self._factors)
        for group, full in zip(self.param_groups, self._full, strict=True):
            group["lr"] = full * now
        return self.optimizer.step()


def full_rate(config: Config, round: int) -> float:
    """What an optimiser is built with: the round's rate, or train.lr where steps have their own."""
    return learning_rate(config, round) if config.train.lr_per == "round" else config.train.lr


def scheduled(optimizer: Any, config: Config, round: int, steps: int) -> Any:
    """The optimiser, built with `full_rate`, with the rates of this round's steps."""
    if config.train.lr_per == "round":
        return optimizer
    return Scheduled(optimizer, factors(config, round, steps))
