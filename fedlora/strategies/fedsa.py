"""FedSA-LoRA: share A, keep B and the head at home. Every client ends with its own model.

Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning", ICLR 2025,
https://arxiv.org/abs/2410.01463

    client i   trains A_i, B_i and its head, from Abar and its own last B_i; sends A_i alone
    server     Abar[j] = sum_i p_i A_i[j],  p_i over the clients with r_i > j
    client's model    W0 + s_i B_i Abar

Deviation from (E): there is no one model; what is shared, A, is averaged exactly. At the end,
since all hold the same Abar, the mean of their models is one adapter (`average_at_end`):

    sum_i p_i s_i B_i Abar = s Bbar Abar,   at the price of one upload of B and head

Costs, a layer and client: up r_i k, down r_i k; at the end up r_i d. A newcomer gets the head.

FedSA-rsLoRA is lora.use-rslora = true; FedSA-VeRA is lora.form = "vera", whose vector d is A's side
and whose b is B's (see forms.py): up r numbers a layer, down r.

Differs from the paper: B stays on the client even where clients share a process; p_i over the
clients that replied; ranks may differ; the average at the end. A client that was away comes back
with an old B against a moved A: its loss shows it for a few steps.
Reasons and costs: docs/strategies/fedsa.md.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedlora.lora.adapter import Adapter, Factors, Pair
from fedlora.strategies.base import (
    Client,
    Download,
    Effective,
    Needs,
    Promise,
    Round,
    Start,
    Upload,
    remembered,
    scales,
)
from fedlora.strategies.defaults import Defaults
from fedlora.strategies.mixed import mean_ranks


@dataclass(frozen=True, slots=True)
class FedSA:
    defaults: ClassVar[Defaults] = Defaults(
        {"classification": 5e-3, "causal-lm": 2e-3}, few={"classification": 1e-2}
    )
    average_at_end: bool = True
    """After the last round ask each client once for its B and head, to export one model."""

    def needs(self) -> Needs:
        return Needs(
            client_memory=True,
            algebra="sides",
            others="kept",
            collect_at_end=self.average_at_end,
        )

    @property
    def promise(self) -> Promise:
        return "shared"

    def problems(self, clients: Sequence[Client]) -> Iterator[str]:
        yield from ()

    # -- server -------------------------------------------------------------------------------

    def init(self, start: Start) -> Factors:
        return start.factors

    def download(self, state: Factors, client: Client, round: Round) -> Download:
        A = {m: state.A[m][: layer.rank] for m, layer in client.layers.items()}
        head = {} if client.has_memory else state.other
        return Download(Factors(scales(client), A, other=head), frozenset({"A", "B", "other"}))

    def aggregate(self, state: Factors, uploads: Iterable[Upload], round: Round) -> Factors:
        return mean_ranks(uploads, state, absent="skipped")

    def trained(self, state: Factors, upload: Upload, round: Round) -> Adapter:
        """The shared part: A_i, behind the identity."""
        return {m: Pair(A, torch.eye(A.shape[0]).to(A)) for m, A in upload.sent.A.items()}

    def effective(self, state: Factors, client: Client | None = None) -> Effective:
        return Effective((), state)

    def finish(self, state: Factors, uploads: Iterable[Upload]) -> Factors:
        """The state with the average of what the clients had kept: each upload is a `kept`."""
        return mean_ranks(uploads, state, absent="zero")

    # -- client -------------------------------------------------------------------------------

    def start(self, download: Download, kept: Factors, client: Client, round: Round) -> Factors:
        send = download.send
        if not client.has_memory:
            B = {m: torch.zeros(x.d, x.rank).to(send.A[m]) for m, x in client.layers.items()}
            return replace(send, B=B)
        B = remembered({}, kept.B, client, "the B that fedsa keeps at home")
        return replace(send, B=B, other=kept.other)

    def upload(self, trained: Factors, kept: Factors) -> tuple[Factors, Factors]:
        sent = Factors(trained.scale, trained.A)
        return sent, Factors(trained.scale, B=trained.B, other=trained.other)
