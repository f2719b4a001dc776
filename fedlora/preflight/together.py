"""What clients of the config's ranks cannot do together, tried before a model is there.

Which strategy takes which ranks, sums, noise on the mean or late updates is a matter of its
algebra, and found by trying it (federation/server/admission.py, federation/secure/rules.py,
privacy/central.py, federation/server/asynchronous.py). None of that hangs on a model's modules, so
here it is tried on two made-up ones, within milliseconds; the run asks again, of its own.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fedlora.config.reader import Config
from fedlora.errors import DataError, StrategyError
from fedlora.federation.secure.rules import TOGETHER, unsummable
from fedlora.federation.server import admission
from fedlora.federation.server.ranks import parse_shares, shared_out
from fedlora.lora.adapter import Factors, kaiming
from fedlora.strategies.base import Client, Layer, Round, Start, Strategy, seeded
from fedlora.strategies.forms import FORMS
from fedlora.strategies.probing import untrained
from fedlora.training.data.sites import ranks_of

MODULES = {"first": (3, 7), "second": (5, 2)}
"""By how much rows and columns are more than the largest rank."""
LARGEST = 256
"""Ranks beyond it are not tried: that would take seconds."""
CLIENTS = 1000
"""More are not looked at one by one: what they can do hangs on their kinds, which are few."""


def problems(config: Config, strategy: Strategy[Any]) -> Iterator[str]:
    """Why clients of these ranks cannot run with these settings; nothing where ranks are not known.

    A rank that a node states of itself is not the config's, and is judged when it is heard.
    """
    ranks = _ranks(config)
    if not ranks or FORMS[config.lora.form].kind != "factors" or max(ranks) > LARGEST:
        return
    sizes = {m: (max(ranks) + d, max(ranks) + k) for m, (d, k) in MODULES.items()}
    clients = [Client(i, _layers(config, sizes, r)) for i, r in enumerate(ranks)]
    found = [*admission.problems(config, strategy, clients)]
    yield from found
    if found:
        return
    few = [c for r in sorted({*ranks}) for c in _first(clients, ranks, r)]
    start = _start(config, sizes, few)
    yield from _mean(config, strategy, start)
    if config.secure.aggregation and (reason := _sums(strategy, strategy.init(start), few)):
        yield reason


def _mean(config: Config, strategy: Strategy[Any], start: Start) -> Iterator[str]:
    """What needs an aggregate of the mean: noise at the server, and late updates.

    Both modules import libraries of models, so only who asks for them waits for that.
    """
    try:
        if config.privacy.by_client:
            from fedlora.privacy import central

            central.check(strategy, strategy.init(start), start.clients, Round(1, start.seed))
        if config.round.buffer:
            from fedlora.federation.server import asynchronous

            asynchronous.check(strategy, strategy.init(start), start.clients, Round(1, start.seed))
    except StrategyError as e:
        yield str(e)


def _sums(strategy: Strategy[Any], state: Any, clients: Sequence[Client]) -> str:
    """Of rounds 1 and 2, since some strategies take turns."""
    from fedlora.federation.secure.vector import kinds_of  # as above

    for round in (Round(1, 0), Round(2, 0)):
        sent = [(c, untrained(strategy, state, c, round).sent) for c in clients]
        kinds = kinds_of((c, {(k, n): tuple(x.shape) for k, n, x in s.items()}, s.scale)
                         for c, s in sent)  # fmt: skip
        if reason := unsummable(strategy, state, kinds, round):
            return reason
    return ""


def _ranks(config: Config) -> list[int]:
    """By client, where the config alone says them; of a great many only as many as show each."""
    ranks = config.clients.ranks
    count = min(config.clients.count, max(CLIENTS, TOGETHER * len(ranks)))
    if config.lora.rank_pattern or config.ranks.policy not in ("list", "share"):
        return []
    if config.ranks.policy == "share":
        shares = parse_shares(config.ranks.shares)
        if count < config.clients.count:
            return [rank for rank in shares for _ in range(TOGETHER)]
        return shared_out(shares, count, config.run.seed)
    try:
        stated = [*ranks_of(config.data)]
    except DataError:  # which is said where the rows are read
        return []
    return [(stated[i] if i < len(stated) else 0) or ranks[i % len(ranks)] for i in range(count)]


def _layers(config: Config, sizes: dict[str, tuple[int, int]], rank: int) -> dict[str, Layer]:
    scale = (config.lora.alpha or 1.0) / rank ** (0.5 if config.lora.use_rslora else 1.0)
    return {m: Layer(d, k, rank, scale) for m, (d, k) in sizes.items()}


def _first(clients: Sequence[Client], ranks: Sequence[int], rank: int) -> list[Client]:
    """As many of a rank as stand for all of it."""
    return [c for c, r in zip(clients, ranks, strict=True) if r == rank][:TOGETHER]


def _start(config: Config, sizes: dict[str, tuple[int, int]], clients: Sequence[Client]) -> Start:
    """What PEFT begins with: A drawn, B zero, at the largest rank; and a head."""
    top = max(clients, key=lambda c: c.layers["first"].rank).layers
    A = {m: kaiming(x.rank, x.k, seeded(0, 0, 0, m)) for m, x in top.items()}
    B = {m: torch.zeros(x.d, x.rank) for m, x in top.items()}
    weights = {m: torch.randn(d, k, generator=seeded(0, 0, 1, m)) for m, (d, k) in sizes.items()}
    head = {"head": torch.zeros(2, 3)}
    scale = {m: x.scale for m, x in top.items()}
    return Start(Factors(scale, A, B, other=head), clients, weights, config.run.seed)
