"""Ravan: several small cores between frozen bases. Exact, at a higher rank for Fed-SB's traffic.

Raje et al., "Ravan: Multi-Head Low-Rank Adaptation for Federated Fine-Tuning", NeurIPS 2025,
https://arxiv.org/abs/2506.05568

    W = W0 + s sum_j B_j H_j A_j      h heads: A_j (b, k) and B_j (d, b) frozen, H_j (b, b) trained
    client i   trains H_1 .. H_h; sends them
    server     H_j = sum_i p_i (s_i / s) H_ij

In the terms of `Factors`: B = [B_1 .. B_h], A = [A_1; ..; A_h], and R = diag(H_1, .., H_h), of
which only the blocks train and travel, as (h, b, b). The rank is r = h b, for the traffic of a
Fed-SB of rank r / sqrt(h). All bases are random and orthonormal, across heads too; H = 0 at first.

A client of r_i < r trains h_i = r_i / b of the heads; the others are folded into its base for the
round. Which, in each module and round (`choice`):

    "random"    h_i of them, drawn
    "weight"    those of the largest ||H_j||_F, equal ones drawn
    "gradient"  those of the largest ||dL / dH_j||_F on 256 of the client's rows, equal ones drawn.
                The client itself finds them: it is sent all heads, and folds none into its base
    "leading"   the first

`average` = "all" counts a head as unchanged on the clients that did not train it; "trained" is the
paper's mean, over those that did: W_j = sum of n_i over the clients that trained head j,

    H_j = sum_i n_i (s_i / s) H_ij / W_j

`head_scales` = "trained" is the paper's too: client i trains t_j H_j in the place of H_j, the
numbers t_j from 1 on, and sends the products t_j H_j, so nothing else changes.

Deviation from (E): none with "all", since the model is linear in H; with "trained" (W / W_j - 1) of
what head j changed by, none where all train all heads.
Costs, a layer and client: up r_i b, down r_i b, and r_i (d + k) once; where r_i < r, for the fold
(r - r_i)(d + k), and unless `choice` is "leading" r_i (d + k) again each round. With "gradient"
down r b, and r (d + k) once.

Source: abstract and notes, not the authors' code.
Differs from the paper: the scalar of a head is in H, unless chosen; many small heads; the mean over
all; a choice by gradient is of one pass over 256 of the client's rows; the leading heads, as a
choice; frames orthonormal across heads too; p_i.
Reasons and costs: docs/strategies/ravan.md.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

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
from fedlora.strategies.chosen import Chosen
from fedlora.strategies.defaults import Defaults
from fedlora.strategies.mixed import others


def spread(H: Tensor) -> Tensor:
    """Heads (h, b, b) as the core R (h b, h b)."""
    h, b, _ = H.shape
    R = H.new_zeros(h, b, h, b)
    R[range(h), :, range(h), :] = H
    return R.view(h * b, h * b)


def heads(R: Tensor, b: int) -> Tensor:
    """The blocks (h, b, b) on the diagonal of a core."""
    return torch.stack([R[j : j + b, j : j + b] for j in range(0, len(R), b)])


def rows(heads: Tensor, b: int) -> Tensor:
    """The ranks of these heads: rows of A, columns of B."""
    ranks: Tensor = (heads[:, None] * b + torch.arange(b)).flatten()
    return ranks


@dataclass(frozen=True, slots=True)
class Ravan:
    defaults: ClassVar[Defaults] = Defaults({"classification": 2e-2, "causal-lm": 0.5})
    head_rank: int = 4
    """Rank b of one head; the number of heads follows from a client's rank."""
    choice: Literal["random", "weight", "gradient", "leading"] = "random"
    """Which heads a client trains that has not the rank for all."""
    average: Literal["all", "trained"] = "all"
    """A head's mean: over all clients, or as in the paper over those that trained it."""
    head_scales: Literal["none", "trained"] = "none"
    """Whether a number of each head trains beside its core, as in the paper."""

    def needs(self) -> Needs:
        return Needs(
            client_memory=True,
            beside_factors=True,
            scaled_blocks=self.head_scales == "trained",
            client_choice="gradient" if self.choice == "gradient" else "",
        )

    @property
    def promise(self) -> Promise:
        return "exact" if self.average == "all" else "approximate"

    def chosen(self, state: Factors, client: Client, round: Round, m: str) -> Tensor:
        """The heads that the client is sent, in ascending order: those that it trains, or all."""
        H, h = state.R[m], client.layers[m].rank // self.head_rank
        if self.choice == "gradient":
            return torch.arange(len(H))
        if self.choice == "leading" or h == len(H):
            return torch.arange(h)
        drawn = torch.randperm(len(H), generator=round.generator(client.id, f"ravan/{m}"))
        if self.choice == "weight":
            sizes = wide(H).flatten(1).norm(dim=1)
            drawn = drawn[sizes[drawn].argsort(descending=True, stable=True)]
        return drawn[:h].sort().values

    def completed(self, state: Factors, upload: Upload, round: Round, m: str) -> Tensor:
        """H (h, b, b) at the state's scale, with the heads that the client trained."""
        H, mine = upload.sent.R[m], self.chosen(state, upload.client, round, m)
        trained = wide(H) * (upload.sent.scale[m] / state.scale[m])
        whole: Tensor = wide(state.R[m]).index_copy(0, mine, trained.to(wide(state.R[m])))
        return whole

    def counted(self, state: Factors, upload: Upload, round: Round, m: str) -> Tensor:
        """The heads that the client trained, in ascending order."""
        if upload.chosen is None:
            return self.chosen(state, upload.client, round, m)
        ranks = upload.chosen.get(m, torch.arange(0))
        touched: Tensor = (ranks // self.head_rank).unique()
        return touched

    def problems(self, clients: Sequence[Client]) -> Iterator[str]:
        if gap := too_high(clients):
            yield f"ravan needs ranks of at most min(d, k), but {gap}; use a lower rank, or flora"
        ranks = sorted({x.rank for c in clients for x in c.layers.values()})
        if self.head_rank < 1 or any(r % self.head_rank for r in ranks):
            yield (
                f"strategy.ravan.head-rank = {self.head_rank}: must divide every client's rank, "
                f"and they have {ranks}; use one that does, or fedsb"
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
            whole, mine = state.R[m], self.chosen(state, client, round, m)
            ranks, rest = rows(mine, self.head_rank), others(len(whole), mine)
            R[m] = whole[mine] * (state.scale[m] / x.scale)
            if len(rest):
                left = rows(rest, self.head_rank)
                B_left = state.B[m][:, left] @ spread(whole[rest])
                fold[m] = Pair(state.A[m][left], B_left, state.scale[m])
            if not client.has_memory or (len(rest) and self.choice != "leading"):
                A[m], B[m] = state.A[m][ranks], state.B[m][:, ranks]
        send = Factors(scales(client), A, B, R, state.other)
        return Download(send, frozenset({"R", "other"}), fold=fold, block=self.head_rank)

    def aggregate(self, state: Factors, uploads: Iterable[Upload], round: Round) -> Factors:
        held: dict[str, Tensor] = {}  # by module: n_i of all, then of those that trained head j

        def whole(u: Upload) -> Upload:
            for m in u.sent.R:
                mine = self.counted(state, u, round, m)
                n = held.setdefault(m, torch.zeros(1 + len(state.R[m]), dtype=torch.float64))
                n[0] += u.num_examples
                n[1 + mine] += u.num_examples
            R = {m: self.completed(state, u, round, m) for m in u.sent.R}
            return replace(u, sent=replace(u.sent, R=R, scale=state.scale))

        after = mean((whole(u) for u in uploads), state)
        if self.average == "all":
            return after
        R = dict(after.R)
        for m, n in held.items():
            old, new = wide(state.R[m]), wide(R[m])
            ratio = torch.where(n[1:] > 0, n[0] / n[1:].clamp(min=1), 1).to(new)[:, None, None]
            R[m] = (old + ratio * (new - old)).to(R[m])
        return replace(after, R=R)

    def trained(self, state: Factors, upload: Upload, round: Round) -> Adapter:
        R = {m: spread(self.completed(state, upload, round, m)) for m in upload.sent.R}
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

    def choose(self, begun: Factors, moved: Factors, client: Client, round: Round) -> Chosen:
        """The ranks of the heads of the largest gradient, as many as a module has rank for."""
        found = {}
        for m, R in begun.R.items():
            G = heads(wide(R) - wide(moved.R[m]), self.head_rank)
            drawn = torch.randperm(len(G), generator=round.generator(client.id, f"ravan/{m}"))
            sizes = G.flatten(1).norm(dim=1)[drawn]
            best = drawn[sizes.argsort(descending=True, stable=True)]
            mine = best[: client.layers[m].rank // self.head_rank].sort().values
            found[m] = rows(mine, self.head_rank)
        return found
