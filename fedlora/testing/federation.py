"""A federation of plain tensors in float64: every strategy's rounds, without a model.

No two sizes are equal (d, k, rank, alpha, number of examples), so that a transposed factor, a
dropped scale or an unweighted mean cannot pass by symmetry; one module is square, so that a
transposed factor cannot pass by raising either.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from fedlora.lora.adapter import COLUMNS, Factors, clone, dense, kaiming, together
from fedlora.lora.lowrank import accumulate
from fedlora.strategies.base import (
    Client,
    Download,
    Effective,
    Layer,
    Round,
    Start,
    Upload,
    Version,
    seeded,
    travelling,
)
from fedlora.strategies.chosen import Chosen, chooses, completed, masked, picked

MODULES = {"layers.0.q_proj": (41, 41), "layers.0.k_proj": (53, 31), "layers.1.down": (37, 67)}
SQUARE = "layers.0.q_proj"
EXAMPLES = {0: 10, 1: 31, 2: 7, 3: 22, 4: 15}
SEED = 7


def make_clients(
    ranks: Sequence[int],
    alphas: Sequence[float] | None = None,
    without: Mapping[int, str] = {},
    step: int = 1,
) -> list[Client]:
    """Client i of rank ranks[i] on the first module, `step` more on each next."""
    alphas = alphas or [6.0] * len(ranks)
    return [
        Client(
            i,
            {
                m: Layer(d, k, r + j * step, alpha / (r + j * step))
                for j, (m, (d, k)) in enumerate(MODULES.items())
                if without.get(i) != m
            },
        )
        for i, (r, alpha) in enumerate(zip(ranks, alphas, strict=True))
    ]


EQUAL = make_clients([3, 3, 3, 3])
RESCALED = make_clients([3, 3, 3, 3], [6.0, 4.0, 9.0, 2.5])
PARTIAL = make_clients([3, 3, 3, 3], without={1: "layers.0.k_proj", 2: SQUARE})
EVEN = make_clients([4, 4, 4, 4], [6.0, 4.0, 9.0, 2.5], step=4)
EVEN_MIXED = make_clients([4, 12, 8, 4], [6.0, 4.0, 9.0, 2.5], step=4)
MIXED = make_clients([2, 5, 3, 4], [6.0, 4.0, 9.0, 2.5], without={3: "layers.1.down"})


def fitting(strategy: Any) -> list[Client]:
    """Clients of one rank that the strategy can run."""
    return EVEN if list(strategy.problems(EQUAL)) else EQUAL


def make_start(clients: Sequence[Client], dtype: torch.dtype = torch.float64) -> Start:
    """What PEFT begins with: A drawn, B zero, at the top rank of each module."""
    scale, A, B = {}, {}, {}
    for m, (d, k) in MODULES.items():
        if not any(m in c.layers for c in clients):
            continue
        top = max((c.layers[m] for c in clients if m in c.layers), key=lambda x: x.rank)
        scale[m] = top.scale
        A[m] = kaiming(top.rank, k, seeded(SEED, 0, 0, m)).to(dtype)
        B[m] = torch.zeros(d, top.rank, dtype=dtype)
    other = {"head.weight": noise((3, 4), 0, 0, "head").to(dtype)}
    weights = {m: noise(size, 0, 0, f"W0/{m}").to(dtype) for m, size in MODULES.items()}
    return Start(Factors(scale, A, B, other=other), clients, weights, SEED)


def noise(size: Sequence[int], client: int, round: int, purpose: str) -> Tensor:
    g = seeded(SEED, round, client, purpose)
    return torch.randn(*size, generator=g, dtype=torch.float64)


def perturb(loaded: Factors, download: Download, client: Client, round: Round) -> Factors:
    """Stands in for training: every trainable tensor moves by noise of its own."""
    moved = clone(loaded)
    for column, name, x in moved.items():
        if column in download.trainable:
            step = 0.1 * noise(x.shape, client.id, round.number, f"{column}/{name}").to(x.dtype)
            if column == "R" and download.block:
                cores = [torch.ones(download.block, download.block)] * (len(x) // download.block)
                step *= torch.block_diag(*cores)
            x.add_(step)
    return moved


@dataclass
class Site:
    """One client's machine: what it keeps, and the changes its base has taken."""

    kept: Factors = field(default_factory=Factors)
    has_memory: bool = False
    base_version: int = 0
    base: dict[str, Tensor] = field(default_factory=dict)

    def take(self, versions: Iterable[Version]) -> None:
        for v in versions:
            for m, delta in v.delta.items():
                self.base[m] = accumulate(None if v.snapshot else self.base.get(m), delta)
            self.base_version = v.number


@dataclass
class Visit:
    """One client's part in one round."""

    upload: Upload
    start_model: dict[str, Tensor]
    """Base changes, fold and loaded adapter: where its training began, less W0."""

    sent_down: dict[str, int]
    """Numbers sent, by what they are: A, B, R, base, fold."""

    sent_up: dict[str, int]


@dataclass
class Played:
    """One round of one strategy."""

    round: Round
    before: Any
    visits: list[Visit]
    after: Any

    @property
    def uploads(self) -> list[Upload]:
        return [v.upload for v in self.visits]


def cast(factors: Factors, dtype: torch.dtype) -> Factors:
    """As loading into a model of this dtype does."""
    columns = {c: {n: t.to(dtype) for n, t in getattr(factors, c).items()} for c in COLUMNS}
    return Factors(factors.scale, **columns)


