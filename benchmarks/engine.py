"""What the federation's own machinery costs: rounds, workers, memory, ten thousand clients."""

import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord
from flwr.clientapp import ClientApp

from benchmarks.measure import Row, forked, peak, spent
from client_app.app import app as client_app
from fedlora.config.reader import Config
from fedlora.federation.client.handlers import query
from fedlora.federation.client.job import ClientJob
from fedlora.federation.server.loop import FederatedLora
from fedlora.federation.server.run import client
from fedlora.federation.wire.certificate import pack_numbers
from fedlora.federation.wire.messages import pack_factors
from fedlora.launch.simulate.grid import LocalGrid
from fedlora.strategies.base import seeded, travelling
from fedlora.training import cache
from fedlora.training.data.batches import batches
from fedlora.training.optimizers import build_optimizer
from fedlora.training.schedule import learning_rate
from fedlora.training.train import example_losses

QUICKSTART = Path(__file__).parent.parent / "simulations/experiments/quickstart.toml"
BARE = {
    "evaluate.every": 0,
    "evaluate.clients": False,
    "evaluate.baselines": False,
    "output.plots": False,
    "simulate.workers": 1,
    "run.rounds": 1000,  # rounds are asked for one by one
}


def quickstart(directory: str, **changes: Any) -> Config:
    """The quickstart's model, data and strategy, with nothing to evaluate."""
    keys = {key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()}
    return Config.load(QUICKSTART, {**BARE, "run.out": directory, **keys})


@contextmanager
def federation(
    config: Config, app: ClientApp = client_app, workers: int = 1
) -> Iterator[tuple[FederatedLora, LocalGrid]]:
    """A server that has met its clients and is about to begin round 1."""
    with LocalGrid(app, config.clients.count, config.flat(), workers) as grid:
        server = FederatedLora(config)
        server.begin(grid)
        yield server, grid


def memory(quick: bool) -> Iterator[Row]:
    """The peak of 64 clients in one process, over that of one.

    The one trains 32 steps: its peak grows with the batches it has seen, and a client of one step
    has not seen as many shapes of them as 64 clients have.
    """
    many, long = (8, 4) if quick else (64, 32)

    def train(clients: int, strategy: str, steps: int) -> None:
        with tempfile.TemporaryDirectory() as d:
            config = quickstart(
                d, clients__count=clients, train__steps=steps, strategy__name=strategy
            )
            with federation(config) as (server, grid):
                for number in (1, 2):
                    server.round(grid, number)

    for strategy in ("ffa", "fedex"):
        one = forked(train, 1, strategy, long)[1]
        all_ = forked(train, many, strategy, 1)[1]
        yield Row(
            f"memory of {many} clients / one, {strategy}", all_ / one, "<= 1.15",
            f"peak RSS of the process, {all_:.0f} and {one:.0f} MB: the quickstart, two rounds, "
            f"each client one step a round and the one {long}, one process each",
        )  # fmt: skip


def overhead(quick: bool) -> Iterator[Row]:
    """A round over its bare steps: the same batches through the same model, nothing else."""
    torch.set_num_threads(1)
    clients, rows, times = (2, 600, 1) if quick else (8, 1500, 3)  # 500 of them are the test set
    with tempfile.TemporaryDirectory() as d:
        config = quickstart(d, clients__count=clients, data__limit=rows)  # all rows, every round
        with federation(config) as (server, grid):
            server.round(grid, 1)  # whatever is made at first use
            _bare(server, 1)
            walls, cpus = [], []
            for number in range(2, 2 + times):
                clocks = (time.perf_counter, time.process_time)
                marks = [[c() for c in clocks]]
                server.round(grid, number)
                marks.append([c() for c in clocks])
                _bare(server, number)
                marks.append([c() for c in clocks])
                (w0, c0), (w1, c1), (w2, c2) = marks
                walls.append((w1 - w0) / (w2 - w1))
                cpus.append((c1 - c0) / (c2 - c1))
    how = (
        "round / the same batches and model in a plain loop; the quickstart on "
        f"{rows} rows, 500 of them its test set, {clients} clients, from the second round on"
    )
    yield Row("round overhead, wall time", statistics.median(walls), "<= 1.05", how)
    yield Row("round overhead, CPU time", statistics.median(cpus), "<= 1.05", how)


def _bare(server: FederatedLora, number: int) -> None:
    """Each client's steps of a round: forward, loss, backward, clip, step."""
    config, model = server.setting.config, server.setting.model
    for i in sorted(server.run.members):
        rows = cache.encoded("train", i, config, server.setting.labels)
        model.load(model.init_factors(client(server.setting, server.run, i), 0))
        live = model.trainable(frozenset({"A", "B", "other"}))
        params = [p for ps in live.values() for p in ps.values()]
        optimizer = build_optimizer(live, config.train, learning_rate(config, number))
        chance = seeded(config.run.seed, number, i, "batches")
        model.peft.train()
        for batch in batches(rows, config.train.batch_size, chance, config.train.steps):
            loss = example_losses(model, batch, config.train.precision).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(params, config.train.grad_clip)
            optimizer.step()


