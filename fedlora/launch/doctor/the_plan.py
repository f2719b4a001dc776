"""What would run, in one line, whether it fits into memory, and whether its rate can be right."""

from collections.abc import Iterator, Sequence
from math import isqrt
from typing import Any, NamedTuple

from fedlora.config.defaults import rate_of
from fedlora.config.origins import origin
from fedlora.config.reader import Config, strategy_defaults
from fedlora.config.task_names import kind_of
from fedlora.launch.doctor.finding import Finding
from fedlora.launch.doctor.the_memory import fits
from fedlora.lora.adapter import Factors
from fedlora.lora.forms import OWN
from fedlora.lora.forms.base import ByGradient
from fedlora.strategies.base import Client, Round, Strategy
from fedlora.strategies.defaults import RULES
from fedlora.strategies.forms import guarantee
from fedlora.training.model.model import Model

FAR = 10.0
"""A rate so many times the default, or less than its such part, is seldom what was meant."""


class Searched(NamedTuple):
    """How many modules a default rate was found with, and how wide they were."""

    least: int
    most: int
    width: int


READ, WRITTEN = Searched(2, 36, 384), Searched(7, 210, 576)
"""Of MiniLM that reads, and of SmolLM2 that writes: benchmarks/rates.py."""
WIDER = 2
"""A model so many times as wide is another one."""
FEW = 20
"""So many times as many numbers, at one rank, are another kind of adapter."""


def plan(config: Config, model: Model, strategy: Strategy[Any], largest: int) -> Iterator[Finding]:
    """largest: bytes that the largest client moves in a round, both ways."""
    per_round = config.clients.per_round or config.clients.count
    modules = len(model.shapes)
    yield from fits(model, config, largest * per_round)
    if model.start.told:
        yield Finding("ok", model.start.told)
    yield Finding(
        "ok",
        f"plan: {config.strategy.name} ({guarantee(model.form, strategy)}), "
        f"{config.run.rounds} rounds of {per_round} clients, "
        f"lr {config.train.lr:g} ({config.train.lr_schedule}){_whence(config, modules)}, "
        f'lora.alpha {config.lora.alpha:g}, lora.init "{config.lora.init}"',
    )
    yield from far_off(config, modules)
    width = max((min(x.d, x.k) for x in model.shapes.values()), default=0)
    yield from crowded(config, modules, width)
    yield from by_gradient(config, sum(4 * x.d * x.k for x in model.shapes.values()))


def by_gradient(config: Config, size: int) -> Iterator[Finding]:
    """A form that trains where W0 is largest and could where the gradient is, or one that asks.

    size: bytes of one client's gradient of W0.
    """
    lora, form = config.lora, OWN.get(config.lora.form)
    if form is None or not isinstance(form(), ByGradient):
        return
    once = f"each client sends its first gradient of W0, {size / 1e6:,.1f} MB, before round 0"
    if lora.by_gradient:
        yield Finding("ok", f"{lora.form} trains where the gradient says: {once}")
    elif not (config.privacy.on or config.secure.aggregation):
        yield Finding(
            "note",
            f"{lora.form} trains where W0 is largest; its authors go by the gradient, which was "
            "worth 8 to 9 points (docs/results/by-gradient.md)",
            f"set choice=gradient in lora.options: then {once}",
        )


def crowded(config: Config, modules: int, width: int = 0) -> Iterator[Finding]:
    """A default rate on more modules than it was found with, or on far wider ones.

    width: the least side of a module, of the one where that is largest.
    """
    name, task = config.strategy.name, config.model.task
    own = strategy_defaults(name)
    if kind_of(task).pooled:
        searched = READ
    elif task in own.rates:
        searched = WRITTEN
    else:
        return
    if not origin(config.run.defaults, "train.lr", config.train.lr):
        return
    if modules > searched.most or width > WIDER * searched.width:
        wide = f", up to {width} wide" if width else ""
        yield Finding(
            "note",
            f"{modules} modules are adapted{wide}, and {name}'s "
            f"default rate was found with {searched.least} to {searched.most} of {searched.width}: "
            "the more there are and the wider they are, the lower it must be",
            "if the first rounds stay at chance, halve train.lr, or adapt less: lora.layers, "
            "lora.target-modules",
        )


def far_off(config: Config, modules: int | None = None) -> Iterator[Finding]:
    """A rate that is ten times the strategy's own here, or a tenth of it."""
    name = config.strategy.name
    usual, rule = _own_rate(config, modules)
    if rule not in (*RULES, "by the clip"):
        return
    times = config.train.lr / usual
    if times * (1 + 1e-9) >= FAR or times <= (1 + 1e-9) / FAR:
        less = f"{times:g} times" if times > 1 else f"1/{1 / times:g} of"
        yield Finding(
            "note",
            f"train.lr = {config.train.lr:g} is {less} {name}'s default, {usual:g} "
            f"({RULES.get(rule, rule)})",  # type: ignore[call-overload]
            f"leave train.lr out, or try {usual:g} first",
        )


def few(
    config: Config, strategy: Strategy[Any], state: Any, clients: Sequence[Client]
) -> Iterator[Finding]:
    """A core so small that lora trains FEW times its numbers at the same rank."""
    widest = max(clients, key=lambda c: sum(x.rank for x in c.layers.values()))
    round = Round(1, config.run.seed)
    sent = strategy.download(state, widest, round)
    cores = strategy.upload(strategy.start(sent, Factors(), widest, round), Factors())[0].R
    if not cores:
        return
    m, core = max(cores.items(), key=lambda item: item[1].numel())
    x = widest.layers[m]
    lora = x.rank * (x.d + x.k)
    if lora < FEW * core.numel():
        return
    blocks = " and the size of its blocks" if sent.block else ""
    yield Finding(
        "note",
        f"{config.strategy.name} trains {core.numel():,} numbers of {m} at rank {x.rank}, where "
        f"lora trains {lora:,}; with so few a model may be no better than its head",
        f"raise clients.ranks{blocks}: a core of rank {min(isqrt(lora), x.d, x.k)} has as many",
    )


def _own_rate(config: Config, modules: int | None) -> tuple[float, str]:
    own = strategy_defaults(config.strategy.name)
    return rate_of(config.train, config.model, config.lora, config.privacy, own, modules)


def _whence(config: Config, modules: int) -> str:
    """ ", from fedsb's defaults (found by search)", where the rate is from there."""
    if not (said := origin(config.run.defaults, "train.lr", config.train.lr)):
        return ""
    _, rule = _own_rate(config, modules)
    return f", {said} ({RULES.get(rule, rule)})"  # type: ignore[call-overload]
