"""Robust aggregation for any strategy: screens a round's updates before they are averaged.

Updates are judged by what they change in the model, s_i B_i A_i less what the client began with,
and never by A or B apart (strategies/robust.py says why); and by what training changed in a head
and whatever else trains beside the adapter, or a client could turn round that alone. The two differ
in size by orders of magnitude, so each is measured in units of its own median length in the round.

    norm-bound            a change longer than the bound, in either part, is drawn back toward what
                          the client was sent
    krum, multi-krum,
    trimmed, afa          updates are left out
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
    """Length of the change of each client's adapter."""
    others: dict[int, float] = field(default_factory=dict)
    """Length of what each changed beside it, as in a head; empty where nothing else trains."""
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
    adapters = [
        robust.change(strategy.trained(state, u, round), strategy.trained(state, s, round))
        for u, s in zip(uploads, starts, strict=True)
    ]
    others = [
        robust.beside(u.sent.other, s.sent.other) for u, s in zip(uploads, starts, strict=True)
    ]
    ids = [u.client.id for u in uploads]
    alike = [replace(u, num_examples=1) for u in uploads]
    verdict = Verdict(r.method, dict(zip(ids, robust.norms(adapters).tolist(), strict=True)))
    if any(others):
        verdict.others = dict(zip(ids, robust.norms(others).tolist(), strict=True))
    changes = robust.together([adapters, others])
    weights = [1.0] * len(uploads)
    match r.method:
        case "norm-bound":
            for u, s in zip(uploads, starts, strict=True):
                share = _share(strategy, state, round, s, u, verdict, r.bound)
                if share < 1:
                    verdict.factors[u.client.id] = share
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
        case "afa":
            chosen = robust.afa(changes, weights)
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


def _share(
    strategy: Strategy[Any],
    state: Any,
    round: Round,
    start: Upload,
    end: Upload,
    verdict: Verdict,
    given: float,
) -> float:
    """How far from start to end neither part's change is longer than the bound given, or its own
    median length in the round."""
    me, share = end.client.id, 1.0
    bound = given or statistics.median(verdict.norms.values())
    if verdict.norms[me] > bound:
        share = _shorten(strategy, state, round, start, end, bound)
    if verdict.others:
        bound = given or statistics.median(verdict.others.values())
        if verdict.others[me] > bound:
            share = min(share, bound / verdict.others[me])
    return share


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
