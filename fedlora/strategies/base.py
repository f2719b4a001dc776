"""What a strategy is: the server half and the client half of one federated LoRA algorithm.

    server                                         client
    ------                                         ------
    init(start) -> state
    download(state, client, round)  ------------>  start(download, kept) -> factors to load
                                                   ... trains what `trainable` names ...
    aggregate(state, uploads, round)  <----------  upload(trained, kept) -> (sent, kept)
       '-> state of the next round, and so on
    trained(state, upload)      what the client ended with, as the server can tell
    effective(state, client)    what the model is now, as low-rank changes of W0

Every method is a pure function of its arguments and of the strategy's own fields, which are the
algorithm's hyperparameters. Nothing here knows of Flower, of PEFT, of files or of DP.

Notation of every file: client i has A_i (r_i, k), B_i (d, r_i), scale s_i and n_i examples;
p_i = n_i / sum of n_j over the clients that replied. "Exact" means the model after the round is

    W_new = W + sum_i p_i s_i B_i A_i                                                     (E)
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from fedlora.errors import ClientMemoryError, StrategyError
from fedlora.lora.adapter import COLUMNS, Adapter, Delta, Factors, Pair, Tensors
from fedlora.lora.lowrank import pad, tail

State = TypeVar("State")

Promise = Literal["exact", "approximate", "shared"]
"""exact: (E) to rounding, else the run stops. approximate: the deviation from (E) is reported.
shared: what the clients share is averaged exactly; each keeps the rest, so no one model is (E)."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What a strategy with its options asks of the federation. Checked before round 1."""

    equal_ranks: bool = False
    client_memory: bool = False
    """Clients keep a part of what they trained, and their next round builds on it."""
    moving_base: bool = False
    first_gradient: Literal["", "pooled", "clients"] = ""
    """BeginsFromGradient, with the sign of the pooled gradient or the mean of clients' signs."""
    first_rate: bool = False  # which comes times the rate of a run's first step, under a warm-up
    collect_at_end: bool = False  # after the last round, once, what clients kept: CollectsAtEnd
    client_choice: Literal["", "trained", "gradient"] = ""  # by which clients choose: chosen.py
    beside_factors: bool = False  # even at equal ranks: a core, or ranks folded in a client's base
    scaled_blocks: bool = False  # a client trains R's blocks as s_j H_j, s_j = 1 at first
    own_gauge: bool = False  # it refactors the model, so factors of two rounds do not subtract
    algebra: Literal["products", "sides", "tensors"] = "products"
    """What it computes with. products: the products B A and their ranks. sides: A's and B's side
    each by itself, whatever is between them. tensors: a mean of anything (see forms.py)."""
    others: Literal["averaged", "kept"] = "averaged"  # every trained tensor that is no factor


@dataclass(frozen=True, slots=True)
class Layer:
    """One adapted module of one client: its sizes, the client's rank there and alpha's scale."""

    d: int
    k: int
    rank: int
    scale: float


@dataclass(frozen=True, slots=True)
class Client:
    """A client as a strategy sees it: what it trains, and what it already holds."""

    id: int
    layers: Mapping[str, Layer]
    base_version: int = 0
    has_memory: bool = False
    """It holds what an earlier `upload` of this run told it to keep."""


@dataclass(frozen=True, slots=True)
class Round:
    """A round's number and the experiment's seed: the only source of chance in a strategy."""

    number: int
    seed: int

    def generator(self, client: int, purpose: str) -> torch.Generator:
        """The same numbers for the same (seed, round, client, purpose), on server and client."""
        return seeded(self.seed, self.number, client, purpose)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Version:
    """One permanent change of the base: version `number` is version `number - 1` plus this.

    A dense snapshot stands for all the versions up to and including its number.
    """

    number: int
    delta: Mapping[str, Delta]
    snapshot: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Download:
    """What one client is sent for one round."""

    send: Factors
    trainable: frozenset[str]
    """Which columns of the factors the client trains: of "A", "B", "R", "other"."""

    base: tuple[Version, ...] = ()
    """The base changes this client lacks, in order."""

    fold: Adapter = field(default_factory=dict)
    """Merged into this client's base for this round only, and taken out after it."""

    penalty: "Penalty | None" = None  # a term the client adds to its loss

    block: int = 0
    """R is block diagonal in blocks of this size, and nothing else of it trains; 0: R is whole."""


@dataclass(frozen=True, slots=True)
class Penalty:
    """weight * sum over modules of the penalty `kind` of the factors being trained.

    "tail": ||B[:, keep:]|| * ||A[keep:]||, keep by module (HetLoRA's self-pruning).
    """

    kind: Literal["tail"]
    weight: float
    keep: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Upload:
    """What one client sent back, after every check."""

    client: Client
    sent: Factors
    num_examples: int
    chosen: Mapping[str, Tensor] | None = None  # the ranks that it sent, where it chose them


