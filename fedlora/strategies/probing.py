"""A strategy's algebra, found by trying it: what a client that did not train would send, and
whether the aggregate is that of the mean.

Several promises hold for some strategies only (noise at the server, sums that hide their parts,
late updates). Which, is measured on made-up updates before anything is sent, so that a new
strategy needs no list of what it goes with.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedlora.errors import FedLoraError
from fedlora.lora.adapter import Factors, apply
from fedlora.strategies.base import (
    Client,
    Download,
    Effective,
    Round,
    Strategy,
    Upload,
    seeded,
    travelling,
)

Vector = dict[tuple[str, str], Tensor]


def vector(sent: Factors) -> Vector:
    """All that is sent, by column and name."""
    return {(column, name): x for column, name, x in sent.items()}


def factors(v: Mapping[tuple[str, str], Tensor], like: Factors) -> Factors:
    """The inverse of `vector`, with the scale of `like`."""
    columns: dict[str, dict[str, Tensor]] = {}
    for (column, name), x in v.items():
        columns.setdefault(column, {})[name] = x
    return Factors(like.scale, **columns)


def begun(strategy: Strategy[Any], state: Any, client: Client, round: Round) -> Factors:
    """What a newcomer of these layers starts the round with."""
    new = replace(client, has_memory=False, base_version=_version(strategy, state))
    return strategy.start(strategy.download(state, new, round), Factors(), new, round)


def begins_with_own(
    strategy: Strategy[Any], came: Download, kept: Factors, client: Client, round: Round
) -> bool:
    """Does what a client begins with hang on what it kept, beside what came?

    Measured: on other numbers of what it kept, and without it.
    """
    if not client.has_memory:
        return False
    g = seeded(round.seed, round.number, client.id, "begins with its own")
    moved = {k: x + torch.randn(x.shape, generator=g).to(x) for k, x in vector(kept).items()}
    other = strategy.start(came, factors(moved, kept), client, round)
    try:
        new = replace(client, has_memory=False)
        return not same(other, strategy.start(came, Factors(), new, round))
    except FedLoraError:  # without it, it cannot begin
        return True


def untrained(strategy: Strategy[Any], state: Any, client: Client, round: Round) -> Upload:
    """What a client would send back if it did not train."""
    sent, _ = strategy.upload(begun(strategy, state, client, round), Factors())
    trains = strategy.download(state, client, round).trainable
    return Upload(client, travelling(sent, trains), 1)


def same(one: Factors, other: Factors) -> bool:
    """Do both hold the same columns and names, with the same bits?"""
    a, b = vector(one), vector(other)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def follows_the_mean(strategy: Strategy[Any], state: Any, client: Client, round: Round) -> bool:
    """Is the aggregate of two uploads that of their mean? Measured on two made-up ones."""
    base = untrained(strategy, state, client, round)
    g = seeded(round.seed, round.number, 0, "follows the mean")
    moved = []
    for _ in range(2):
        change = {
            k: x + 0.1 * torch.randn(x.shape, generator=g) for k, x in vector(base.sent).items()
        }
        moved.append(replace(base, sent=factors(change, base.sent)))
    a, b = (vector(u.sent) for u in moved)
    middle = replace(base, sent=factors({k: (a[k] + b[k]) / 2 for k in a}, base.sent))
    two = strategy.effective(strategy.aggregate(state, iter(moved), round))
    one = strategy.effective(strategy.aggregate(state, iter([middle]), round))
    x = {m: torch.randn(layer.k, 2, generator=g) for m, layer in client.layers.items()}
    used, want = outputs(two, x), outputs(one, x)
    size = max(float(y.norm()) for y in want.values())
    close = all(torch.allclose(used[m], want[m], rtol=0, atol=1e-4 * size + 1e-9) for m in want)
    raw, other = vector(two.factors), vector(one.factors)
    equal = {
        k
        for k in other
        if raw[k].shape == other[k].shape and torch.allclose(raw[k], other[k], 1e-4, 1e-5)
    }
    heads = {k for k in other if k[0] == "other"}
    return close and heads <= equal and (size > 0 or equal == set(other))


def outputs(effective: Effective, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What adapter and base changes together make of probes x (k, n), by module."""
    adapter = effective.factors.adapter()
    result = {}
    for m, probe in x.items():
        y = adapter[m](probe) if m in adapter else torch.zeros(1)
        for version in effective.base:
            if m in version.delta:
                y = y + apply(version.delta[m], probe)
        result[m] = y
    return result


def _version(strategy: Strategy[Any], state: Any) -> int:
    base = strategy.effective(state).base
    return base[-1].number if base else 0
