"""`fedlora compare synthetic`: every strategy on a teacher whose best model is known.

Client i draws X_i and answers with its own teacher, in two linear modules of different sizes:

    Y_i = (W0 + dW + h dW_i) X_i + noise        dW, dW_i of low rank; h is how much clients differ

Training is gradient descent on that squared loss, through the strategies' own two halves, their
downloads and uploads counted as they would travel. No transformer, no Flower: seconds for all.

    excess      (loss of the global model - floor) / (loss of W0 - floor), over all clients' rows
    own         the same of the model each client holds, on its own rows
    deviation   from (E), the largest of the rounds, as the server's proof computes it

The floor is the loss of the best single full-rank W, by least squares: 0 is optimal for one
model, 1 is no better than W0; `own` may fall below 0, where clients keep models of their own.
The learning rate of each strategy is the best of RATES on its final excess (own, where the
strategy has no global model); which one is in the table.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import RecordDict
from torch import Tensor, nn

from fedlora.errors import ConfigError
from fedlora.federation.server.proof import Target, probes, prove
from fedlora.federation.wire.messages import count_bytes, pack_download, pack_factors
from fedlora.launch.simulate.teacher import EXAMPLES, SIZES, Teacher, make_task
from fedlora.lora.adapter import Factors, Pair, dense, kaiming
from fedlora.lora.lowrank import accumulate
from fedlora.strategies import list_strategies
from fedlora.strategies.base import (
    Client,
    Layer,
    Round,
    Start,
    Upload,
    Version,
    begins,
    collects,
    seeded,
    top_ranks,
    travelling,
    whole_download,
)
from fedlora.strategies.chosen import Chosen, chooses, masked, picked
from fedlora.training.train import extra_loss, threads

RATES = (0.01, 0.03, 0.1)
ALPHA = 8.0


@dataclass
class Place:
    """One client's machine."""

    kept: Factors = field(default_factory=Factors)
    has_memory: bool = False
    base_version: int = 0
    base: dict[str, Tensor] = field(default_factory=dict)

    def take(self, versions: Sequence[Version]) -> None:
        for v in versions:
            for m, delta in v.delta.items():
                self.base[m] = accumulate(None if v.snapshot else self.base.get(m), delta)
            self.base_version = v.number


@dataclass
class Outcome:
    """One strategy's run."""

    strategy: str
    ranks: Sequence[int]
    rate: float = 0.0
    excess: float = float("nan")
    own: float = float("nan")
    deviation: float = 0.0
    down: int = 0
    up: int = 0
    once: int = 0
    """Of what came down, what only a newcomer's first download held."""
    curve: list[float] = field(default_factory=list)
    refused: str = ""


def clients_of(ranks: Sequence[int]) -> list[Client]:
    """One client for each of EXAMPLES, the ranks cycled over them."""
    return [
        Client(
            i,
            {m: Layer(d, k, r, ALPHA / r) for m, (d, k) in SIZES.items()},
        )
        for i in range(len(EXAMPLES))
        for r in [ranks[i % len(ranks)]]
    ]


def compare(
    names: Sequence[str],
    ranks: Sequence[int] = (4,),
    rounds: int = 15,
    steps: int = 5,
    h: float = 0.5,
    seed: int = 0,
    rates: Sequence[float] = RATES,
) -> Iterator[Outcome]:
    """Each strategy at its best rate; one that refuses these ranks with its reason."""
    task = make_task(seed, h)
    for name in names:
        strategy, clients = list_strategies()[name](), clients_of(ranks)
        if problems := list(strategy.problems(clients)):
            yield Outcome(name, ranks, refused=problems[0])
            continue
        runs = [play(name, strategy, task, clients, rounds, steps, rate, seed) for rate in rates]
        judged = "own" if strategy.promise == "shared" else "excess"
        yield replace(min(runs, key=lambda r: _finite(getattr(r, judged))), ranks=ranks)


