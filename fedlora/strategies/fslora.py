"""FSLoRA: each client trains a random subset of the global ranks. Any ranks, cheap, unbiased.

Fang et al., "Federated Sketching LoRA: On-Device Collaborative Fine-Tuning of Large Language
Models", 2025, https://arxiv.org/abs/2501.19389

    S_i        (r / k_i) diag(1[j in I_i]),  |I_i| = k_i drawn by the server:  E[S_i] = I
    client i   trains f_i(W0 + s B S_i A), that is B[:, I_i] and A[I_i] at scale s r / k_i
    server     A[I_i] += p_i (A_i - A[I_i]),   B[:, I_i] += p_i (B_i - B[:, I_i])

Deviation from (E): not zero; the clients' factors are averaged apart, as in FedAvg, and a sketch
is scaled up by r / k_i. With k_i = r for all it is FedAvg exactly.
Costs, a layer and client: up k_i (d + k), down k_i (d + k); the index set is never sent.

`normalize` = "hits" divides rank j by the weight of the clients that drew it, not by that of all:
faster where k_i is small, and no longer the unbiased update that the paper analyses.

Differs from the paper: the server draws I_i and sends the slice, not all r ranks; p_i in place
of uniform. From the authors' code: a plain step in place of AdamW on the server; the sketch
applies, where theirs never does, so that every client trains all ranks.
Reasons and costs: docs/strategies/fslora.md.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

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
)
from fedlora.strategies.defaults import Defaults
from fedlora.strategies.mixed import mean_ranks, subset


def sketch(state: Factors, client: Client, round: Round, m: str) -> Tensor:
    """I_i: the ranks of a module that the client trains this round, in ascending order."""
    generator = round.generator(client.id, f"fslora/{m}")
    return subset(state.A[m].shape[0], client.layers[m].rank, generator)


@dataclass(frozen=True, slots=True)
class FSLoRA:
    defaults: ClassVar[Defaults] = Defaults({"classification": 1e-2, "causal-lm": 5e-3})
    normalize: Literal["none", "hits"] = "none"

    def needs(self) -> Needs:
        return Needs()

    @property
    def promise(self) -> Promise:
        return "approximate"

    def problems(self, clients: Sequence[Client]) -> Iterator[str]:
        yield from ()

    # -- server -------------------------------------------------------------------------------

    def init(self, start: Start) -> Factors:
        return start.factors

    def download(self, state: Factors, client: Client, round: Round) -> Download:
        scale, A, B = {}, {}, {}
        for m in client.layers:
            I = sketch(state, client, round, m)
            scale[m] = state.scale[m] * state.A[m].shape[0] / len(I)
            A[m], B[m] = state.A[m][I], state.B[m][:, I]
        return Download(Factors(scale, A, B, other=state.other), frozenset({"A", "B", "other"}))

    def aggregate(self, state: Factors, uploads: Iterable[Upload], round: Round) -> Factors:
        return mean_ranks(
            (self.unsketched(state, u) for u in uploads),
            state,
            absent="skipped" if self.normalize == "hits" else "unchanged",
            rows=lambda u, m: sketch(state, u.client, round, m),
        )

    def unsketched(self, state: Factors, upload: Upload) -> Upload:
        """r / k_i belongs to the sketch S_i, not to the factors: it is not folded into them."""
        layers, sent = upload.client.layers, upload.sent
        scale = {m: s * layers[m].rank / state.A[m].shape[0] for m, s in sent.scale.items()}
        return replace(upload, sent=replace(sent, scale=scale))

    def trained(self, state: Factors, upload: Upload, round: Round) -> Adapter:
        return upload.sent.adapter()

    def effective(self, state: Factors, client: Client | None = None) -> Effective:
        return Effective((), state)

    # -- client -------------------------------------------------------------------------------

    def start(self, download: Download, kept: Factors, client: Client, round: Round) -> Factors:
        return download.send

    def upload(self, trained: Factors, kept: Factors) -> tuple[Factors, Factors]:
        return trained, kept
