"""Fed-SB: freeze A and B, train the r x r core between them. Exact, at r^2 numbers a layer.

Singhal et al., "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in
(Private) Federated LoRA Fine-Tuning", 2025, https://arxiv.org/abs/2502.15436

    W = W0 + s B R A           A (r, k) and B (d, r) frozen and common, R (r, r) trained
    client i   trains R_i from Rbar; sends R_i
    server     Rbar = sum_i p_i (s_i / s) R_i

`init-from` chooses the frozen pair:

    "svd-w0"          B = U_r, A = V_r^T of W0, R = 0 (LoRA-XS, https://arxiv.org/abs/2405.17604)
    "orthogonal"      random orthonormal rows of A and columns of B, R = 0
    "update-approx"   U S V^T = svd(-eta M), M = sign(sum_i p_i G_i) of the clients' gradients G_i
                      at W0: B = U_r, A = V_r^T, R = S_r / s, so that the model starts one first
                      Adam step from W0 (LoRA-SB, https://arxiv.org/abs/2411.19557)

eta = 0 is the authors': the rate of a run's first step where it grows over .02 of its steps to
train.lr. `signs` = "clients" takes M = sum_i p_i sign(G_i), of which only thin sketches travel.

A client of r_i < r trains the leading block R[:r_i, :r_i]; what the others add is folded into
its base for the round, and counts as unchanged in the average.

Deviation from (E): none, since s B R A is linear in R.
Costs, a layer and client: up r_i^2, down r_i^2, and r_i (d + k) once; 2 (r - r_i)(d + k) for a
fold, which is far more than r^2: narrow clients cost Fed-SB its point.

Differs from the paper: the default start; ranks as low as LoRA's; the first gradient is from the
clients, not from pooled rows, and where the head begins at zero it is taken at one trained for a
pass; the mean of the clients' signs is offered; exact SVD; one share of the steps for eta on all
tasks; S over s; "svd-w0" leaves S out of B; p_i; mixed ranks; a start by gradient is refused
under privacy.
Reasons and costs: docs/strategies/fedsb.md.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedlora.lora.adapter import Adapter, Factors, Pair
from fedlora.lora.lowrank import complement, orthonormal, principal, svd, wide
from fedlora.lora.start_quality import NOISE
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
    remembered,
    scales,
    seeded,
    too_high,
)
from fedlora.strategies.defaults import Defaults


def core(state: Factors, upload: Upload, m: str) -> Tensor:
    """R (r, r) at the state's scale, with the leading block that the client trained."""
    R = upload.sent.R[m]
    whole = wide(state.R[m]).clone()
    whole[: R.shape[0], : R.shape[1]] = wide(R) * (upload.sent.scale[m] / state.scale[m])
    return whole


