"""A user's own strategy, outside of fedlora: FedAvg at mixed ranks that goes part of the way."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

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
    as_factors,
    narrow,
)
from fedlora.strategies.mixed import mean_ranks
from tests.support import own_state


@dataclass(frozen=True)
class Mine:
    far: float = 1.0
    """How far towards the mean of B."""
    absent: Literal["zero", "skipped"] = "zero"

    def needs(self) -> Needs:
        return Needs()

    @property
    def promise(self) -> Promise:
        return "approximate"

    def problems(self, clients: Sequence[Client]) -> Iterator[str]:
        yield from ()

    def init(self, start: Start) -> "own_state.Padded":
        return own_state.Padded(start.factors)

    def download(self, state: "own_state.Padded", client: Client, round: Round) -> Download:
        whole = state.factors.adapter()
        pairs = {m: narrow(whole[m], layer) for m, layer in client.layers.items()}
        send = as_factors(pairs, state.factors.other)
        return Download(send, frozenset({"A", "B", "other"}))

    def aggregate(
        self, state: "own_state.Padded", uploads: Iterable[Upload], round: Round
    ) -> "own_state.Padded":
        mean, old = mean_ranks(uploads, state.factors, absent=self.absent), state.factors
        B = {m: old.B[m] + self.far * (x - old.B[m]) for m, x in mean.B.items()}
        return own_state.Padded(replace(mean, B=B) if self.far != 1 else mean, state.rounds + 1)

    def trained(self, state: "own_state.Padded", upload: Upload, round: Round) -> Adapter:
        return upload.sent.adapter()

    def effective(self, state: "own_state.Padded", client: Client | None = None) -> Effective:
        return Effective((), state.factors)

    def start(self, download: Download, kept: Factors, client: Client, round: Round) -> Factors:
        return download.send

    def upload(self, trained: Factors, kept: Factors) -> tuple[Factors, Factors]:
        return trained, Factors()
