"""Bytes of a message over the raw bytes of its tensors."""

from collections.abc import Iterator

import torch

from benchmarks.measure import Row
from fedlora.adapter import Factors
from fedlora.strategies.base import Download
from fedlora.wire import count_bytes, pack_download


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