@dataclass(frozen=True, slots=True, eq=False)
class Effective:
    """What a model is: W0, plus the base changes in order, plus the adapter."""

    base: tuple[Version, ...]
    factors: Factors


class Strategy(Protocol[State]):
    """The contract, which `fedlora.testing` checks.

    >>> from fedlora import list_strategies
    >>> list_strategies()["fedex"]().promise
    'exact'
    """

    def needs(self) -> Needs:
        """What it asks of the federation with these options."""

    @property
    def promise(self) -> Promise: ...

    def problems(self, clients: Sequence[Client]) -> Iterator[str]:
        """Why it cannot run these clients, each with what to use instead. Nothing if it can."""

    def init(self, start: "Start") -> State: ...

    def download(self, state: State, client: Client, round: Round) -> Download: ...

    def start(self, download: Download, kept: Factors, client: Client, round: Round) -> Factors:
        """Client: the complete factors to load, from what came and what it had kept."""

    def upload(self, trained: Factors, kept: Factors) -> tuple[Factors, Factors]:
        """Client: what leaves, and what stays for the next round.

        Of what leaves, the columns that were not trained are dropped: see `travelling`.
        """

    def aggregate(self, state: State, uploads: Iterable[Upload], round: Round) -> State:
        """The state after the round. Takes each upload once, in order, and may let go of it."""

    def trained(self, state: State, upload: Upload, round: Round) -> Adapter:
        """The client's trained pairs, completed with what the server knows it held."""

    def effective(self, state: State, client: Client | None = None) -> Effective: ...


@runtime_checkable
class BeginsFromGradient(Protocol[State]):
    """Needed beside Strategy where `needs().first_gradient`."""

    def from_gradient(self, state: State, mean: Adapter) -> State:
        """The first state, of `init`'s and the clients' first gradients: see `Needs`."""


@runtime_checkable
class CollectsAtEnd(Protocol[State]):
    """Needed beside Strategy where `needs().collect_at_end`."""

    def finish(self, state: State, uploads: Iterable[Upload]) -> State:
        """The last state, of what the clients had kept: each upload's `sent` is a `kept`."""


@dataclass(frozen=True, slots=True, eq=False)
class Start:
    """What a strategy begins with."""

    factors: Factors
    """PEFT's own initialisation at the largest rank of each module: A drawn, B zero; the head."""

    clients: Sequence[Client]
    weights: Tensors
    """W0 by module path, (d, k); may load on access."""

    seed: int = 0


# -- shared by strategies: plain functions, no base class ------------------------------------


def begins(strategy: Strategy[State]) -> BeginsFromGradient[State] | None:
    """Itself, if it needs a first gradient; StrategyError, if it then has no `from_gradient`."""
    if not strategy.needs().first_gradient:
        return None
    if isinstance(strategy, BeginsFromGradient):
        return strategy
    raise StrategyError(_lacks(strategy, "first_gradient", "from_gradient(state, mean)"))


def collects(strategy: Strategy[State]) -> CollectsAtEnd[State] | None:
    """Itself, if it collects what clients kept; StrategyError, if it then has no `finish`."""
    if not strategy.needs().collect_at_end:
        return None
    if isinstance(strategy, CollectsAtEnd):
        return strategy
    raise StrategyError(_lacks(strategy, "collect_at_end", "finish(state, uploads)"))


def _lacks(strategy: Strategy[State], field: str, method: str) -> str:
    name = type(strategy).__name__
    return f"{name}.needs() says {field}, and {name} has no {method}: write it, or leave that out"


def seeded(seed: int, round: int, client: int, purpose: str) -> torch.Generator:
    """A generator of its own for each (seed, round, client, purpose)."""
    key = f"{seed}/{round}/{client}/{purpose}".encode()
    number = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(number)


def shares(uploads: Sequence[Upload]) -> list[float]:
    """p_i = n_i / sum of n_j over the uploads at hand."""
    total = sum(u.num_examples for u in uploads)
    return [u.num_examples / total for u in uploads]


def mean(uploads: Iterable[Upload], before: Factors) -> Factors:
    """Every column averaged, sum_i p_i X_i, in one pass that holds one upload at a time.

    The scale is folded first, so that the result is published at `before.scale`: into R where a
    core travels, else into B. What only some clients hold is averaged over those; what no one
    with examples sent is carried over from `before`. Summed in float32 at least, returned in
    `before`'s dtype.
    """
    totals: dict[tuple[str, str], Tensor] = {}
    weights: dict[tuple[str, str], int] = {}
    for u in uploads:
        for column, name, x in u.sent.items():
            folds = column == "R" or (column == "B" and name not in u.sent.R)
            ratio = u.sent.scale[name] / before.scale[name] if folds else 1.0
            key = (column, name)
            if key not in totals:
                totals[key] = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
            totals[key].add_(x, alpha=u.num_examples * ratio)
            weights[key] = weights.get(key, 0) + u.num_examples
        del u  # else it would stay in memory until the next one is there
    columns = {c: dict(getattr(before, c)) for c in COLUMNS}
    for (column, name), total in totals.items():
        if weights[column, name] == 0:
            continue
        dtype = columns[column][name].dtype if name in columns[column] else total.dtype
        columns[column][name] = total.div_(weights[column, name]).to(dtype)
    return Factors(before.scale, **columns)


