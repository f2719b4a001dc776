"""Ravan: several small cores between frozen bases. Exact, at a higher rank for Fed-SB's traffic.

Raje et al., "Ravan: Multi-Head Low-Rank Adaptation for Federated Fine-Tuning", NeurIPS 2025,
https://arxiv.org/abs/2506.05568

    W = W0 + s sum_j B_j H_j A_j      h heads: A_j (b, k) and B_j (d, b) frozen, H_j (b, b) trained
    client i   trains H_1 .. H_h; sends them
    server     H_j = sum_i p_i (s_i / s) H_ij

In the terms of `Factors`: B = [B_1 .. B_h], A = [A_1; ..; A_h], and R = diag(H_1, .., H_h), of
which only the blocks train and travel, as (h, b, b). The rank is r = h b, for the traffic of a
Fed-SB of rank r / sqrt(h). All bases are random and orthonormal, across heads too; H = 0 at first.

A client of r_i < r trains the leading r_i / b heads; the others are folded into its base for the
round and count as unchanged in the average.

Deviation from (E): none, since the model is linear in H.
Costs, a layer and client: up r_i b, down r_i b, and r_i (d + k) once; (r - r_i)(d + k) for a fold.

Source: abstract and notes, not the authors' code.
Differs from the paper: its scalar a head is part of H (it sends s_j H_j, so the product is all
that is shared); p_i in place of uniform.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedlora.errors import StrategyError
from fedlora.lora.adapter import Adapter, Factors, Pair
from fedlora.lora.lowrank import orthonormal, wide
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


def spread(H: Tensor) -> Tensor:
    """Heads (h, b, b) as the core R (h b, h b)."""
    h, b, _ = H.shape
    R = H.new_zeros(h, b, h, b)
    R[range(h), :, range(h), :] = H
    return R.view(h * b, h * b)


def heads(R: Tensor, b: int) -> Tensor:
    """The blocks (h, b, b) on the diagonal of a core."""
    return torch.stack([R[j : j + b, j : j + b] for j in range(0, len(R), b)])


def completed(state: Factors, upload: Upload, m: str) -> Tensor:
    """H (h, b, b) at the state's scale, with the leading heads that the client trained."""
    H = upload.sent.R[m]
    whole = wide(state.R[m]).clone()
    whole[: len(H)] = wide(H) * (upload.sent.scale[m] / state.scale[m])
    return whole


@dataclass(frozen=True, slots=True)
class Ravan:
    head_rank: int = 4
    """Rank b of one head; the number of heads follows from a client's rank."""

    def needs(self) -> Needs:
        return Needs(client_memory=True, beside_factors=True)

    @property
    def promise(self) -> Promise:
        return "exact"

    def problems(self, clients: Sequence[Client]) -> Iterator[str]:
        if gap := too_high(clients):
            yield f"ravan needs ranks of at most min(d, k), but {gap}; use a lower rank, or flora"
        ranks = sorted({x.rank for c in clients for x in c.layers.values()})
        if self.head_rank < 1 or any(r % self.head_rank for r in ranks):
            yield (
                f"ravan.head_rank = {self.head_rank}: must divide every client's rank, and they "
                f"have {ranks}; use one that does, or fedsb"
            )

    # -- server -------------------------------------------------------------------------------

    def init(self, start: Start) -> Factors:
        A, B, R = {}, {}, {}
        for m, A0 in start.factors.A.items():
            (r, k), d = A0.shape, start.factors.B[m].shape[0]
            A[m] = orthonormal(k, r, seeded(start.seed, 0, 0, f"ravan/A/{m}")).T.to(A0).contiguous()
            B[m] = orthonormal(d, r, seeded(start.seed, 0, 0, f"ravan/B/{m}")).to(A0)
            R[m] = A0.new_zeros(r // self.head_rank, self.head_rank, self.head_rank)
        return replace(start.factors, A=A, B=B, R=R)

    def download(self, state: Factors, client: Client, round: Round) -> Download:
        A, B, R, fold = {}, {}, {}, {}
        for m, x in client.layers.items():
            h, r = x.rank // self.head_rank, state.A[m].shape[0]
            R[m] = state.R[m][:h] * (state.scale[m] / x.scale)
            if x.rank < r:
                B_left = state.B[m][:, x.rank :] @ spread(state.R[m][h:])
                fold[m] = Pair(state.A[m][x.rank :], B_left, state.scale[m])
            if not client.has_memory:
                A[m], B[m] = state.A[m][: x.rank], state.B[m][:, : x.rank]
        send = Factors(scales(client), A, B, R, state.other)
        return Download(send, frozenset({"R", "other"}), fold=fold, block=self.head_rank)

    def aggregate(self, state: Factors, uploads: Iterable[Upload], round: Round) -> Factors:
        def whole(u: Upload) -> Upload:
            R = {m: completed(state, u, m) for m in u.sent.R}
            return replace(u, sent=replace(u.sent, R=R, scale=state.scale))

        return mean((whole(u) for u in uploads), state)

    def trained(self, state: Factors, upload: Upload, round: Round) -> Adapter:
        R = {m: spread(completed(state, upload, m)) for m in upload.sent.R}
        return {m: Pair(state.A[m], wide(state.B[m]) @ R[m], state.scale[m]) for m in R}

    def effective(self, state: Factors, client: Client | None = None) -> Effective:
        return Effective((), replace(state, R={m: spread(H) for m, H in state.R.items()}))

    # -- client -------------------------------------------------------------------------------

    def start(self, download: Download, kept: Factors, client: Client, round: Round) -> Factors:
        send = download.send
        A = remembered(send.A, kept.A, client, "the frozen A")
        B = remembered(send.B, kept.B, client, "the frozen B")
        return replace(send, A=A, B=B, R={m: spread(H) for m, H in send.R.items()})

    def upload(self, trained: Factors, kept: Factors) -> tuple[Factors, Factors]:
        H = {m: heads(R, self.head_rank) for m, R in trained.R.items()}
        if astray := [m for m, R in trained.R.items() if not torch.equal(spread(H[m]), R)]:
            raise StrategyError(f"{astray[0]}: R was trained outside of its blocks")
        sent = Factors(trained.scale, R=H, other=trained.other)
        return sent, Factors(A=trained.A, B=trained.B)
