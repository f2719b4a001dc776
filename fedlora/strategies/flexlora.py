"""FlexLoRA: average the updates, not their factors, and give each client the best of its rank.

Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
Resources", NeurIPS 2024, https://arxiv.org/abs/2402.11505

    client i       trains A_i, B_i of its own rank r_i; sends both
    server         delta = sum_i p_i s_i B_i A_i,   U S V^T = svd(delta)
    to client i    A = V[:, :r_i]^T,   B = U[:, :r_i] S[:r_i] / s_i

Deviation from (E): none in the server's model while max_rank >= sum_i r_i. A client starts from
its best approximation of rank r_i, which misses sqrt(sum_{j>r_i} sigma_j^2) (Eckart-Young).
Costs, a layer and client: up r_i (d + k), down r_i (d + k).

Differs from the paper: the SVD goes through the factors' small core, never a dense delta; a
client of a rank above delta's gets the missing directions from the first A, with B = 0. From the
public code: scales are folded in, whatever alpha is, and clients have ranks of their own.
Reasons and costs: docs/strategies/flexlora.md.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from fedlora.lora.adapter import Adapter, Factors, Pair, Tensors
from fedlora.lora.lowrank import compress, stack
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
    """sum_i p_i s_i B_i A_i of the last round: A with orthonormal rows, S in B."""
    fresh: Tensors
    """The first A: it lends directions."""
    other: Tensors


@dataclass(frozen=True, slots=True)
class FlexLoRA:
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
            yield f"flexlora sends singular vectors, but {gap}; use a lower rank, or flora"
        top = max((x.rank for c in clients for x in c.layers.values()), default=0)
        if self.max_rank < top:
            yield (
                f"strategy.flexlora.max-rank = {self.max_rank}: "
                f"use at least the highest rank, {top}"
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
            best, dtype = compress(stack(pairs, p), self.max_rank), mean[m].A.dtype
            mean[m] = Pair(best.A.to(dtype), best.B.to(dtype))
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
