"""FedSVD: FFA-LoRA whose A is made orthonormal anew each round, without moving the model. Exact.

Lee et al., "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA",
NeurIPS 2025, https://arxiv.org/abs/2505.12805

    client i   trains B_i from Bbar, A frozen for the round; sends B_i
    server     Bbar = sum_i p_i (s_i / s) B_i
               U S V^T = svd(Bbar A);   A <- V^T,   Bbar <- U S        the product is the same

A client of r_i < r trains the leading, that is the strongest, ranks; the others are folded into
its base for the round. Under DP the factorisation costs nothing: it is post-processing.

Deviation from (E): none. V^T spans the rows of the old A where Bbar has full rank: what changes
is the gauge that B is trained in, not the space.
Costs, a layer and client: up r_i d; down r_i (d + k), and (r - r_i)(d + k) for a fold.

Differs from the paper: the head trains by default; p_i; mixed ranks; SVD of the core; a new A in
every round, which is a period of 1 only.
Reasons and costs: docs/strategies/fedsvd.md.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from fedlora.lora.adapter import Adapter, Factors, Pair
from fedlora.lora.lowrank import compress, extend, rescale
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
    too_high,
)
from fedlora.strategies.defaults import Defaults
from fedlora.strategies.mixed import mean_ranks


@dataclass(frozen=True, slots=True)
class FedSVD:
    defaults: ClassVar[Defaults] = Defaults({"classification": 2e-2, "causal-lm": 5e-3})
    head: Literal["trained", "frozen"] = "trained"
    """frozen: as in the authors' code, where the classifier stays as it was drawn."""

    def needs(self) -> Needs:
        return Needs(own_gauge=True)

    @property
    def promise(self) -> Promise:
        return "exact"

    def problems(self, clients: Sequence[Client]) -> Iterator[str]:
        if gap := too_high(clients):
            yield f"fedsvd needs ranks of at most min(d, k), but {gap}; use a lower rank, or ffa"

    # -- server -------------------------------------------------------------------------------

    def init(self, start: Start) -> Factors:
        return start.factors

    def download(self, state: Factors, client: Client, round: Round) -> Download:
        whole = state.adapter()
        pairs = {m: narrow(whole[m], layer) for m, layer in client.layers.items()}
        columns = {"B"} if self.head == "frozen" else {"B", "other"}
        return Download(
            as_factors(pairs, state.other), frozenset(columns), fold=rest(whole, client)
        )

    def aggregate(self, state: Factors, uploads: Iterable[Upload], round: Round) -> Factors:
        after = mean_ranks(uploads, state, absent="unchanged")
        A, B = dict(after.A), dict(after.B)
        for m, pair in after.adapter().items():
            turned = rescale(compress(pair, pair.rank), pair.scale)
            A[m], B[m] = turned.A.to(A[m]), turned.B.to(B[m])
        return replace(after, A=A, B=B)

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
        return download.send

    def upload(self, trained: Factors, kept: Factors) -> tuple[Factors, Factors]:
        return replace(trained, A={}), kept
