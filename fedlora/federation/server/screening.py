"""Robust aggregation for any strategy: screens a round's updates before they are averaged.

Updates are judged by what they change in the model, s_i B_i A_i less what the client began with,
and never by A or B apart (strategies/robust.py says why). What training changed in a head is not
judged; it shares its client's fate.

    norm-bound            a longer change is drawn back toward what the client was sent
    krum, multi-krum,
    trimmed               updates are left out
    median                p_i of the geometric median

Every client weighs the same under all of them, whatever it says of its examples: a count is a claim
like any other, and the one that a liar gains most by.

Composes with every strategy that sees a client's whole update: the last two leave the strategy's
average as it is, over other clients or other weights, and a shortened update is an update. It
does not with one that keeps a factor on its clients, nor with client-level privacy:
fedlora/preflight/.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedlora.config.reader import Config
from fedlora.lora.adapter import COLUMNS, Adapter, Factors
from fedlora.strategies import robust
from fedlora.strategies.base import Round, Strategy, Upload

WEIGHT = 10**9
"""Number of examples that stands for p = 1 under method = "median"."""
HALVINGS = 40


@dataclass
class Verdict:
    """What was done, for the round's record."""

    method: str
    norms: dict[int, float] = field(default_factory=dict)
    """Length of each client's change."""
    dropped: list[int] = field(default_factory=list)
    factors: dict[int, float] = field(default_factory=dict)
    """By client: what its change was shortened to, or its weight."""


def screen(
    uploads: Sequence[Upload], strategy: Strategy[Any], state: Any, round: Round, config: Config
) -> tuple[list[Upload], Verdict]:
    """The updates to aggregate, in order, and what was done to them.

    Raises:
        StrategyError: too few updates came for the method.
    """
    r = config.robust
    starts = [began(strategy, state, u, round) for u in uploads]
    changes = [
        robust.change(strategy.trained(state, u, round), strategy.trained(state, s, round))
        for u, s in zip(uploads, starts, strict=True)
    ]
    ids = [u.client.id for u in uploads]
    alike = [replace(u, num_examples=1) for u in uploads]
    verdict = Verdict(r.method, dict(zip(ids, robust.norms(changes).tolist(), strict=True)))
    weights = [1.0] * len(uploads)
    match r.method:
        case "norm-bound":
            bound = r.bound or statistics.median(verdict.norms.values())
            verdict.factors = {
                u.client.id: _shorten(strategy, state, round, s, u, bound)
                for u, s in zip(uploads, starts, strict=True)
                if verdict.norms[u.client.id] > bound
            }
            kept = [
                _between(s, u, verdict.factors.get(u.client.id, 1.0))
                for u, s in zip(alike, starts, strict=True)
            ]
            return kept, verdict
        case "median":
            p = robust.geometric_median(changes, weights)
            verdict.factors = dict(zip(ids, p, strict=True))
            weighted = [
                replace(u, num_examples=max(1, round_(WEIGHT * x)))
                for u, x in zip(uploads, p, strict=True)
            ]
            return weighted, verdict
        case "trimmed":
            chosen = robust.trimmed(changes, weights, r.share)
        case _:
            keep = 1 if r.method == "krum" else len(uploads) - r.byzantine
            chosen = robust.krum(changes, r.byzantine, keep)
    verdict.dropped = [i for n, i in enumerate(ids) if n not in set(chosen)]
    return [alike[n] for n in chosen], verdict


def began(strategy: Strategy[Any], state: Any, upload: Upload, round: Round) -> Upload:
    """What the client would have sent had it not trained: what its update is a change of."""
    client = replace(upload.client, has_memory=False)
    came = strategy.download(state, client, round)
    sent, _ = strategy.upload(strategy.start(came, Factors(), client, round), Factors())
    columns = {
        c: {n: x for n, x in getattr(sent, c).items() if n in getattr(upload.sent, c)}
        for c in COLUMNS
    }
    return replace(upload, sent=Factors(upload.sent.scale, **columns))


def _between(start: Upload, end: Upload, share: float) -> Upload:
    """The upload that has gone `share` of the way from start to end, factor by factor."""
    if share >= 1:
        return end
    columns: dict[str, Any] = {
        c: {n: a.lerp(x.to(a), share) for n, x in getattr(end.sent, c).items()
            if (a := getattr(start.sent, c)[n]) is not None}
        for c in COLUMNS
    }  # fmt: skip
    return replace(end, sent=Factors(end.sent.scale, **columns))


def _shorten(
    strategy: Strategy[Any], state: Any, round: Round, start: Upload, end: Upload, bound: float
) -> float:
    """The share of the way at which the change of the product is no longer than the bound.

    Where one factor trains, the change is linear in it and this is bound / length; where both
    do, it is found by halving.
    """
    before: Adapter = strategy.trained(state, start, round)
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        there = strategy.trained(state, _between(start, end, middle), round)
        length = float(robust.norms([robust.change(there, before)])[0])
        low, high = (middle, high) if length <= bound else (low, middle)
    return low


def round_(x: float) -> int:
    return int(x + 0.5)
