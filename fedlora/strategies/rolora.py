"""RoLoRA: train B in odd rounds and A in even ones. Exact, with half of the uplink.

Chen et al., "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA",
NeurIPS 2025, https://arxiv.org/abs/2502.01755

    odd rounds    B_i from (Abar, Bbar), A frozen:   Bbar = sum_i p_i (s_i / s) B_i
    even rounds   A_i from (Abar, Bbar), B frozen:   Abar = sum_i p_i A_i

A client of r_i < r trains the leading ranks; the others are folded into its base for the round
and count as unchanged in the average.

Deviation from (E): none: what is not trained is common, and s B A is linear in the other.
Costs, a layer and client: up r_i d or r_i k in turn; down r_i (d + k), and (r - r_i)(d + k) for a
fold. Both factors go down, so that a client that was away needs no memory.

Differs from the paper: p_i in place of a uniform mean; ranks may differ; both factors sent down.
Reasons and costs: docs/strategies/rolora.md.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedlora.lora.adapter import Adapter, Factors, Pair
from fedlora.lora.lowrank import extend
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
    narrow,
    rest,
)
from fedlora.strategies.defaults import Defaults
from fedlora.strategies.mixed import mean_ranks


@dataclass(frozen=True, slots=True)
class RoLoRA:
    defaults: ClassVar[Defaults] = Defaults(
        {"classification": 1e-2, "causal-lm": 5e-3}, few={"classification": 2e-2}
    )

    def needs(self) -> Needs:
        return Needs(algebra="sides")

    @property
    def promise(self) -> Promise:
        return "exact"

    def problems(self, clients: Sequence[Client]) -> Iterator[str]:
        yield from ()

    # -- server -------------------------------------------------------------------------------

    def init(self, start: Start) -> Factors:
        return start.factors

    def download(self, state: Factors, client: Client, round: Round) -> Download:
        whole = state.adapter()
        pairs = {m: narrow(whole[m], layer) for m, layer in client.layers.items()}
        turn = "B" if round.number % 2 else "A"
        return Download(
            as_factors(pairs, state.other), frozenset({turn, "other"}), fold=rest(whole, client)
        )

    def aggregate(self, state: Factors, uploads: Iterable[Upload], round: Round) -> Factors:
        return mean_ranks(uploads, state, absent="unchanged")

    def trained(self, state: Factors, upload: Upload, round: Round) -> Adapter:
        whole, sent = state.adapter(), upload.sent
        pairs = {}
        for m in {**sent.A, **sent.B}:
            frozen = narrow(whole[m], upload.client.layers[m])
            A, B = sent.A.get(m, frozen.A), sent.B.get(m, frozen.B)
            pairs[m] = extend(Pair(A, B, frozen.scale), whole[m])
        return pairs

    def effective(self, state: Factors, client: Client | None = None) -> Effective:
        return Effective((), state)

    # -- client -------------------------------------------------------------------------------

    def start(self, download: Download, kept: Factors, client: Client, round: Round) -> Factors:
        return download.send

    def upload(self, trained: Factors, kept: Factors) -> tuple[Factors, Factors]:
        return trained, kept