def play(
    name: str,
    strategy: Any,
    task: Teacher,
    clients: Sequence[Client],
    rounds: int,
    steps: int,
    rate: float,
    seed: int,
) -> Outcome:
    """All the rounds of one strategy at one rate, every client in each."""
    state = begin(strategy, task, clients, seed)
    places = {c.id: Place() for c in clients}
    done = Outcome(name, (), rate)
    zero, floor = task.everywhere({}), task.floor()
    first: dict[int, int] = {}
    for number in range(1, rounds + 1):
        round, uploads = Round(number, seed), []
        version = _version(strategy, state)
        target = Target(probes(clients, 4, seed, number))
        for c in clients:
            sent, down, up = visit(strategy, state, task, c, places[c.id], round, steps, rate)
            uploads.append(sent)
            target.add(strategy.trained(state, sent, round), sent.num_examples)
            done.down, done.up = done.down + down, done.up + up
            if number == 1:
                first[c.id] = down
            elif number == 2:
                done.once += max(0, first[c.id] - down)
        if not all(torch.isfinite(x).all() for u in uploads for _, _, x in u.sent.items()):
            return done  # diverged at this rate: excess stays NaN
        state = strategy.aggregate(state, uploads, round)
        proof = prove(strategy, state, version, clients, target, round, "float32")
        done.deviation = max(done.deviation, proof.deviation)
        done.curve.append((task.everywhere(model_of(strategy, state)) - floor) / (zero - floor))
    after = Round(rounds + 1, seed)
    own = [float(task.loss(c.id, held(strategy, state, c, places[c.id], after))) for c in clients]
    mean = sum(n * x for n, x in zip(EXAMPLES, own, strict=True)) / sum(EXAMPLES)
    done.own = (mean - floor) / (zero - floor)
    if collector := collects(strategy):
        kept = [Upload(c, places[c.id].kept, EXAMPLES[c.id]) for c in clients]
        state = collector.finish(state, kept)
    done.excess = (task.everywhere(model_of(strategy, state)) - floor) / (zero - floor)
    return done


def begin(strategy: Any, task: Teacher, clients: Sequence[Client], seed: int) -> Any:
    """The strategy's first state, as the server makes it."""
    ranks = top_ranks(clients)
    A = {m: kaiming(ranks[m], k, seeded(seed, 0, 0, m)).double() for m, (_, k) in SIZES.items()}
    B = {m: torch.zeros(d, ranks[m], dtype=torch.float64) for m, (d, _) in SIZES.items()}
    scale = {m: ALPHA / r for m, r in ranks.items()}
    state = strategy.init(Start(Factors(scale, A, B), clients, task.W0, seed))
    if beginner := begins(strategy):
        mean = {}
        for m, (d, _) in SIZES.items():
            signs = [n * -x[m].sign() for n, x in zip(EXAMPLES, task.yx, strict=True)]
            mean[m] = Pair(sum(signs[1:], signs[0]) / sum(EXAMPLES), torch.eye(d).double())
        state = beginner.from_gradient(state, mean)
    return state


def visit(
    strategy: Any,
    state: Any,
    task: Teacher,
    client: Client,
    place: Place,
    round: Round,
    steps: int,
    rate: float,
) -> tuple[Upload, int, int]:
    """A client's round: download, train, upload. The upload, and the bytes each way."""
    me = replace(client, base_version=place.base_version, has_memory=place.has_memory)
    download = whole_download(strategy, state, me, round, True)
    place.take(download.base)
    loaded = _double(strategy.start(download, place.kept, me, round))
    base = _with(place.base, download.fold)
    trained = descend(loaded, download, task, client.id, base, steps, rate)
    chosen: Chosen | None = None
    if chooser := chooses(strategy):
        chosen = chooser.choose(loaded, trained, me, round)
        trained = masked(loaded, trained, chosen)
    sent, place.kept = strategy.upload(trained, place.kept)
    sent = travelling(sent, download.trainable)
    place.has_memory = True
    leaves = sent if chosen is None else picked(sent, chosen)
    down = count_bytes(pack_download(download, "float32"))
    up = count_bytes(RecordDict({"sent": pack_factors(leaves, "float32")}))
    return Upload(client, sent, EXAMPLES[client.id], chosen), down, up


def descend(
    loaded: Factors,
    download: Any,
    task: Teacher,
    client: int,
    base: Mapping[str, Tensor],
    steps: int,
    rate: float,
) -> Factors:
    """Plain gradient descent on what `trainable` names; a copy of all the factors after it."""
    live = {
        "A": {m: nn.Parameter(x.clone()) for m, x in loaded.A.items()},
        "B": {m: nn.Parameter(x.clone()) for m, x in loaded.B.items()},
        "R": {m: nn.Parameter(x.clone()) for m, x in loaded.R.items()},
    }
    params = [p for c, ps in live.items() if c in download.trainable for p in ps.values()]
    for _ in range(steps):
        gradients = _gradients(loaded.scale, live, task, client, base, download.block)
        for c, ps in live.items():
            for m, p in ps.items():
                p.grad = gradients[c][m]
        if download.penalty:
            sides = {m: (A, live["B"][m]) for m, A in live["A"].items()}
            extra = extra_loss(sides.__getitem__, {}, download.penalty, 0.0)
            if isinstance(extra, Tensor):
                extra.backward()
        with torch.no_grad():
            for p in params:
                assert p.grad is not None
                p.sub_(p.grad, alpha=rate)
    columns = {c: {m: p.detach().clone() for m, p in ps.items()} for c, ps in live.items()}
    return Factors(loaded.scale, **columns)


