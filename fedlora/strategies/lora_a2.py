"""LoRA-A2: train B and A in turn, and of the global ranks those that move each client most. Exact.

Koo, Jang and Ok, "Towards Robust and Efficient Federated Low-Rank Adaptation with Heterogeneous
Clients", ACL 2025, https://arxiv.org/abs/2410.22815

    score      S_ij = ||dB_ij A_j||_F in a round that trains B, ||B_j dA_ij||_F in one that trains A
    select     I_i: the k_i ranks of highest S_ij
    client i   odd rounds train B[:, I_i], even rounds A[I_i]; sends those
    server     B[:, j] += p_i s_i / s dB_ij,  or  A[j] += p_i dA_ij,  for j in I_i

The ranks not selected are folded into the client's base for the round, so it starts from the
whole model; they count as unchanged in the average.

Deviation from (E): none: what is not trained is common, and s B A is linear in the other.
Costs, a layer and client: up k_i d or k_i k in turn; down r (d + k), selection and fold together.

Source: reconstructed from the abstract and part of the text. In the paper a client scores all r
ranks by training them, masks its own update, and spends its ranks across modules.
Differs from the paper: the server scores, by what the client last sent, with ranks it has not
yet trained first; a client has k_i ranks in each module.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedlora.lora.adapter import Adapter, Factors, Pair
from fedlora.lora.lowrank import extend, pick, wide
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
)
from fedlora.strategies.mixed import mean_ranks, others


@dataclass(frozen=True, slots=True, eq=False)
class State:
    factors: Factors
    scores: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)
    """S_i (r,) by client and module; infinite for a rank it has not yet trained."""


def selection(state: State, client: Client, round: Round, m: str) -> Tensor:
    """I_i, in ascending order; equal scores are drawn."""
    r = state.factors.A[m].shape[0]
    scores = state.scores.get(client.id, {}).get(m)
    scores = torch.full((r,), math.inf) if scores is None else scores
    drawn = torch.randperm(r, generator=round.generator(client.id, f"lora-a2/{m}"))
    best = scores[drawn].argsort(descending=True, stable=True)
    return drawn[best[: client.layers[m].rank]].sort().values


@dataclass(frozen=True, slots=True)
class LoRAA2:
    def needs(self) -> Needs:
        return Needs(beside_factors=True)

    @property
    def promise(self) -> Promise:
        return "exact"

    def problems(self, clients: Sequence[Client]) -> Iterator[str]:
        yield from ()

    # -- server -------------------------------------------------------------------------------

    def init(self, start: Start) -> State:
        return State(start.factors)

    def download(self, state: State, client: Client, round: Round) -> Download:
        whole = state.factors.adapter()
        mine = {m: selection(state, client, round, m) for m in client.layers}
        left = {m: others(whole[m].rank, I) for m, I in mine.items()}
        return Download(
            as_factors({m: pick(whole[m], I) for m, I in mine.items()}, state.factors.other),
            frozenset({"B" if round.number % 2 else "A", "other"}),
            fold={m: pick(whole[m], J) for m, J in left.items() if len(J)},
        )

    def aggregate(self, state: State, uploads: Iterable[Upload], round: Round) -> State:
        scores = dict(state.scores)

        def rows(u: Upload, m: str) -> Tensor:
            return selection(state, u.client, round, m)

        def scored() -> Iterator[Upload]:
            for u in uploads:
                new = {m: self._scores(state, u, round, m) for m in {**u.sent.A, **u.sent.B}}
                scores[u.client.id] = {**scores.get(u.client.id, {}), **new}
                yield u

        factors = mean_ranks(scored(), state.factors, absent="unchanged", rows=rows)
        return State(factors, scores)

    def _scores(self, state: State, u: Upload, round: Round, m: str) -> Tensor:
        I, whole = selection(state, u.client, round, m), state.factors.adapter()[m]
        old = pick(whole, I)
        A, B = wide(old.A), wide(old.B)
        if m in u.sent.B:
            moved = (wide(u.sent.B[m]) - B).norm(dim=0) * A.norm(dim=1)
        else:
            moved = B.norm(dim=0) * (wide(u.sent.A[m]) - A).norm(dim=1)
        known = state.scores.get(u.client.id, {}).get(m)
        known = torch.full((whole.rank,), math.inf) if known is None else known
        return known.index_copy(0, I, (whole.scale * moved).float())

    def _pair(self, state: State, u: Upload, round: Round, m: str) -> Pair:
        """The trained ranks, the frozen factor with them, at the scale they were sent down at."""
        frozen = pick(state.factors.adapter()[m], selection(state, u.client, round, m))
        return Pair(u.sent.A.get(m, frozen.A), u.sent.B.get(m, frozen.B), frozen.scale)

    def trained(self, state: State, upload: Upload, round: Round) -> Adapter:
        whole = state.factors.adapter()
        return {
            m: extend(
                self._pair(state, upload, round, m),
                whole[m],
                selection(state, upload.client, round, m),
            )
            for m in {**upload.sent.A, **upload.sent.B}
        }

    def effective(self, state: State, client: Client | None = None) -> Effective:
        return Effective((), state.factors)

    # -- client -------------------------------------------------------------------------------

    def start(self, download: Download, kept: Factors, client: Client, round: Round) -> Factors:
        return download.send

    def upload(self, trained: Factors, kept: Factors) -> tuple[Factors, Factors]:
        return trained, kept