def mean_other(uploads: Sequence[Upload], before: Tensors) -> Tensors:
    """The head and all else that is not a LoRA factor, averaged."""
    heads = (
        Upload(u.client, Factors(other=u.sent.other), u.num_examples)
        for u in uploads
        if u.sent.other
    )
    return mean(heads, Factors(other=before)).other


def part(factors: Factors, client: Client) -> Factors:
    """The factors of the modules this client adapts, and everything else whole."""

    def held(column: Tensors) -> Tensors:
        return {m: x for m, x in column.items() if m in client.layers}

    scale = {m: s for m, s in factors.scale.items() if m in client.layers}
    return Factors(scale, held(factors.A), held(factors.B), held(factors.R), factors.other)


def remembered(sent: Tensors, kept: Tensors, client: Client, what: str) -> dict[str, Tensor]:
    """By module of the client, what was sent now or else kept from an earlier round.

    Raises ClientMemoryError where it is neither: going on without it would train another model.
    """
    found = {m: sent.get(m, kept.get(m)) for m in client.layers}
    if lost := [m for m, x in found.items() if x is None]:
        raise ClientMemoryError(
            f"client {client.id} no longer has {what} of {lost[0]!r}"
            f"{f' and {len(lost) - 1} more modules' if len(lost) > 1 else ''}, which stays on the "
            "client between rounds: its memory of this run is gone or belongs to another run. "
            "Restore the client's memory directory, or remove it so that it joins as a newcomer"
        )
    return {m: x for m, x in found.items() if x is not None}


def top_ranks(clients: Iterable[Client]) -> dict[str, int]:
    """The largest rank any client has, by module."""
    ranks: dict[str, int] = {}
    for client in clients:
        for m, layer in client.layers.items():
            ranks[m] = max(layer.rank, ranks.get(m, 0))
    return ranks


def uneven(clients: Sequence[Client]) -> str | None:
    """The first module that clients hold at different ranks, described; None if there is none."""
    seen: dict[str, tuple[int, int]] = {}
    for client in clients:
        for m, layer in client.layers.items():
            rank, other = seen.setdefault(m, (layer.rank, client.id))
            if layer.rank != rank:
                return f"client {other} has rank {rank} and client {client.id} rank {layer.rank}"
    return None


def too_high(clients: Sequence[Client]) -> str | None:
    """The first rank above min(d, k) of its module, described; None if there is none."""
    for client in clients:
        for m, x in client.layers.items():
            if x.rank > min(x.d, x.k):
                return f"client {client.id} has rank {x.rank} on {m!r} of {x.d} x {x.k}"
    return None


def whole_download(
    strategy: "Strategy[State]", state: State, client: Client, round: Round, fold_absent: bool
) -> Download:
    """The strategy's download, with what the client does not adapt folded into its base.

    Else a client of fewer modules would train on a model that lacks others' changes.
    """
    came = strategy.download(state, client, round)
    if not fold_absent:
        return came
    pairs = strategy.effective(state).factors.adapter()
    absent = {m: p for m, p in pairs.items() if m not in client.layers and bool(p.B.any())}
    return replace(came, fold={**absent, **came.fold}) if absent else came


def scales(client: Client) -> dict[str, float]:
    return {m: layer.scale for m, layer in client.layers.items()}


def travelling(sent: Factors, trainable: frozenset[str]) -> Factors:
    """What leaves of what `upload` would send: a column that was frozen need not come back."""
    columns = {c: getattr(sent, c) if c in trainable else {} for c in COLUMNS}
    return Factors(sent.scale, **columns)


def narrow(pair: Pair, layer: Layer) -> Pair:
    """The leading ranks of a pair, padded with zeros, at a client's own rank and scale."""
    r = layer.rank
    wide = pair if pair.rank >= r else pad(pair, r)
    return Pair(wide.A[:r], wide.B[:, :r] * (pair.scale / layer.scale), layer.scale)


def rest(whole: Adapter, client: Client) -> dict[str, Pair]:
    """What `narrow` leaves out, by module: folded in, a narrow client starts from it all."""
    layers = client.layers.items()
    return {m: tail(whole[m], x.rank) for m, x in layers if x.rank < whole[m].rank}


def as_factors(adapter: Adapter, other: Tensors) -> Factors:
    A, B = {m: p.A for m, p in adapter.items()}, {m: p.B for m, p in adapter.items()}
    return Factors({m: p.scale for m, p in adapter.items()}, A, B, other=other)
