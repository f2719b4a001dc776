"""raFLoRA: FlexLoRA whose weights count, rank by rank, only the clients that hold the rank.

Wu et al., "Preventing Rank Collapse in Federated Low-Rank Adaptation with Client Heterogeneity",
2026, https://arxiv.org/abs/2602.13486

    delta = sum_j sum_{i: r_i > j} (n_i / sum_{l: r_l > j} n_l) s_i B_i[:, j] A_i[j]
    U S V^T = svd(delta);  to client i as in FlexLoRA

The paper writes it by blocks of ranks between the configured r_i; within a block the same clients
hold every rank, so weights by rank are the same sum, whatever part of the clients replied.

Deviation from (E): where ranks differ, the ranks that few hold weigh more than their p_i, which
is the point. With one rank for all it is FlexLoRA.
Costs, a layer and client: up r_i (d + k), down r_i (d + k).

Source: a third party's code and the abstract; no official code was read.
Differs from the paper: weights rank by rank, not by blocks; ranks above all of the cohort's, up to
the highest configured, stay as they were; the SVD goes through the small core.
Reasons and costs: docs/strategies/raflora.md.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedlora.lora.adapter import Adapter, Factors, Pair, Tensors
from fedlora.lora.lowrank import compress, pick, stack, wide
from fedlora.strategies.base import (
    Client,
    Download,
    Effective,
    Needs,
    Promise,
    Round,
    Start,
    Upload,
    as_factors,
    mean_other,
    too_high,
)
from fedlora.strategies.defaults import Defaults
from fedlora.strategies.mixed import by_module, fit


@dataclass(frozen=True, slots=True, eq=False)
class State:
    mean: Adapter
    """delta of the last round: A with orthonormal rows, S in B."""
    fresh: Tensors
    """The first A, of the highest configured rank: it lends directions."""
    other: Tensors


def by_rank(pairs: Sequence[Pair], p: Sequence[float]) -> Pair:
    """The pairs' sum, rank j of each weighted over those that have it."""
    held = torch.zeros(max(x.rank for x in pairs), dtype=torch.float64)
    for x, weight in zip(pairs, p, strict=True):
        held[: x.rank] += weight
    weighted = [
        replace(x, B=wide(x.B) * (w / held[: x.rank]).to(wide(x.B)))
        for x, w in zip(pairs, p, strict=True)
    ]
    return stack(weighted)


@dataclass(frozen=True, slots=True)
class RaFLoRA:
    defaults: ClassVar[Defaults] = Defaults(
        {"classification": 5e-3, "causal-lm": 5e-3}, few={"classification": 1e-2}
    )
    max_rank: int = 64
    """Rank the server keeps between rounds."""

    def needs(self) -> Needs:
        return Needs(own_gauge=True)

    @property
    def promise(self) -> Promise:
        return "approximate"

    def problems(self, clients: Sequence[Client]) -> Iterator[str]:
        if gap := too_high(clients):
            yield f"raflora sends singular vectors, but {gap}; use a lower rank, or flora"
        top = max((x.rank for c in clients for x in c.layers.values()), default=0)
        if self.max_rank < top:
            yield (
                f"strategy.raflora.max-rank = {self.max_rank}: use at least the highest rank, {top}"
            )

    # -- server -------------------------------------------------------------------------------

    def init(self, start: Start) -> State:
        return State(start.factors.adapter(), start.factors.A, start.factors.other)

    def download(self, state: State, client: Client, round: Round) -> Download:
        pairs = {m: fit(state.mean[m], state.fresh[m], x) for m, x in client.layers.items()}
        return Download(as_factors(pairs, state.other), frozenset({"A", "B", "other"}))

    def aggregate(self, state: State, uploads: Iterable[Upload], round: Round) -> State:
        uploads = list(uploads)
        mean = dict(state.mean)
        for m, (pairs, p) in by_module(uploads, lambda u: u.sent.adapter()).items():
            configured = min(state.fresh[m].shape[0], mean[m].rank)
            above = torch.arange(max(x.rank for x in pairs), configured)
            best = compress(stack([by_rank(pairs, p), pick(mean[m], above)]), self.max_rank)
            mean[m] = Pair(best.A.to(mean[m].A.dtype), best.B.to(mean[m].A.dtype))
        return replace(state, mean=mean, other=mean_other(uploads, state.other))

    def trained(self, state: State, upload: Upload, round: Round) -> Adapter:
        return upload.sent.adapter()

    def effective(self, state: State, client: Client | None = None) -> Effective:
        return Effective((), as_factors(state.mean, state.other))

    # -- client -------------------------------------------------------------------------------

    def start(self, download: Download, kept: Factors, client: Client, round: Round) -> Factors:
        return download.send

    def upload(self, trained: Factors, kept: Factors) -> tuple[Factors, Factors]:
        return trained, kept
