"""FedEx-LoRA: average A and B, and move what the average misses into the base. Exact.

Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of
Foundation Models", ACL 2025, https://arxiv.org/abs/2410.09432

    client i   W <- W + s Res;  trains A_i, B_i from (Abar, Bbar); sends both
    server     Abar = sum_i p_i A_i,   Bbar = sum_i p_i (s_i / s) B_i
               Res  = sum_i p_i (s_i / s) B_i A_i - Bbar Abar

`Res` is a covariance, so it is U V of rank (m - 1) r, less than the m r of a stack; its factors are
the updates themselves less a centre, taken off when it is sent (`lowrank.mean_and_residual`).
`rank` > 0 keeps the nearest residual of that rank.

A client of r_i < r trains the leading ranks; the others, s Bbar[:, r_i:] Abar[r_i:], are folded
into its base for the round, so it too starts from the whole model.

Deviation from (E): none; with `rank` = t, sqrt(sum_{j>t} sigma_j(s Res)^2) a layer.
Costs, a layer and client: up r_i (d + k); down r_i (d + k), and (m - 1) r (d + k) or t (d + k)
for each round it lacks, and (r - r_i)(d + k) for a narrow client's fold.

Differs from the paper: p_i in both terms in place of uniform; scales and ranks may differ; the
residual travels in factors; clients that were away get each residual they missed. From the public
code: the residual is added as it is, where theirs is transposed, which square layers hide.
Reasons and costs: docs/strategies/fedex.md.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from fedlora.lora.adapter import Adapter, Delta, Factors, Pair
from fedlora.lora.lowrank import compress, extend, mean_and_residual
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
    narrow,
    rest,
)
from fedlora.strategies.base_log import BaseLog
from fedlora.strategies.defaults import Defaults
from fedlora.strategies.mixed import by_module


@dataclass(frozen=True, slots=True, eq=False)
class State:
    factors: Factors
    base: BaseLog = field(default_factory=BaseLog)


@dataclass(frozen=True, slots=True)
class FedEx:
    defaults: ClassVar[Defaults] = Defaults(
        {"classification": 5e-3, "causal-lm": 2e-3}, few={"classification": 1e-2}
    )
    rank: int = 0
    """Rank the residual is cut to; 0 keeps all of it."""

    def needs(self) -> Needs:
        return Needs(moving_base=True)

    @property
    def promise(self) -> Promise:
        return "approximate" if self.rank else "exact"

    def problems(self, clients: Sequence[Client]) -> Iterator[str]:
        if self.rank < 0:
            yield (
                f"strategy.fedex.rank = {self.rank}: "
                "must be 0 (the exact residual) or a rank to cut it to"
            )

    # -- server -------------------------------------------------------------------------------

    def init(self, start: Start) -> State:
        return State(start.factors)

    def download(self, state: State, client: Client, round: Round) -> Download:
        whole, layers = state.factors.adapter(), client.layers
        send = as_factors({m: narrow(whole[m], layers[m]) for m in layers}, state.factors.other)
        return Download(
            send,
            frozenset({"A", "B", "other"}),
            base=state.base.since(client.base_version),
            fold=rest(whole, client),
        )

    def aggregate(self, state: State, uploads: Iterable[Upload], round: Round) -> State:
        uploads = list(uploads)  # the residual is made of every one of them
        before = state.factors.adapter()
        whole = dict(before)
        missed: dict[str, Delta] = {}
        for m, (pairs, p) in by_module(uploads, lambda u: completed(u, before)).items():
            mean, gap = mean_and_residual(pairs, p)
            whole[m] = Pair(mean.A.to(whole[m].A), mean.B.to(whole[m].B), whole[m].scale)
            if gap.rank:
                missed[m] = compress(gap.pair(), self.rank) if self.rank else gap
        other = mean_other(uploads, state.factors.other)
        return State(as_factors(whole, other), state.base.add(missed) if missed else state.base)

    def trained(self, state: State, upload: Upload, round: Round) -> Adapter:
        return completed(upload, state.factors.adapter())

    def effective(self, state: State, client: Client | None = None) -> Effective:
        return Effective(state.base.versions, state.factors)

    # -- client -------------------------------------------------------------------------------

    def start(self, download: Download, kept: Factors, client: Client, round: Round) -> Factors:
        return download.send

    def upload(self, trained: Factors, kept: Factors) -> tuple[Factors, Factors]:
        return trained, kept


def completed(upload: Upload, whole: Adapter) -> Adapter:
    """An upload's pairs, with the ranks that were folded into its client's base."""
    return {m: extend(pair, whole[m]) for m, pair in upload.sent.adapter().items()}
