"""What it costs that no example changes with who else was sampled: privacy/microbatch.py.

The clipped sum of Poisson samples in micro-batches of one shape a width, over that in batches of 16
sorted by length, as long as they come, which is faster and does not bound the sensitivity. The same
samples on both sides, made-up rows of the lengths of short questions and of reviews, a BERT of
MiniLM's size; `python -m benchmarks.run --only dp-samples`.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.dp_step import MINILM, RANK, C, build, forward, trained
from benchmarks.measure import Row, paired
from fedlora.privacy.mechanism import ClippedSum
from fedlora.privacy.microbatch import microbatches, size_of
from fedlora.privacy.per_example import kept_apart
from fedlora.training.data.batches import Batch, Encoded, collate
from fedlora.training.devices import HOST

BATCH, RATE = 16, 0.1
LENGTHS = {"questions": (2.5, 0.35, 40), "reviews": (4.2, 0.7, 256)}
"""Mean and spread of the logarithm of a text's tokens, and the most of them."""


def rows(quick: bool) -> Iterator[Row]:
    """One row for each kind of text and number of examples of a client."""
    torch.set_num_threads(1)
    times, sizes = (1, (150,)) if quick else (5, (150, 600))
    model = build("bert", "sdpa", HOST, MINILM)
    params = tuple(trained(model))
    with kept_apart(model, "default", frozenset(params)) as sink:

        def total(parts: list[tuple[Batch, int]]) -> None:
            clipped = ClippedSum(params, C)
            for batch, real in parts:
                forward(model, batch).sum().backward()
                clipped.add(sink.take(len(batch["labels"])), real)

        for text, (mean, spread, most) in LENGTHS.items():
            for n in sizes:
                encoded = made_up(n, mean, spread, most)
                chosen = sample(n)
                ours, sorted_ = of_one_shape(encoded, chosen, n, most), by_length(encoded, chosen)
                ratio, _, _ = paired(partial(total, ours), partial(total, sorted_), times)
                places = sum(len(b["labels"]) for b, _ in ours)
                yield Row(
                    f"DP samples, {text}, {n} examples: / sorted batches", ratio, "",
                    f"CPU time of one step of {len(chosen)} examples in {places} places, rank "
                    f"{RANK}, median of {times}",
                )  # fmt: skip


def made_up(n: int, mean: float, spread: float, most: int) -> Encoded:
    """n rows of random ids, their lengths drawn."""
    g = torch.Generator().manual_seed(1)
    drawn = torch.exp(mean + spread * torch.randn(n, generator=g)).long().clamp(3, most)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), drawn.cumsum(0)])
    ids = torch.randint(5, 3999, (int(starts[-1]),), generator=g, dtype=torch.int32)
    classes = torch.randint(0, 6, (n,), generator=g)
    return Encoded(ids, starts, torch.arange(n), pad=0, classes=classes)


def sample(n: int) -> Tensor:
    """A Poisson sample of the rate that a client of n examples has by default."""
    g = torch.Generator().manual_seed(2)
    return torch.nonzero(torch.rand(n, generator=g) < rate(n)).flatten()


def rate(n: int) -> float:
    return min(1.0, max(RATE, BATCH / n))


def of_one_shape(encoded: Encoded, chosen: Tensor, n: int, most: int) -> list[tuple[Batch, int]]:
    size = size_of(0, BATCH, rate(n) * n)
    parts = microbatches(chosen, encoded.lengths, lambda _: size, most)
    return [(part.batch(encoded), part.real) for part in parts]


def by_length(encoded: Encoded, chosen: Tensor) -> list[tuple[Batch, int]]:
    order = chosen[encoded.lengths[chosen].argsort(stable=True)]
    return [(collate(encoded, part), len(part)) for part in torch.split(order, BATCH)]
