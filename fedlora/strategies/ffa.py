"""FFA-LoRA: freeze A, average B. Exact, at half the traffic; needs a higher learning rate.

Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024,
https://arxiv.org/abs/2403.12313

    once       A0 (r, k) is sent to each client, which keeps it
    client i   trains B_i from Bbar, its A frozen; sends B_i
    server     Bbar = sum_i p_i (s_i / s) B_i

A client of r_i < r trains the leading ranks, A0[:r_i] with Bbar[:, :r_i]; the others are folded
into its base for the round and count as unchanged in the average.

Deviation from (E): none, since s Bbar A0 is linear in B.
Costs, a layer and client: up r_i d, down r_i d, and r_i k once; (r - r_i)(d + k) for a fold.

Differs from the paper: p_i in place of a uniform mean; ranks may differ, by nested A0.
Reasons and costs: docs/strategies/ffa.md.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
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
    remembered,
    rest,
)
from fedlora.strategies.defaults import Defaults
from fedlora.strategies.mixed import mean_ranks


@dataclass(frozen=True, slots=True)
class FFA:
    defaults: ClassVar[Defaults] = Defaults({
        "classification": 2e-2, "causal-lm": 1e-2, "classification/vera": 2e-2,
        "classification/melora": 2e-2, "classification/lora-mini": 2e-2, "classification/nora":
        0.2,
    })  # fmt: skip

    def needs(self) -> Needs:
        return Needs(client_memory=True, algebra="sides")

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
        send = as_factors(pairs, state.other)
        if client.has_memory:
            send = replace(send, A={})
        return Download(send, frozenset({"B", "other"}), fold=rest(whole, client))

    def aggregate(self, state: Factors, uploads: Iterable[Upload], round: Round) -> Factors:
        return mean_ranks(uploads, state, absent="unchanged")

    def trained(self, state: Factors, upload: Upload, round: Round) -> Adapter:
        whole, sent = state.adapter(), upload.sent
        return {
            m: extend(Pair(state.A[m][: B.shape[1]], B, sent.scale[m]), whole[m])
            for m, B in sent.B.items()
        }

    def effective(self, state: Factors, client: Client | None = None) -> Effective:
        return Effective((), state)

    # -- client -------------------------------------------------------------------------------

    def start(self, download: Download, kept: Factors, client: Client, round: Round) -> Factors:
        A = remembered(download.send.A, kept.A, client, "the frozen A")
        return replace(download.send, A=A)

    def upload(self, trained: Factors, kept: Factors) -> tuple[Factors, Factors]:
        return replace(trained, A={}), Factors(A=trained.A)
