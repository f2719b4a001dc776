"""Canaries in a client's rows, whose gradients lie each along one coordinate of its own.

A canary is a row of made-up tokens that no row of the client has. When its gradient is taken, what
the training code finds is a gradient LENGTH times as long as privacy.clip-norm along one number
that trains, and zero elsewhere: the worst case that clipping and noise have to hold against.
Sampling, clipping, noise, optimiser, accounting and messages are those of any run.

Which canaries are in is decided by fair coins of the operating system, never by run.seed, which
the server knows.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.errors import ConfigError
from fedlora.privacy.chance import Chance
from fedlora.privacy.per_example import Dense, Gradient, PerExample, Sink
from fedlora.training.data.batches import Encoded
from fedlora.training.model.model import Model

LENGTH = 10.0
"""Of a canary's gradient, in clip norms."""


@dataclass
class Canaries:
    """m canaries dealt out among clients, and which of them are in."""

    m: int
    clients: int
    is_in: Tensor = field(init=False)
    """(m,) bool."""

    def __post_init__(self) -> None:
        self.is_in = Chance().uniforms(self.m) < 0.5

    def of(self, client: int) -> Tensor:
        """The numbers of this client's canaries, in or not."""
        return torch.arange(client, self.m, self.clients)

    def here(self, client: int) -> list[int]:
        """The numbers of those that are in."""
        mine = self.of(client)
        return mine[self.is_in[mine]].tolist()

    def added(self, rows: Encoded, words: Sequence[int], client: int) -> Encoded:
        """The client's rows, and behind them its canaries that are in, made of these tokens."""
        texts = made_up(words, rows, self.m)
        mine = torch.tensor([texts[i] for i in self.here(client)], dtype=rows.ids.dtype)
        mine = mine.view(-1, len(texts[0]))
        n, length = mine.shape
        starts = rows.starts[-1] + length * torch.arange(1, n + 1)

        def more(x: Tensor | None, each: int, value: int) -> Tensor | None:
            return None if x is None else torch.cat([x, x.new_full((n * each,), value)])

        return replace(
            rows,
            ids=torch.cat([rows.ids, mine.flatten()]),
            starts=torch.cat([rows.starts, starts]),
            rows=torch.cat([rows.rows, rows.rows[:1].expand(n)]),
            classes=more(rows.classes, 1, 0),
            prompts=more(rows.prompts, 1, 1),
            types=more(rows.types, length, 0),
        )

    @contextmanager
    def planted(
        self,
        model: Model,
        params: Sequence[nn.Parameter],
        rows: Encoded,
        client: int,
        C: float,
        active: bool,
    ) -> Iterator[None]:
        """Within it, the sink gives each canary its own gradient; zero where not `active`.

        params: all that train; rows: as `added` gave them.
        """
        place, numbers = places(params, self.m), self.here(client)
        ends = rows.starts[len(rows) - len(numbers) :].tolist()
        texts = [tuple(rows.ids[a:b].tolist()) for a, b in itertools.pairwise(ends)]
        known = dict(zip(texts, numbers, strict=True))
        seen: list[tuple[int, ...]] = []

        def taken(honest: Callable[[int], dict[nn.Parameter, Gradient]], n: int) -> Any:
            found = honest(n)
            here = {b: known[ids] for b, ids in enumerate(seen) if ids in known}
            if not here:
                return found
            dense = {
                p: Dense(g.dense().clone(memory_format=torch.contiguous_format))
                for p, g in found.items()
            }
            for b, i in here.items():
                for g in dense.values():
                    g.G[b] = 0
                if active:
                    p, at = place[i]
                    dense[p].G[b].view(-1)[at] = LENGTH * C
            return dense

        def watch(_: nn.Module, __: Any, kwargs: Any) -> None:
            if (sink := sink_of(model)) is None:
                return
            seen[:] = texts_of(kwargs)
            if "take" not in vars(sink):
                honest = sink.take
                sink.take = lambda n: taken(honest, n)  # type: ignore[method-assign]

        hook = model.peft.register_forward_pre_hook(watch, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


def made_up(words: Sequence[int], rows: Encoded, m: int) -> list[tuple[int, ...]]:
    """m texts of one length, all different, that no row has."""
    length = next(n for n in itertools.count(3) if len(words) ** n >= 4 * m + 2 * len(rows))
    spans = zip(rows.starts[:-1].tolist(), rows.starts[1:].tolist(), strict=True)
    taken = {tuple(rows.ids[a:b].tolist()) for a, b in spans}
    every = (x for x in itertools.product(words, repeat=length) if x not in taken)
    return list(itertools.islice(every, m))


def texts_of(inputs: Mapping[str, Tensor]) -> list[tuple[int, ...]]:
    """The tokens of each row of a batch, without what pads it."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    return [tuple(row[kept].tolist()) for row, kept in zip(ids, mask, strict=True)]


def sink_of(model: Model) -> Sink | None:
    """Where per-example gradients go now; None where they are not kept apart."""
    for module in model.peft.modules():
        variant = getattr(module, "lora_variant", {}).get(model.active)
        if isinstance(variant, PerExample):
            return variant.sink
    return None


def places(params: Sequence[nn.Parameter], m: int) -> list[tuple[nn.Parameter, int]]:
    """The coordinate of each canary, spread evenly over all that trains.

    Raises:
        ConfigError: there are fewer numbers than canaries.
    """
    sizes = [p.numel() for p in params]
    if (total := sum(sizes)) < m:
        raise ConfigError([f"--canaries {m}: must be at most the {total} numbers that train"])
    ends = list(itertools.accumulate(sizes))
    found, n = [], 0
    for i in range(m):
        at = i * total // m
        while at >= ends[n]:
            n += 1
        found.append((params[n], at - (ends[n] - sizes[n])))
    return found
