"""Fed-PLoRA: train a random subset of the global ranks, with all the others folded into the base.

Zhang, Hu and Xu, "Heterogeneous Federated Fine-Tuning with Parallel One-Rank Adaptation",
ICLR 2026, https://arxiv.org/abs/2602.16936

    select     I_i of k_i ranks, drawn by the server
    client i   W <- W + s B[:, not I_i] A[not I_i] for the round; trains A[I_i], B[:, I_i]
    server     A[j] = sum_i p_i A_i[j],  B[:, j] likewise,  p_i over the clients with j in I_i

So each client starts from the whole model, at one scale for all.

Deviation from (E): not zero: A and B of a rank are averaged apart, over those that trained it.
With k_i = r for all it is FedAvg.
Costs, a layer and client: up k_i (d + k); down r (d + k), selection and fold together.

Source: abstract and notes, not the authors' code.
Differs from the paper: p_i in place of uniform; ranks drawn anew each round from the seed.
Reasons and costs: docs/strategies/fed-plora.md.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedlora.lora.adapter import Adapter, Factors
from fedlora.lora.lowrank import extend, pick
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
from fedlora.strategies.defaults import Defaults
from fedlora.strategies.mixed import mean_ranks, others, subset


def selection(state: Factors, client: Client, round: Round, m: str) -> Tensor:
    """I_i: the ranks of a module that the client trains this round, in ascending order."""
    generator = round.generator(client.id, f"fed-plora/{m}")
    return subset(state.A[m].shape[0], client.layers[m].rank, generator)


@dataclass(frozen=True, slots=True)
class FedPLoRA:
    defaults: ClassVar[Defaults] = Defaults({"classification": 5e-3, "causal-lm": 5e-3})

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
        whole = state.adapter()
        mine = {m: selection(state, client, round, m) for m in client.layers}
        left = {m: others(whole[m].rank, I) for m, I in mine.items()}
        return Download(
            as_factors({m: pick(whole[m], I) for m, I in mine.items()}, state.other),
            frozenset({"A", "B", "other"}),
            fold={m: pick(whole[m], J) for m, J in left.items() if len(J)},
        )

    def aggregate(self, state: Factors, uploads: Iterable[Upload], round: Round) -> Factors:
        def rows(u: Upload, m: str) -> Tensor:
            return selection(state, u.client, round, m)

        return mean_ranks(uploads, state, absent="skipped", rows=rows)

    def trained(self, state: Factors, upload: Upload, round: Round) -> Adapter:
        whole = state.adapter()
        return {
            m: extend(pair, whole[m], selection(state, upload.client, round, m))
            for m, pair in upload.sent.adapter().items()
        }

    def effective(self, state: Factors, client: Client | None = None) -> Effective:
        return Effective((), state)

    # -- client -------------------------------------------------------------------------------

    def start(self, download: Download, kept: Factors, client: Client, round: Round) -> Factors:
        return download.send

    def upload(self, trained: Factors, kept: Factors) -> tuple[Factors, Factors]:
        return trained, kept
