"""Aggregating 100 clients' adapters of a 7B model, against reading them once, and a dense SVD."""

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Row, forked, paired, spent
from fedlora.federation.server.allocator import keep_freed_memory
from fedlora.federation.wire.messages import pack_download
from fedlora.lora.adapter import Factors, Pair
from fedlora.lora.lowrank import compress, mean_and_residual, stack, svd
from fedlora.strategies import STRATEGIES
from fedlora.strategies.base import Client, Layer, Round, Start, Upload, travelling

READ = ("fedavg", "ffa", "fedsa", "fedsb", "fedex", "flora")
STREAMS = ("fedavg", "ffa", "fedsa", "fedsb")
RANK = 16


def rows(quick: bool) -> Iterator[Row]:
    torch.set_num_threads(1)
    keep_freed_memory()  # as the server itself does
    clients, side, layers = (20, 512, 1) if quick else (100, 4096, 2)
    what = f"{clients} clients, {layers} of 32 layers, q and v of {side} x {side}, r = {RANK}"
    for name in READ:
        alone, sent = forked(_against_reading, name, clients, side, layers)[0]
        yield Row(
            f"aggregation: {name}", alone, "<= 3",
            f"CPU time of aggregate / of one sum over every tensor sent; {what}; one thread; from "
            "the second round on, so that memory is the process's own",
        )  # fmt: skip
        yield Row(
            f"aggregation and the next message: {name}", sent, "",
            "the same with the download of a client that lacks one round made and packed, in which "
            "a base change is put together: once a round, for all clients",
        )  # fmt: skip
    for name in STRATEGIES:
        if name not in READ:
            yield Row(
                f"aggregation: {name}", forked(_first_call, name, clients, side)[0], "",
                "as above, one layer and one call, whose memory is faulted in",
            )  # fmt: skip
    dense, ours = forked(_dense_residual, clients, side)[0]
    yield Row(
        "aggregation: fedex, the dense residual / ours", dense / ours, "",
        "CPU time; sum p_i B_i A_i - Bbar Abar of one module as a matrix, as the paper writes it, "
        f"over ours put together; {clients} clients, {side} x {side}",
    )  # fmt: skip
    for name in STREAMS:
        yield Row(
            f"aggregation memory: {name}", _alive(name, 20, side), "<= 2",
            "most uploads alive at once of 20 that stream in",
        )  # fmt: skip


def _against_reading(name: str, n: int, side: int, layers: int) -> tuple[float, float]:
    """Of one read: aggregate, and aggregate with the next download, packed."""
    strategy, state, uploads = _federation(name, n, side, layers)
    held, round = list(uploads), Round(1, 0)

    def read() -> None:
        _read(held)

    def aggregate() -> Any:
        return strategy.aggregate(state, iter(held), round)

    def with_message() -> None:
        download = strategy.download(aggregate(), held[0].client, Round(2, 0))
        pack_download(download, "float32")

    found = []
    for work in (aggregate, with_message):
        work()
        found.append(paired(work, read, 7)[0])
    return found[0], found[1]


def _first_call(name: str, n: int, side: int) -> float:
    """Of one read: the first aggregate of one layer."""
    strategy, state, uploads = _federation(name, n, side, 1)
    held = list(uploads)
    _read(held)
    took = spent(lambda: _read(held))
    return spent(lambda: strategy.aggregate(state, iter(held), Round(1, 0))) / took


def _read(held: Sequence[Upload]) -> None:
    for u in held:
        for _, _, x in u.sent.items():
            x.sum()


def _dense_residual(n: int, side: int) -> tuple[float, float]:
    """Seconds of a module's mean and residual: as a dense matrix, and in factors."""
    pairs, p = _updates("unrelated", n, side), [1 / n] * n

    def dense() -> Tensor:
        total = torch.zeros(side, side)
        for x in pairs:
            total.addmm_(x.B, x.A, alpha=1 / n)
        A, B = (torch.stack([getattr(x, f) for x in pairs]).mean(0) for f in "AB")
        return total.addmm_(B, A, alpha=-1)

    def ours() -> Pair:
        return mean_and_residual(pairs, p)[1].pair()

    ours()
    return spent(dense), spent(ours)