def frames(U: Tensor, S: Tensor, Vh: Tensor, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """B (d, r), A (r, k) and S (r) of a matrix's leading directions.

    Directions that the matrix does not have are those of the drawn B and A: an SVD's own for them
    are of its algorithm's making, coordinate axes where the matrix is zero.
    """
    r = len(A)
    there = int((S[:r] > NOISE * S[:1]).sum())
    left = complement(U[:, :there], wide(B), r)
    right = complement(Vh[:there].T, wide(A).T, r).T.contiguous()
    return left, right, torch.cat([S[:there], S.new_zeros(r - there)])


def outside(state: Factors, m: str, r: int) -> Pair:
    """s B R A less its leading block: [B1 R12  B2] [A2; R21 A1 + R22 A2]."""
    A, B, R = state.A[m], state.B[m], state.R[m]
    columns = torch.cat([B[:, :r] @ R[:r, r:], B[:, r:]], dim=1)
    return Pair(torch.cat([A[r:], R[r:] @ A]), columns, state.scale[m])


@dataclass(frozen=True, slots=True)
class FedSB:
    defaults: ClassVar[Defaults] = Defaults({"classification": 5e-2, "causal-lm": 0.1})
    init_from: Literal["update-approx", "svd-w0", "orthogonal"] = "svd-w0"
    eta: float = 0.0
    """Size of the first step that "update-approx" imitates; 0: the rate of the run's first step
    under the authors' warm-up."""
    signs: Literal["pooled", "clients"] = "pooled"
    """Of "update-approx": the sign of the clients' mean gradient, or the mean of their signs."""

    def needs(self) -> Needs:
        begins = self.init_from == "update-approx"
        return Needs(
            client_memory=True,
            beside_factors=True,
            first_gradient=self.signs if begins else "",
            first_rate=begins and self.eta == 0,
        )

    @property
    def promise(self) -> Promise:
        return "exact"

    def problems(self, clients: Sequence[Client]) -> Iterator[str]:
        if gap := too_high(clients):
            yield f"fedsb needs ranks of at most min(d, k), but {gap}; use a lower rank, or flora"

    # -- server -------------------------------------------------------------------------------

    def init(self, start: Start) -> Factors:
        A, B, R = {}, {}, {}
        for m, A0 in start.factors.A.items():
            (r, k), d = A0.shape, start.factors.B[m].shape[0]
            left = orthonormal(d, r, seeded(start.seed, 0, 0, f"fedsb/B/{m}"))
            right = orthonormal(k, r, seeded(start.seed, 0, 0, f"fedsb/A/{m}")).T
            if self.init_from == "svd-w0":
                found = principal(start.weights[m], r, seeded(start.seed, 0, 0, f"fedsb/{m}"))
                left, right, _ = frames(*found, left.to(found[0]), right.to(found[0]))
            A[m], B[m], R[m] = right.to(A0).contiguous(), left.to(A0), A0.new_zeros(r, r)
        return replace(start.factors, A=A, B=B, R=R)

    def from_gradient(self, state: Factors, mean: Adapter) -> Factors:
        """The state one step of this sign from W0."""
        A, B, R = dict(state.A), dict(state.B), dict(state.R)
        for m, mean_sign in mean.items():
            old = A[m]
            found = svd(replace(mean_sign, scale=-(self.eta or 1.0) * mean_sign.scale))
            left, right, S = frames(*found, B[m], A[m])
            A[m], B[m] = right.to(old), left.to(old)
            R[m] = (S / state.scale[m]).diag().to(old)
        return replace(state, A=A, B=B, R=R)

    def download(self, state: Factors, client: Client, round: Round) -> Download:
        A, B, R, fold = {}, {}, {}, {}
        for m, x in client.layers.items():
            if x.rank < state.R[m].shape[0]:
                fold[m] = outside(state, m, x.rank)
            R[m] = state.R[m][: x.rank, : x.rank] * (state.scale[m] / x.scale)
            if not client.has_memory:
                A[m], B[m] = state.A[m][: x.rank], state.B[m][:, : x.rank]
        send = Factors(scales(client), A, B, R, state.other)
        return Download(send, frozenset({"R", "other"}), fold=fold)

    def aggregate(self, state: Factors, uploads: Iterable[Upload], round: Round) -> Factors:
        def completed(u: Upload) -> Upload:
            if all(x.shape == state.R[m].shape for m, x in u.sent.R.items()):
                return u  # `mean` folds the scales
            R = {m: core(state, u, m) for m in u.sent.R}
            return replace(u, sent=replace(u.sent, R=R, scale=state.scale))

        return mean((completed(u) for u in uploads), state)

    def trained(self, state: Factors, upload: Upload, round: Round) -> Adapter:
        return {
            m: Pair(state.A[m], wide(state.B[m]) @ core(state, upload, m), state.scale[m])
            for m in upload.sent.R
        }

    def effective(self, state: Factors, client: Client | None = None) -> Effective:
        return Effective((), state)

    # -- client -------------------------------------------------------------------------------

    def start(self, download: Download, kept: Factors, client: Client, round: Round) -> Factors:
        send = download.send
        A = remembered(send.A, kept.A, client, "the frozen A")
        B = remembered(send.B, kept.B, client, "the frozen B")
        return replace(send, A=A, B=B)

    def upload(self, trained: Factors, kept: Factors) -> tuple[Factors, Factors]:
        sent = Factors(trained.scale, R=trained.R, other=trained.other)
        return sent, Factors(A=trained.A, B=trained.B)
