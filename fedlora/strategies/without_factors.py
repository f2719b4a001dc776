"""A strategy on an adapter form that has no A and B, and is linear in all that trains.

Every strategy that averages what is no factor, as it averages a head, then gives

    theta = sum_i p_i theta_i      and the model's change  f(theta) = sum_i p_i f(theta_i)

which is (E). What else the strategy is for has nothing to do: a residual of factors, their ranks,
a base that takes them in. It sees clients that adapt no module, since no module has factors.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedlora.lora.adapter import Adapter, Factors
from fedlora.strategies.base import (
    Client,
    Download,
    Effective,
    Needs,
    Promise,
    Round,
    Start,
    Strategy,
    Upload,
)


def bare(client: Client) -> Client:
    """The same client, with no factors in any module and nothing kept of them."""
    return replace(client, layers={}, base_version=0, has_memory=False)


@dataclass(frozen=True, slots=True)
class WithoutFactors:
    """The strategy `inner`, for a form without A and B that is linear in what trains."""

    inner: Strategy[Any]

    def needs(self) -> Needs:
        return Needs(equal_ranks=True, algebra="tensors")

    @property
    def promise(self) -> Promise:
        return "exact"

    def problems(self, clients: Sequence[Client]) -> Iterator[str]:
        yield from self.inner.problems([bare(c) for c in clients])

    # -- server -------------------------------------------------------------------------------

    def init(self, start: Start) -> Any:
        return self.inner.init(replace(start, clients=[bare(c) for c in start.clients]))

    def download(self, state: Any, client: Client, round: Round) -> Download:
        return replace(self.inner.download(state, bare(client), round), base=(), fold={})

    def aggregate(self, state: Any, uploads: Iterable[Upload], round: Round) -> Any:
        return self.inner.aggregate(
            state, (replace(u, client=bare(u.client)) for u in uploads), round
        )

    def trained(self, state: Any, upload: Upload, round: Round) -> Adapter:
        return {}

    def effective(self, state: Any, client: Client | None = None) -> Effective:
        return Effective((), self.inner.effective(state, client and bare(client)).factors)

    # -- client -------------------------------------------------------------------------------

    def start(self, download: Download, kept: Factors, client: Client, round: Round) -> Factors:
        return self.inner.start(download, Factors(), bare(client), round)

    def upload(self, trained: Factors, kept: Factors) -> tuple[Factors, Factors]:
        return self.inner.upload(trained, Factors())[0], Factors()
