"""FedAvg on LoRA (FedIT): average A and B apart. Simple, one rank for all, and not exact.

Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning", ICASSP 2024,
https://arxiv.org/abs/2305.05644

    client i   trains A_i, B_i from (Abar, Bbar); sends both
    server     Abar = sum_i p_i A_i,   Bbar = sum_i p_i (s_i / s) B_i

Deviation from (E): the covariance  s sum_i p_i (B_i - Bbar)(A_i - Abar), of rank <= (m - 1) r;
zero with one client, or where all A_i or all B_i are equal.
Costs, a layer and client: up r (d + k), down r (d + k).

Differs from the paper: p_i over the clients that replied; scales folded into B first.
Reasons and costs: docs/strategies/fedavg.md.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedlora.lora.adapter import Adapter, Factors
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
    uneven,
)
from fedlora.strategies.defaults import Defaults


@dataclass(frozen=True, slots=True)
class FedAvg:
    defaults: ClassVar[Defaults] = Defaults(
        {"classification": 5e-3, "causal-lm": 1e-2}, few={"classification": 1e-2}
    )

    def needs(self) -> Needs:
        return Needs(equal_ranks=True, algebra="tensors")

    @property
    def promise(self) -> Promise:
        return "approximate"

    def problems(self, clients: Sequence[Client]) -> Iterator[str]:
        if gap := uneven(clients):
            yield (
                f"fedavg averages factors, so it needs one rank for all, but {gap}; "
                "use fedex, flora or fslora"
            )

    # -- server -------------------------------------------------------------------------------

    def init(self, start: Start) -> Factors:
        return start.factors

    def download(self, state: Factors, client: Client, round: Round) -> Download:
        return Download(part(state, client), frozenset({"A", "B", "other"}))

    def aggregate(self, state: Factors, uploads: Iterable[Upload], round: Round) -> Factors:
        return mean(uploads, state)

    def trained(self, state: Factors, upload: Upload, round: Round) -> Adapter:
        return upload.sent.adapter()

    def effective(self, state: Factors, client: Client | None = None) -> Effective:
        return Effective((), state)

    # -- client -------------------------------------------------------------------------------

    def start(self, download: Download, kept: Factors, client: Client, round: Round) -> Factors:
        return download.send

    def upload(self, trained: Factors, kept: Factors) -> tuple[Factors, Factors]:
        return trained, kept
