"""LoRA-A2: train B and A in turn, and of the global ranks those that move each client most. Exact.

Koo, Jang and Ok, "Towards Robust and Efficient Federated Low-Rank Adaptation with Heterogeneous
Clients", ACL 2025, https://arxiv.org/abs/2410.22815

    score      S_ij = ||dB_ij A_j||_F in a round that trains B, ||B_j dA_ij||_F in one that trains A
    select     I_i: the k_i N ranks of highest S_ij, of the r N of all N modules together
    client i   odd rounds train B, even rounds A; sends the columns or rows of I_i
    server     B[:, j] += p_i s_i / s dB_ij,  or  A[j] += p_i dA_ij,  for j in I_i

`choice` = "client", as in the paper: a client trains all r ranks, scores them by what it trained,
and of its update only the chosen ranks count. "server": it trains k_i ranks of each module alone,
chosen by the server by what it last sent; ranks that it has not yet trained come first, in a round
that trains A those with B = 0 last, since they cannot move. The others are folded into its base.

Either way a rank that was not chosen counts as unchanged in the average.

Deviation from (E): none: what is not trained is common, and s B A is linear in the other.
Costs, a layer and client: up k_i d or k_i k in turn, on average over layers; down r (d + k).

Source: the paper's section on the method, not the authors' code.
Differs from the paper: B in odd rounds, where it freezes A in even ones; one pass of training,
which is scored and masked; one rate for A and B; of equal scores the first; folded scales; p_i; the
server's choice; no error feedback of a narrow wire where clients choose.
Reasons and costs: docs/strategies/lora-a2.md.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

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
from fedlora.strategies.chosen import Chosen
from fedlora.strategies.defaults import Defaults
from fedlora.strategies.mixed import mean_ranks, others


@dataclass(frozen=True, slots=True, eq=False)
class State:
    factors: Factors
    scores: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)
    """S_i (r,) by client and module; infinite for a rank it has not yet trained."""


def trains_b(round: Round) -> bool:
    return round.number % 2 == 1


def selection(state: State, client: Client, round: Round, m: str, *, mended: bool = True) -> Tensor:
    """I_i of the server's choice, in ascending order; equal scores are drawn.

    mended: in a round that trains A, ranks with B = 0 come last.
    """
    r = state.factors.A[m].shape[0]
    scores = state.scores.get(client.id, {}).get(m)
    scores = torch.full((r,), math.inf) if scores is None else scores
    if mended and not trains_b(round):
        scores = torch.where(state.factors.B[m].any(dim=0), scores, -1)
    drawn = torch.randperm(r, generator=round.generator(client.id, f"lora-a2/{m}"))
    best = scores[drawn].argsort(descending=True, stable=True)
    return drawn[best[: client.layers[m].rank]].sort().values


@dataclass(frozen=True, slots=True)
class LoRAA2:
    defaults: ClassVar[Defaults] = Defaults(
        {"classification": 5e-3, "causal-lm": 1e-2}, few={"classification": 1e-2}
    )
    choice: Literal["client", "server", "server-0.1"] = "client"
    """Who chooses a client's ranks. server-0.1: with the fault that a rank first met in a round
    that trains A, while its B was 0, was never met again; for runs that began with it."""

    def needs(self) -> Needs:
        mine = self.choice == "client"
        return Needs(beside_factors=not mine, client_choice="trained" if mine else "")

    def _mine(self, state: State, client: Client, round: Round, m: str) -> Tensor:
        """The ranks of a module in a client's upload, as the server has it."""
        if self.choice == "client":  # completed
            return torch.arange(state.factors.A[m].shape[0])
        if self.choice == "server":
            return selection(state, client, round, m)
        return selection(state, client, round, m, mended=False)

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
        mine = {m: self._mine(state, client, round, m) for m in client.layers}
        left = {m: others(whole[m].rank, I) for m, I in mine.items()}
        return Download(
            as_factors({m: pick(whole[m], I) for m, I in mine.items()}, state.factors.other),
            frozenset({"B" if trains_b(round) else "A", "other"}),
            fold={m: pick(whole[m], J) for m, J in left.items() if len(J)},
        )

    def aggregate(self, state: State, uploads: Iterable[Upload], round: Round) -> State:
        scores = dict(state.scores)

        def rows(u: Upload, m: str) -> Tensor:
            return self._mine(state, u.client, round, m)

        def scored() -> Iterator[Upload]:
            for u in uploads:
                if self.choice == "client":
                    yield u
                    continue
                new = {m: self._scores(state, u, round, m) for m in {**u.sent.A, **u.sent.B}}
                scores[u.client.id] = {**scores.get(u.client.id, {}), **new}
                yield u

        factors = mean_ranks(scored(), state.factors, absent="unchanged", rows=rows)
        return State(factors, scores)

    def _scores(self, state: State, u: Upload, round: Round, m: str) -> Tensor:
        I, whole = self._mine(state, u.client, round, m), state.factors.adapter()[m]
        old = pick(whole, I)
        A, B = wide(old.A), wide(old.B)
        if m in u.sent.B:
            moved = (wide(u.sent.B[m]) - B).norm(dim=0) * A.norm(dim=1)
        else:
            moved = B.norm(dim=0) * (wide(u.sent.A[m]) - A).norm(dim=1)
        known = state.scores.get(u.client.id, {}).get(m)
        known = torch.full((whole.rank,), math.inf) if known is None else known
        moved = (whole.scale * moved).float()
        if self.choice == "server" and m in u.sent.A:  # what could not move says nothing
            moved = torch.where(B.any(dim=0), moved, known[I])
        return known.index_copy(0, I, moved)

    def _pair(self, state: State, u: Upload, round: Round, m: str) -> Pair:
        """The trained ranks, the frozen factor with them, at the scale they were sent down at."""
        frozen = pick(state.factors.adapter()[m], self._mine(state, u.client, round, m))
        return Pair(u.sent.A.get(m, frozen.A), u.sent.B.get(m, frozen.B), frozen.scale)

    def trained(self, state: State, upload: Upload, round: Round) -> Adapter:
        whole = state.factors.adapter()
        return {
            m: extend(
                self._pair(state, upload, round, m),
                whole[m],
                self._mine(state, upload.client, round, m),
            )
            for m in {**upload.sent.A, **upload.sent.B}
        }

    def effective(self, state: State, client: Client | None = None) -> Effective:
        return Effective((), state.factors)

    # -- client -------------------------------------------------------------------------------

    def start(self, download: Download, kept: Factors, client: Client, round: Round) -> Factors:
        return download.send

    def choose(self, begun: Factors, moved: Factors, client: Client, round: Round) -> Chosen:
        """I_i by module, the ranks that changed the model most; of equal ones the first."""
        scores = {}
        for m, A in begun.A.items():
            A0, B0 = wide(A), wide(begun.B[m])
            dA, dB = wide(moved.A[m]) - A0, wide(moved.B[m]) - B0
            change = dB.norm(dim=0) * A0.norm(dim=1) + B0.norm(dim=0) * dA.norm(dim=1)
            scores[m] = begun.scale[m] * change
        flat, budget = torch.cat([*scores.values()]), sum(x.rank for x in client.layers.values())
        best = flat.argsort(descending=True, stable=True)[:budget]
        of = torch.zeros(len(flat), dtype=torch.bool).index_fill(0, best, True)
        parts = of.split([len(x) for x in scores.values()])
        found = {m: part.nonzero().flatten() for m, part in zip(scores, parts, strict=True)}
        return {m: mine for m, mine in found.items() if len(mine)}

    def upload(self, trained: Factors, kept: Factors) -> tuple[Factors, Factors]:
        return trained, kept