def _federation(name: str, n: int, side: int, layers: int):  # type: ignore[no-untyped-def]
    """A strategy, its first state, and a generator of n uploads of the columns it sends."""
    names = [f"layers.{i}.{x}" for i in range(layers) for x in ("q_proj", "v_proj")]
    held = {m: Layer(side, side, RANK, 1.0) for m in names}
    chance = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.empty(shape).uniform_(-0.01, 0.01, generator=chance)

    def factors(core: bool) -> Factors:
        return Factors(
            dict.fromkeys(names, 1.0),
            {m: draw(RANK, side) for m in names},
            {m: draw(side, RANK) for m in names},
            {m: draw(RANK, RANK) for m in names} if core else {},
        )

    clients = [Client(i, held) for i in range(n)]
    strategy = STRATEGIES[name]()
    reads = name in ("frlora", "fedsb")
    weights = {m: draw(side, side) if reads else torch.zeros(1) for m in names}
    state = strategy.init(Start(factors(False), clients, weights))
    came = strategy.download(state, clients[0], Round(1, 0))
    whole = torch.ones(RANK // came.block, came.block, came.block) if came.block else None
    mask = torch.block_diag(*whole) if whole is not None else torch.ones(RANK, RANK)

    def uploads() -> Iterator[Upload]:
        for c in clients:
            trained = factors("R" in came.trainable)
            trained = replace(trained, R={m: x * mask for m, x in trained.R.items()})
            sent, _ = strategy.upload(trained, Factors())
            yield Upload(c, travelling(sent, came.trainable), 10 + c.id)

    return strategy, state, uploads()


def truncation(quick: bool) -> Iterator[Row]:
    """FlexLoRA's step: the best rank 64 of a weighted mean, from factors and from a dense SVD."""
    torch.set_num_threads(2)
    clients, side, keep = (20, 512, 8) if quick else (100, 4096, 64)
    weights = [1 / clients] * clients
    theirs = 0.0
    for kind in ("alike", "unrelated"):
        pairs = _updates(kind, clients, side)

        def dense_svd(pairs=pairs) -> None:  # type: ignore[no-untyped-def]
            total = torch.zeros(side, side)
            for p in pairs:
                total += p.delta() / clients
            torch.linalg.svd(total, full_matrices=False)

        ours = spent(lambda p=pairs: compress(stack(p, weights), keep))
        theirs = theirs or spent(dense_svd)  # once: its time does not depend on the numbers
        how = f"CPU time, {clients} clients of {kind} updates, {side} x {side}, rank {keep}"
        yield Row(f"truncation ({kind}): speed", theirs / ours, ">= 20", f"dense SVD / ours; {how}")
        whole = stack(pairs, weights)
        best = svd(whole)[1][keep:].double().square().sum().sqrt()
        gap = (compress(whole, keep).delta().double() - whole.delta().double()).norm()
        yield Row(
            f"truncation ({kind}): excess error", float(gap / best) - 1, "<= 1e-3",
            "error over the optimal truncation's (QR and core SVD), relative, less 1",
        )  # fmt: skip


def _updates(kind: str, n: int, side: int) -> list[Pair]:
    """Clients' pairs: "unrelated" ones are noise; "alike" ones share most of their directions."""
    chance = torch.Generator().manual_seed(1)
    A, B = torch.randn(RANK, side, generator=chance), torch.randn(side, RANK, generator=chance)
    share = 0.0 if kind == "unrelated" else 1.0
    return [
        Pair(
            share * A + torch.randn(RANK, side, generator=chance) / 2,
            share * B + torch.randn(side, RANK, generator=chance) / 2,
        )
        for _ in range(n)
    ]


def _alive(name: str, n: int, side: int) -> int:
    """Most uploads alive at once while n, each made when it is asked for, come in."""
    strategy, state, uploads = _federation(name, n, side, 1)
    seen: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def watched() -> Iterator[Upload]:
        nonlocal most
        for u in uploads:
            seen.append(weakref.ref(next(x for _, _, x in u.sent.items())))
            most = max(most, sum(ref() is not None for ref in seen))
            yield u
            del u

    strategy.aggregate(state, watched(), Round(1, 0))
    return most
