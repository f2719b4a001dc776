"""FLoRA: stack the clients' adapters into the base, and start afresh. Exact at any ranks.

Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
Adaptations", NeurIPS 2024, https://arxiv.org/abs/2409.05976

    client i   W <- W + B A of each round it lacks;  draws A_i, B_i = 0;  trains and sends both
    server     B A = [B_1 ... B_m] [p_1 s_1 A_1; ...; p_m s_m A_m]

Deviation from (E): none. The model is the base alone: a fresh adapter has B = 0.
Costs, a layer and client: up r_i (d + k); down 0, and (sum_j r_j)(d + k) for each round it lacks.

`reinit`: "random" draws A anew each round, as the paper does; "keep-A" goes on with the A that
the client itself trained last, which warm-starts its row space.

Differs from the paper: weights and scales go into A, so any ranks and alphas add up; the cohort
may be part of the clients, and one that was away gets each stack it missed; a kept A is offered.
Reasons and costs: docs/strategies/flora.md.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch

from fedlora.lora.adapter import Adapter, Factors, Tensors, kaiming
from fedlora.lora.lowrank import weighted
from fedlora.strategies.base import (
    Client,
    Download,
    Effective,
    Needs,
    Promise,
    Round,
    Start,
    Upload,
    mean_other,
    remembered,
    scales,
)
from fedlora.strategies.base_log import BaseLog
from fedlora.strategies.defaults import Defaults
from fedlora.strategies.mixed import by_module


@dataclass(frozen=True, slots=True, eq=False)
class State:
    other: Tensors
    base: BaseLog = field(default_factory=BaseLog)


@dataclass(frozen=True, slots=True)
class FLoRA:
    defaults: ClassVar[Defaults] = Defaults(
        {"classification": 5e-3, "causal-lm": 2e-3}, few={"classification": 1e-2}
    )
    reinit: Literal["random", "keep-A"] = "random"

    def needs(self) -> Needs:
        return Needs(moving_base=True, client_memory=self.reinit == "keep-A")

    @property
    def promise(self) -> Promise:
        return "exact"

    def problems(self, clients: Sequence[Client]) -> Iterator[str]:
        yield from ()

    # -- server -------------------------------------------------------------------------------

    def init(self, start: Start) -> State:
        return State(start.factors.other)

    def download(self, state: State, client: Client, round: Round) -> Download:
        return Download(
            Factors(scales(client), other=state.other),
            frozenset({"A", "B", "other"}),
            base=state.base.since(client.base_version),
        )

    def aggregate(self, state: State, uploads: Iterable[Upload], round: Round) -> State:
        uploads = list(uploads)  # the stack is made of every one of them
        held = by_module(uploads, lambda u: u.sent.adapter())
        moved = {m: weighted(pairs, p) for m, (pairs, p) in held.items()}
        base = state.base.add(moved) if moved else state.base
        return State(mean_other(uploads, state.other), base)

    def trained(self, state: State, upload: Upload, round: Round) -> Adapter:
        return upload.sent.adapter()

    def effective(self, state: State, client: Client | None = None) -> Effective:
        return Effective(state.base.versions, Factors(other=state.other))

    # -- client -------------------------------------------------------------------------------

    def start(self, download: Download, kept: Factors, client: Client, round: Round) -> Factors:
        if self.reinit == "keep-A" and client.has_memory:
            A = remembered({}, kept.A, client, "the A that flora keeps")
        else:
            A = {
                m: kaiming(layer.rank, layer.k, round.generator(client.id, f"flora/{m}"))
                for m, layer in client.layers.items()
            }
        B = {m: torch.zeros(layer.d, layer.rank).to(A[m]) for m, layer in client.layers.items()}
        return replace(download.send, A=A, B=B)

    def upload(self, trained: Factors, kept: Factors) -> tuple[Factors, Factors]:
        return trained, Factors(A=trained.A) if self.reinit == "keep-A" else Factors()
