"""FRLoRA: add each round's change to the base, and start again from W0's principal part.

Yan et al., "Federated Residual Low-Rank Adaptation of Large Language Models", ICLR 2025,
https://openreview.net/forum?id=e0rQRMUhs7

    once       U S V^T = svd(W0):  B_0 = U_r sqrt(S_r / s),  A_0 = sqrt(S_r / s) V_r^T
               W = W0 - s B_0 A_0, so that W + s B_0 A_0 is W0
    client i   trains A_i, B_i from (A_0, B_0) on W; sends both
    server     Abar = sum_i p_i A_i,  Bbar = sum_i p_i (s_i / s) B_i
               W <- W + s (Bbar Abar - B_0 A_0)

Deviation from (E): that of FedAvg, s sum_i p_i (B_i - Bbar)(A_i - Abar); what it changes is that
every round trains a new update, so the sum of the rounds is not bound to rank r.
Costs, a layer and client: up r (d + k); down r (d + k), and 2 r (d + k) for each round it lacks.

Source: the authors' code (label_skew_ours.py, fed_global.py).
Differs from the paper, and from the code: p_i in place of uniform weights; A_0, B_0 are sent each
time, so that a client needs no memory but its base; a large W0 is factorised by subspace iteration.
Reasons and costs: docs/strategies/frlora.md.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from fedlora.lora.adapter import Adapter, Factors
from fedlora.lora.lowrank import principal, stack
from fedlora.strategies.base import (
    Client,
    Download,
    Effective,
    Needs,
    Promise,
    Round,
    Start,
    Upload,
    mean,
    part,
    seeded,
    too_high,
    uneven,
)
from fedlora.strategies.base_log import BaseLog
from fedlora.strategies.defaults import Defaults


@dataclass(frozen=True, slots=True, eq=False)
class State:
    factors: Factors
    """A_0 and B_0, which every round starts from, and the head."""
    base: BaseLog


@dataclass(frozen=True, slots=True)
class FRLoRA:
    defaults: ClassVar[Defaults] = Defaults(
        {"classification": 2e-3, "causal-lm": 1e-3}, few={"classification": 1e-2}
    )

    def needs(self) -> Needs:
        return Needs(equal_ranks=True, moving_base=True)

    @property
    def promise(self) -> Promise:
        return "approximate"

    def problems(self, clients: Sequence[Client]) -> Iterator[str]:
        if gap := uneven(clients):
            yield f"frlora averages factors, so it needs one rank for all, but {gap}; use flora"
        if gap := too_high(clients):
            yield f"frlora starts from singular vectors, but {gap}; use a lower rank, or flora"

    # -- server -------------------------------------------------------------------------------

    def init(self, start: Start) -> State:
        A, B = {}, {}
        for m, A0 in start.factors.A.items():
            s, generator = start.factors.scale[m], seeded(start.seed, 0, 0, f"frlora/{m}")
            U, S, Vh = principal(start.weights[m], A0.shape[0], generator)
            root = (S / s).sqrt()
            A[m], B[m] = (root[:, None] * Vh).to(A0), (U * root).to(A0)
        factors = replace(start.factors, A=A, B=B)
        taken = {m: stack([pair], [-1.0]) for m, pair in factors.adapter().items()}
        return State(factors, BaseLog().add(taken))

    def download(self, state: State, client: Client, round: Round) -> Download:
        return Download(
            part(state.factors, client),
            frozenset({"A", "B", "other"}),
            base=state.base.since(client.base_version),
        )

    def aggregate(self, state: State, uploads: Iterable[Upload], round: Round) -> State:
        after = mean(uploads, state.factors)
        old, new = state.factors.adapter(), after.adapter()
        moved = {
            m: stack([new[m], old[m]], [1.0, -1.0])
            for m in new
            if after.A[m] is not state.factors.A[m]  # `mean` carries what no one sent
        }
        base = state.base.add(moved) if moved else state.base
        return State(replace(state.factors, other=after.other), base)

    def trained(self, state: State, upload: Upload, round: Round) -> Adapter:
        return upload.sent.adapter()

    def effective(self, state: State, client: Client | None = None) -> Effective:
        return Effective(state.base.versions, state.factors)

    # -- client -------------------------------------------------------------------------------

    def start(self, download: Download, kept: Factors, client: Client, round: Round) -> Factors:
        return download.send

    def upload(self, trained: Factors, kept: Factors) -> tuple[Factors, Factors]:
        return trained, kept