@torch.no_grad()
def _gradients(
    scale: Mapping[str, float],
    live: Mapping[str, Mapping[str, nn.Parameter]],
    task: Teacher,
    client: int,
    base: Mapping[str, Tensor],
    block: int,
) -> dict[str, dict[str, Tensor]]:
    """Of the loss in A, B and R: with G = 2 (D xx - yx), s R^T B^T G, s G A^T R^T, s B^T G A^T."""
    found: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}, "R": {}}
    for m, A in live["A"].items():
        B, R, s = live["B"][m], live["R"].get(m), scale[m]
        BR, RA = (B, A) if R is None else (B @ R, R @ A)
        D = s * (BR @ A) + base[m] if m in base else s * (BR @ A)
        G = 2 * (D @ task.xx[client][m] - task.yx[client][m])
        found["A"][m], found["B"][m] = s * (BR.T @ G), s * (G @ RA.T)
        if R is not None:
            found["R"][m] = s * (B.T @ G @ A.T)
            if block:
                cores = [torch.ones(block, block)] * (len(R) // block)
                found["R"][m] *= torch.block_diag(*cores)
    return found


def model_of(strategy: Any, state: Any) -> dict[str, Tensor]:
    """The global model less W0."""
    effective, place = strategy.effective(state), Place()
    place.take(effective.base)
    return _with(place.base, effective.factors.adapter())


def held(
    strategy: Any, state: Any, client: Client, place: Place, round: Round
) -> dict[str, Tensor]:
    """The model less W0 that a client begins its next round with."""
    me = replace(client, base_version=place.base_version, has_memory=place.has_memory)
    download = whole_download(strategy, state, me, round, True)
    place.take(download.base)
    loaded = _double(strategy.start(download, place.kept, me, round))
    return _with(_with(place.base, download.fold), loaded.adapter())


def _with(base: Mapping[str, Tensor], pairs: Mapping[str, Pair]) -> dict[str, Tensor]:
    total = {m: x.double() for m, x in base.items()}
    for m, pair in pairs.items():
        total[m] = (total[m] + dense(pair) if m in total else dense(pair)).double()
    return total


def _double(x: Factors) -> Factors:
    columns = {c: {m: t.double() for m, t in getattr(x, c).items()} for c in ("A", "B", "R")}
    return Factors(x.scale, **columns)


def _version(strategy: Any, state: Any) -> int:
    base = strategy.effective(state).base
    return base[-1].number if base else 0


def _finite(x: float) -> float:
    return x if x == x else float("inf")


def markdown(outcomes: Sequence[Outcome]) -> str:
    """One table: results above, refusals with their reasons below."""
    head = ["strategy", "promise", "rate", "excess", "own", "deviation", "down", "up", "once"]
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for o in outcomes:
        if o.refused:
            continue
        cells = [
            o.strategy, list_strategies()[o.strategy]().promise, f"{o.rate:g}", f"{o.excess:.3f}",
            f"{o.own:.3f}", f"{o.deviation:.1e}", f"{o.down / 1e3:.0f} kB", f"{o.up / 1e3:.0f} kB",
            f"{o.once / 1e3:.0f} kB",
        ]  # fmt: skip
        rows.append("| " + " | ".join(cells) + " |")
    refused = [f"- {o.strategy}: {o.refused}" for o in outcomes if o.refused]
    return "\n".join([*rows, *(["", "Refused:", "", *refused] if refused else [])]) + "\n"


RANKS = {"equal ranks": (4,), "mixed ranks": (4, 8, 12)}


def main(strategies: str | None, seeds: Sequence[int] | None, out: Path | None) -> None:
    """`fedlora compare synthetic`: a table for equal ranks and one for mixed, printed and kept."""
    names = list(list_strategies()) if strategies in (None, "all") else strategies.split(",")
    if wrong := [n for n in names if n not in list_strategies()]:
        raise ConfigError([f"--strategies: {wrong[0]} is none of {', '.join(list_strategies())}"])
    text = ""
    with threads(1):
        for seed in seeds or (0,):
            for title, ranks in RANKS.items():
                table = markdown(list(compare(names, ranks, seed=seed)))
                text += f"## {title} ({', '.join(map(str, ranks))}), seed {seed}\n\n{table}\n"
                print(f"## {title}, seed {seed}\n\n{table}", flush=True)
    directory = out or Path("runs", "compare", "synthetic")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "table.md").write_text(text)
    print(f"{directory / 'table.md'}")
