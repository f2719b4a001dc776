"""What secure aggregation does not go with, said before anything is sent.

`refused` reads the config alone; `alone` the clients; `unsummable` measures the strategy itself.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedlora.federation.secure.terms import SMALLEST, Terms

if TYPE_CHECKING:
    from fedlora.config.reader import Config
    from fedlora.federation.secure.vector import Kind
    from fedlora.strategies.base import Client, Round, Strategy, Upload

TOGETHER = 2
"""The fewest clients of equal ranks: what only one of them holds would not be a sum."""
TOLERANCE = 1e-4


def refused(config: "Config") -> Iterator[str]:
    """Each setting that needs what the server no longer sees, and what to do instead."""
    s = config.secure
    if not s.aggregation:
        return
    yield from _numbers(config)
    p = config.privacy
    if p.by_client:
        yield (
            "privacy.level = 'client' with secure.aggregation: the server clips each client's "
            "update, which it no longer sees; use privacy.level = 'example', which the clients add"
        )
    if p.release_metrics:
        yield "privacy.release-metrics = true: secure.aggregation keeps those on the clients"
    if config.robust.method != "none":
        yield (
            f"robust.method = {config.robust.method!r}: it judges single updates, and with "
            "secure.aggregation the server has none; set it to 'none'"
        )
    if config.round.max_norm:
        yield (
            "round.max-norm: with secure.aggregation the server cannot take the norm of one "
            "update; set it to 0. Each client checks its own against secure.clipping-range"
        )
    if config.output.keep_updates:
        yield "output.keep-updates = true: with secure.aggregation no update reaches the server"
    if config.ranks.policy == "legend" or config.devices.classes:
        what = "ranks.policy = 'legend'" if config.ranks.policy == "legend" else "devices.classes"
        yield f"{what}: it needs each client's steps and times, which secure.aggregation keeps back"
    strategy = config.build_strategy()
    if getattr(strategy, "average_at_end", False):
        yield (
            "strategy.fedsa.average-at-end = true: it asks each client for what it kept, in the "
            "clear; set it to false with secure.aggregation"
        )
    if getattr(strategy, "wants_gradient", False):
        yield (
            f"strategy.name = {config.strategy.name!r}: this initialisation sends each client's "
            "first gradient in the clear; choose another, such as 'orthogonal'"
        )


def _numbers(config: "Config") -> Iterator[str]:
    s, n = config.secure, config.clients.per_round or config.clients.count
    if n < SMALLEST:
        yield (
            f"secure.aggregation with {n} clients a round: must be {SMALLEST} at least, since of a "
            "sum of two either knows the other's part; raise clients.count or clients.per-round"
        )
        return
    if s.num_shares and (s.num_shares > n or s.num_shares < SMALLEST):
        yield f"secure.num-shares = {s.num_shares}: must be {SMALLEST} to {n}, or 0 for all"
    elif s.num_shares and s.num_shares < n and s.num_shares % 2 == 0:
        yield (
            f"secure.num-shares = {s.num_shares}: must be odd, one's own and as many on either "
            f"side, unless it is all {n}"
        )
    terms = Terms.of(config, n)
    if not terms.shares < 2 * terms.threshold <= 2 * terms.shares:
        yield (
            f"secure.reconstruction-threshold = {terms.threshold}: must be more than half of the "
            f"{terms.shares} shares, so that no two sets of clients can be told two stories, "
            f"and at most {terms.shares}"
        )
    if n * terms.weight >= 2 ** (terms.bits - 1):
        yield (
            f"secure.max-weight = {terms.weight}: the sum over {n} clients does not fit into "
            f"secure.modulus-bits = {terms.bits}; lower it, or set 64"
        )


def alone(clients: Sequence["Client"]) -> Iterator[str]:
    """Which clients nothing can be added to, however many others there are."""
    kinds = Counter(_ranks(c) for c in clients)
    for c in clients:
        if kinds[_ranks(c)] < TOGETHER:
            ranks = sorted({x.rank for x in c.layers.values()})
            yield (
                f"secure.aggregation: client {c.id} is the only one of rank "
                f"{', '.join(map(str, ranks))} in these modules, so the rows of that rank and its "
                f"weight would be no sum; each rank must have {TOGETHER} clients at least: set "
                "clients.ranks, or one rank for all"
            )


def _ranks(client: "Client") -> tuple[tuple[str, int], ...]:
    return tuple(sorted((m, x.rank) for m, x in client.layers.items()))


def unsummable(
    strategy: "Strategy[Any]", state: Any, kinds: Sequence["Kind"], round: "Round"
) -> str:
    """Why the strategy needs more than the sum of what clients send; empty if it does not.

    Measured on made-up updates of two clients of each kind: its state after them must be its
    state after the uploads that stand for their sum.
    """
    from fedlora.federation.secure.vector import Layout, decode, encode
    from fedlora.strategies.base import seeded
    from fedlora.strategies.probing import factors, outputs, untrained, vector

    g = seeded(round.seed, round.number, 0, "secure")
    layout, total = Layout.over([k.shapes for k in kinds]), None
    uploads: list[Upload] = []
    terms = Terms(TOGETHER * len(kinds), 0, 0, 64, 2.0**12, 16)
    for n, kind in enumerate(kinds):
        for client in kind.clients[:TOGETHER]:
            base = untrained(strategy, state, client, round)
            moved = {
                k: x + 0.1 * torch.randn(x.shape, generator=g) for k, x in vector(base.sent).items()
            }
            weight = 1 + (5 * len(uploads)) % 16
            upload = replace(base, sent=factors(moved, base.sent), num_examples=weight)
            uploads.append(upload)
            words = encode(upload.sent, weight, 0.0, n, layout, terms)
            total = words if total is None else total + words
    assert total is not None
    sums, _, _ = decode(total, len(uploads), layout, kinds, terms)
    each = strategy.aggregate(state, iter(uploads), round)
    once = strategy.aggregate(state, iter(sums), round)
    layers = {m: x for kind in kinds for m, x in kind.clients[0].layers.items()}
    probes = {m: torch.randn(x.k, 2, generator=g) for m, x in layers.items()}
    used = outputs(strategy.effective(each), probes)
    got = outputs(strategy.effective(once), probes)
    same = all(_close(used[m], got[m]) for m in used)
    if same and (strategy.requires.own_gauge or _alike(each, once)):
        return ""
    return (
        f"secure.aggregation: {type(strategy).__name__} needs each client's own update (its "
        "product B_i A_i, its norm, or the ranks it chose), and of these clients the server "
        "learns sums only; use ffa, fedsb, rolora, fedsvd or ravan, which are exact from sums, "
        "fedsa, or with one rank for all fedavg or frlora"
    )


def _close(x: Tensor, y: Tensor) -> bool:
    size = float(y.double().norm()) / max(1, y.numel()) ** 0.5
    return x.shape == y.shape and torch.allclose(
        x.double(), y.double(), rtol=TOLERANCE, atol=TOLERANCE * size + 1e-9
    )


def _alike(x: Any, y: Any) -> bool:
    """Are two states the same, whatever they are made of?"""
    if isinstance(x, Tensor):
        return isinstance(y, Tensor) and _close(x, y)
    if is_dataclass(x):
        return type(x) is type(y) and all(
            _alike(getattr(x, f.name), getattr(y, f.name)) for f in fields(x)
        )
    if isinstance(x, Mapping):
        return x.keys() == y.keys() and all(_alike(x[key], y[key]) for key in x)
    if isinstance(x, tuple | list):
        return len(x) == len(y) and all(map(_alike, x, y))
    return bool(x == y)
