"""FLoRIST: stack exactly, keep the singular values that hold most of the energy, send those down.

Ramesh and Dass, "FLoRIST: Singular Value Thresholding for Efficient and Accurate Federated
Fine-Tuning of Large Language Models", MLSys 2026, https://arxiv.org/abs/2506.09199

    server    U S V^T = svd(sum_i p_i W_i), W_i the change of W0 that client i ended with
              t = least with sum_{j<=t} S_j^2 >= energy sum_j S_j^2
              A = V_t^T,  B = U_t S_t:  one adapter, of a rank t of its own in each module

A client of r_i < t trains the leading ranks and folds the other t - r_i into its base for the
round, so it starts from the whole model; one of r_i > t gets directions from the first A, B = 0.

Deviation from (E): sqrt(sum_{j>t} S_j^2), at most sqrt(1 - energy) of the model's norm; none at
energy = 1, where t is the rank of the sum.
Costs, a layer and client: up r_i (d + k); down max(t, r_i) (d + k).

Source: abstract and notes. The server's half is theirs; how a client of another rank than t goes
on is reconstructed: the paper was not read that far.
Differs from the paper: energy .9 by default, of the .8 to .99 that it tries; how a client of
another rank than t goes on; the base never moves; W_i counts the folded ranks too.
Reasons and costs: docs/strategies/florist.md.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedlora.lora.adapter import Adapter, Factors, Pair, Tensors
from fedlora.lora.lowrank import stack, svd, tail
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
    rest,
    too_high,
)
from fedlora.strategies.defaults import Defaults
from fedlora.strategies.mixed import by_module, fit


@dataclass(frozen=True, slots=True, eq=False)
class State:
    mean: Adapter
    """The global adapter: A with orthonormal rows, S in B."""
    fresh: Tensors
    """The first A: it lends directions."""
    other: Tensors


@dataclass(frozen=True, slots=True)
class FLoRIST:
    defaults: ClassVar[Defaults] = Defaults(
        {"classification": 5e-3, "causal-lm": 5e-3}, few={"classification": 1e-2}
    )
    energy: float = 0.9
    """Share of the squared singular values that is kept; 1 keeps all. The authors' value in use."""

    def needs(self) -> Needs:
        return Needs(own_gauge=True)

    @property
    def promise(self) -> Promise:
        return "exact" if self.energy == 1 else "approximate"

    def problems(self, clients: Sequence[Client]) -> Iterator[str]:
        if not 0 < self.energy <= 1:
            yield (
                f"strategy.florist.energy = {self.energy}: "
                "must be in (0, 1]; use 1 to keep everything"
            )
        if gap := too_high(clients):
            yield f"florist sends singular vectors, but {gap}; use a lower rank, or flora"

    def threshold(self, pair: Pair) -> Pair:
        """The leading part of a pair's SVD that holds the energy; of rank 1 at least."""
        U, S, Vh = svd(pair)
        if self.energy == 1:
            t = int((S[0] * torch.finfo(S.dtype).eps < S).sum())
        else:
            t = int((S.square().cumsum(0) < self.energy * S.square().sum()).sum()) + 1
        t = min(max(t, 1), len(S))
        return Pair(Vh[:t].contiguous(), U[:, :t] * S[:t])

    # -- server -------------------------------------------------------------------------------

    def init(self, start: Start) -> State:
        return State(start.factors.adapter(), start.factors.A, start.factors.other)

    def download(self, state: State, client: Client, round: Round) -> Download:
        pairs = {m: fit(state.mean[m], state.fresh[m], x) for m, x in client.layers.items()}
        return Download(
            as_factors(pairs, state.other),
            frozenset({"A", "B", "other"}),
            fold=rest(state.mean, client),
        )

    def aggregate(self, state: State, uploads: Iterable[Upload], round: Round) -> State:
        uploads = list(uploads)
        mean = dict(state.mean)
        for m, (pairs, p) in by_module(uploads, lambda u: u.sent.adapter()).items():
            folded = [tail(state.mean[m], x.rank) for x in pairs]
            best, dtype = self.threshold(stack([*pairs, *folded], [*p, *p])), mean[m].A.dtype
            mean[m] = Pair(best.A.to(dtype), best.B.to(dtype))
        return replace(state, mean=mean, other=mean_other(uploads, state.other))

    def trained(self, state: State, upload: Upload, round: Round) -> Adapter:
        pairs = upload.sent.adapter()
        return {m: stack([x, tail(state.mean[m], x.rank)]) for m, x in pairs.items()}

    def effective(self, state: State, client: Client | None = None) -> Effective:
        return Effective((), as_factors(state.mean, state.other))

    # -- client -------------------------------------------------------------------------------

    def start(self, download: Download, kept: Factors, client: Client, round: Round) -> Factors:
        return download.send

    def upload(self, trained: Factors, kept: Factors) -> tuple[Factors, Factors]:
        return trained, kept
