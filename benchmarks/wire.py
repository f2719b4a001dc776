"""Bytes of a message over the raw bytes of its tensors, and what the short ones cost."""

import statistics
import tempfile
from collections.abc import Iterator

import torch

from benchmarks.engine import federation, quickstart
from benchmarks.measure import Row
from fedlora.federation.server.run import score
from fedlora.federation.wire.messages import count_bytes, pack_download
from fedlora.lora.adapter import Factors
from fedlora.strategies.base import Download


def rows(quick: bool) -> Iterator[Row]:
    """An adapter of a 7B model's shapes, as the server sends it."""
    side, layers, r = (1024, 2, 16) if quick else (4096, 8, 16)
    names = [f"model.layers.{i}.self_attn.{x}_proj" for i in range(layers) for x in "qv"]
    factors = Factors(
        dict.fromkeys(names, 1.0),
        {m: torch.randn(r, side) for m in names},
        {m: torch.randn(side, r) for m in names},
    )
    raw = sum(x.numel() * 4 for _, _, x in factors.items())
    for dtype, target in (("float32", 1.01), ("bfloat16", 0.51), ("int8", 0.27), ("int4", 0.15)):
        sent = count_bytes(pack_download(Download(factors, frozenset({"A", "B"})), dtype))
        yield Row(
            f"wire bytes: {dtype}", sent / raw, f"<= {target}",
            f"serialised message / float32 tensors, {layers} layers, q and v of {side}, r = {r}",
        )  # fmt: skip


T_95 = {2: 12.71, 5: 2.776}
"""Student's t of a 95 % interval, by the number of seeds."""


def accuracy(quick: bool) -> Iterator[Row]:
    """Test accuracy with int8 on the wire less that with float32, seed by seed."""
    torch.set_num_threads(1)
    seeds, rounds, steps = (2, 1, 2) if quick else (5, 3, 6)
    shorter: dict[str, list[float]] = {"int8": []}
    plain = []
    with tempfile.TemporaryDirectory() as d:
        for seed in range(seeds):

            def scored(dtype: str, directory: str = d, seed: int = seed) -> float:
                config = quickstart(
                    directory, run__name=f"{dtype}-{seed}", run__seed=seed, wire__dtype=dtype,
                    clients__count=4, train__steps=steps, lora__layers="-1",
                    train__prefix_cache=256,
                )  # fmt: skip
                with federation(config) as (server, grid):
                    for number in range(1, rounds + 1):
                        server.round(grid, number)
                    found = score(server.setting)
                assert found
                return 100 * found["accuracy"]

            plain.append(scored("float32"))
            for dtype, found in shorter.items():
                found.append(scored(dtype) - plain[-1])
    for dtype, found in shorter.items():
        half = T_95[seeds] * statistics.stdev(found) / seeds**0.5
        yield Row(
            f"wire {dtype}: accuracy less float32's, points", statistics.mean(found), "",
            f"+- {half:.2f} (95 %, {seeds} seeds), of {statistics.mean(plain):.1f} % with float32; "
            f"quickstart, fedex, 4 clients, {rounds} rounds of {steps} steps, last layer adapted",
        )  # fmt: skip