def visit(
    strategy: Any,
    state: Any,
    client: Client,
    site: Site,
    round: Round,
    dtype: torch.dtype = torch.float64,
) -> Visit:
    """One client's round: what it is sent, where it starts, what it sends."""
    client = replace(client, base_version=site.base_version, has_memory=site.has_memory)
    download = strategy.download(state, client, round)
    site.take(download.base)
    loaded = cast(strategy.start(download, site.kept, client, round), dtype)
    model = dict(site.base)
    for adapter in (download.fold, loaded.adapter()):
        for m, pair in adapter.items():
            model[m] = accumulate(model.get(m), pair)
    trained = perturb(loaded, download, client, round)
    chosen: Chosen = {}
    if chooser := chooses(strategy):
        chosen = chooser.choose(loaded, trained, client, round)
        trained = masked(loaded, trained, chosen)
    sent, site.kept = strategy.upload(trained, site.kept)
    sent = travelling(sent, download.trainable)
    site.has_memory = True
    down = dict.fromkeys((*COLUMNS, "base", "fold"), 0)
    for column, _, x in download.send.items():
        down[column] += x.numel()
    for v in download.base:
        down["base"] += sum(numel(delta) for delta in v.delta.values())
    down["fold"] = sum(numel(pair) for pair in download.fold.values())
    leaves = picked(sent, chosen) if chosen else sent
    up = {c: sum(x.numel() for col, _, x in leaves.items() if col == c) for c in COLUMNS}
    sent = completed(leaves, chosen, download.send) if chosen else sent
    upload = Upload(client, clone(sent), EXAMPLES[client.id], chosen or None)
    return Visit(upload, model, down, up)


def numel(delta: Any) -> int:
    delta = together(delta)
    return delta.numel() if isinstance(delta, Tensor) else delta.A.numel() + delta.B.numel()


def play(
    strategy: Any,
    clients: Sequence[Client],
    cohorts: Sequence[Sequence[int]] = ((0, 1, 2, 3),),
    sites: dict[int, Site] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Iterator[Played]:
    """The rounds, one for each cohort of client ids."""
    sites = {} if sites is None else sites
    state = strategy.init(make_start(clients, dtype))
    for number, cohort in enumerate(cohorts, start=1):
        round = Round(number, SEED)
        visits = [
            visit(strategy, state, clients[i], sites.setdefault(i, Site()), round, dtype)
            for i in cohort
        ]
        after = strategy.aggregate(state, [v.upload for v in visits], round)
        yield Played(round, state, visits, after)
        state = after


def base_change(versions: Iterable[Version]) -> dict[str, Tensor]:
    site = Site()
    site.take(versions)
    return site.base


def model_change(effective: Effective) -> dict[str, Tensor]:
    """The model less W0, dense."""
    change = base_change(effective.base)
    for m, pair in effective.factors.adapter().items():
        change[m] = accumulate(change.get(m), dense(pair))
    return change


def deviation(strategy: Any, played: Played) -> float:
    """How far the model after a round is from (E), relative; the definition, the slow way round.

    Under the promise "shared" it is the shared factor that is held against its mean, rank by
    rank over the clients that hold it.
    """
    holders: dict[str, list[tuple[int, Any]]] = {}
    for u in played.uploads:
        for m, pair in strategy.trained(played.before, u, played.round).items():
            holders.setdefault(m, []).append((u.num_examples, pair))
    after = strategy.effective(played.after)
    old = base_change(strategy.effective(played.before).base)
    new, unmoved = model_change(after), model_change(strategy.effective(played.before))
    worst = 0.0
    got: Any
    want: Any
    for m in MODULES:
        held = holders.get(m, [])
        total = sum(n for n, _ in held)
        if strategy.promise == "shared":
            got, want = after.factors.A[m], strategy.effective(played.before).factors.A[m].clone()
            for j in range(len(want)):
                rows = [(n, pair.delta()[j]) for n, pair in held if pair.rank > j]
                if rows:
                    want[j] = sum(n * row for n, row in rows) / sum(n for n, _ in rows)
        else:
            want = sum((n / total * p.delta() for n, p in held), 0.0) if held else unmoved.get(m)
            want = old[m] + want if held and m in old else want
            got = new.get(m)
        if want is None and got is None:
            continue
        got = torch.zeros_like(want) if got is None else got
        want = torch.zeros_like(got) if want is None else want
        worst = max(worst, float((got - want).norm() / want.norm().clamp(min=1e-9)))
    return worst


def variants(name: str, cls: type[Any]) -> dict[str, Any]:
    """The strategy with its defaults, and once for each other value of each choice it offers."""
    found: dict[str, Any] = {name: cls()}
    for option, hint in get_type_hints(cls).items():
        values = get_args(hint) if get_origin(hint) is Literal else ()
        values = (True, False) if hint is bool else values
        for value in values:
            if value != getattr(found[name], option):
                found[f"{name}[{option}={value}]"] = cls(**{option: value})
    return found


def assert_same(x: Factors, y: Factors, atol: float = 1e-12) -> None:
    """AssertionError where two sets of factors differ, with the column and module."""
    left = {(c, n): t for c, n, t in x.items()}
    right = {(c, n): t for c, n, t in y.items()}
    assert left.keys() == right.keys()
    for key, t in left.items():
        torch.testing.assert_close(t, right[key], rtol=0, atol=atol, msg=str(key))