def workers(quick: bool) -> Iterator[Row]:
    """Two processes over one, on two cores, a thread a step."""
    torch.set_num_threads(1)
    clients, steps, times = (2, 2, 1) if quick else (8, 10, 2)
    changes = {"clients__count": clients, "train__steps": steps, "lora__layers": ""}  # long steps
    with tempfile.TemporaryDirectory() as d:
        alone = quickstart(d, **changes)
        both = quickstart(d, **changes, run__name="two")
        with federation(both, workers=2) as two, federation(alone) as one:  # forks come first
            found = []
            for number in range(1, 2 + times):
                clock = time.perf_counter
                seconds = [
                    spent(lambda s=s, g=g, n=number: s.round(g, n), clock) for s, g in (one, two)
                ]
                found.append(seconds[0] / seconds[1])
    yield Row(
        "two workers: speed over one", statistics.median(found[1:]), ">= 1.6",
        f"wall time of a round, the quickstart with all layers adapted, {clients} "
        f"clients of {steps} steps each, one thread a step",
    )  # fmt: skip


# -- growth -------------------------------------------------------------------------------------

idle = ClientApp()


@idle.query()
def _query(message: Message, context: Context) -> Message:
    return Message(query(message, context), reply_to=message)


@idle.train()
def _train(message: Message, context: Context) -> Message:
    """A reply to every check's liking, without training: what came is sent back."""

    def back(message: Message, context: Context) -> Any:
        work = ClientJob.open(message, context)
        sent = travelling(work.download.send, work.download.trainable)
        metrics = {"num-examples": 1, "loss": 0.0, "steps": 0, "seconds": 0.0}
        return work.reply(
            {
                "sent": pack_factors(sent, "float32"),
                "metrics": MetricRecord(metrics),
                "certificate": _numbers(work),
            }
        )

    return Message(back(message, context), reply_to=message)


untrained: dict[tuple[str, int], ArrayRecord] = {}
"""By run and round, what all these clients measure of what they were sent."""


def _numbers(work: ClientJob) -> ArrayRecord:
    """The certificate's, measured once a round: the server has loaded what it sends."""
    key = work.token, work.job.round
    if key not in untrained:
        found = work.numbers(work.model())
        untrained[key] = pack_numbers(found, found)
    return untrained[key]


def growth(quick: bool) -> Iterator[Row]:
    """Ten times the clients, a hundred of them a round: what grows, and how."""
    sizes = (10, 100) if quick else (10, 100, 1_000, 10_000)
    found = {}
    with tempfile.TemporaryDirectory() as d:
        path = Path(d, "rows.jsonl")
        chance = random.Random(0)
        words = [f"w{i}" for i in range(500)]
        lines = (
            {"text": f"{n} {' '.join(chance.sample(words, 3))}", "label": "ab"[n % 2]}
            for n in range(2 * max(sizes) + 100)
        )
        path.write_text("".join(json.dumps(x) + "\n" for x in lines))
        for n in sizes:
            found[n] = forked(_grown, n, d, str(path))[0]
    seconds = {n: f"{x['start']:.2f} s to start, {x['round']:.3f} s a round, {x['peak']:.0f} MB"
               for n, x in found.items()}  # fmt: skip
    how = "; ".join(f"{n}: {x}" for n, x in seconds.items())
    last, before = sizes[-1], sizes[-2]
    begin = found[last]["start"] / found[before]["start"]
    yield Row(f"growth: start at {last} / at {before} clients", begin, "<= 12", how)
    yield Row(
        f"growth: a round at {last} / at {before} clients",
        found[last]["round"] / found[before]["round"], "<= 10",
        "CPU time of a round of at most 100 no-op clients; at most linear in who is registered",
    )  # fmt: skip
    yield Row(
        f"growth: memory at {last} / at {before} clients",
        found[last]["peak"] / found[before]["peak"],
        "<= 1.15", "peak RSS of the process",
    )  # fmt: skip
    yield Row(f"growth: seconds to start {last} clients", found[last]["start"], "<= 10", how)


def _grown(clients: int, directory: str, path: str) -> dict[str, float]:
    torch.set_num_threads(1)
    config = quickstart(
        directory, run__name=f"n{clients}", data__path=path, data__line_pattern="",
        data__test_size=50, data__partition="iid", clients__count=clients, clients__per_round=100,
        clients__ranks="4", strategy__name="fedavg", lora__layers="-1",
    )  # fmt: skip
    cache.model(config, cache.corpus(config).labels)  # loaded alike by all
    cache.forget_data()
    begun = time.process_time()
    with federation(config, idle) as (server, grid):
        started = time.process_time() - begun
        server.round(grid, 1)
        took = [spent(lambda n=n: server.round(grid, n)) for n in (2, 3, 4)]
    return {"start": started, "round": statistics.median(took), "peak": peak()}
