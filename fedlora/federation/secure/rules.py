"""Which strategies can work from sums of updates, measured before anything is sent.

What else secure aggregation does not go with is said by fedlora/preflight/secure.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedlora.federation.secure.terms import Terms

if TYPE_CHECKING:
    from fedlora.federation.secure.vector import Kind
    from fedlora.strategies.base import Round, Strategy, Upload

TOGETHER = 2
"""The fewest clients of equal ranks: what only one of them holds would not be a sum."""
TOLERANCE = 1e-4


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

    if strategy.needs().client_choice:  # no two would send the same ranks
        return _needs_each(strategy)
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
    if same and (strategy.needs().own_gauge or _alike(each, once)):
        return ""
    return _needs_each(strategy)


def _needs_each(strategy: "Strategy[Any]") -> str:
    return (
        f"secure.aggregation: {type(strategy).__name__} needs each client's own update (its "
        "product B_i A_i, its norm, or the ranks it chose), and of these clients the server "
        "learns sums only; use ffa, fedsb, rolora or fedsvd, which are exact from sums, ravan with "
        "strategy.ravan.choice = 'leading', "
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
