"""Checks that a model's examples do not mix, measured on made-up inputs before any real one.

Three random examples of different lengths go through the model together, padded, and one by one;
the per-example gradients must agree. It finds what no list of module types can: layers that mix
examples, sequence-first layouts, routers, caches, a head that reads its neighbour's row. And after
it the model must hold what it held: a statistic of what it saw would have no noise.

All of it in train mode, as in a step: some layers mix examples there alone, and with dropout
attention takes another kernel. The dropout is there, and drops nothing. A model that draws chance
otherwise is looked at in evaluation mode.

`steady` then asks for more, bit by bit: in micro-batches of one shape (microbatch.py) an example's
loss and gradient must not change with its neighbours and its place. Else removing one example would
move the clipped gradients of all that stand behind it, in bfloat16 by up to 0.14 C. Where they do
change, float32 is used for examples of that width, and where that is no help, one at a time.

Formal guarantee: none; a model that mixes examples on some inputs only would pass.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fedlora.config.reader import Config
from fedlora.errors import PrivacyError
from fedlora.privacy.microbatch import Part, size_of
from fedlora.privacy.per_example import Dense, Gradient, kept_apart
from fedlora.training.data.batches import Batch, Encoded, collate, examples_in
from fedlora.training.devices import wide_on_host
from fedlora.training.draws import own_draws
from fedlora.training.model.decoder import as_read
from fedlora.training.model.dropout import undropped
from fedlora.training.model.model import Model
from fedlora.training.optimizers import Live
from fedlora.training.precision import resolved
from fedlora.training.train import example_losses

TOLERANCE = 1e-2
"""Relative; float32 rounding leaves 1e-5, a mixed-up example leaves 1."""

LENGTHS = (7, 4, 2)

_passed: WeakKeyDictionary[Model, set[tuple[tuple[str, tuple[int, ...]], ...]]] = (
    WeakKeyDictionary()
)
_steady: WeakKeyDictionary[Model, dict[object, bool]] = WeakKeyDictionary()
"""What was seen of each model, by trainable tensors, size, width and precision."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Way:
    """How examples of one width are computed."""

    size: int
    """In a micro-batch, those that fill it up among them."""
    precision: str


def check_apart(model: Model, live: Live) -> None:
    """Check it, once in a process for each model and set of trainable tensors.

    Raises:
        PrivacyError: gradients of examples in a batch are not those of the examples alone, or the
            model keeps something of those that it saw.
    """
    key = _kind(live)
    passed = _passed.setdefault(model, set())
    if key not in passed:
        _probe(model, live)
        passed.add(key)


def steady(model: Model, live: Live, config: Config, width: int, drawn: float) -> Way:
    """How to compute examples of this width, so that none changes with what stands beside it.

    A function of the model, the processor or card, the settings, the width, and of how many
    examples a step draws in the mean: of no example.
    """
    train, most = config.train, config.data.max_length
    asked = size_of(config.privacy.microbatch, train.microbatch or train.batch_size, drawn)
    wanted = resolved(config.train.precision, model.device)
    for precision in dict.fromkeys((wanted, "float32")):
        if asked == 1 or _is_steady(model, live, Way(asked, precision), width, width >= most):
            return Way(asked, precision)
        log.warning(
            "in %s, in micro-batches of %d of %d tokens, an example's gradient changes with its "
            "neighbours, which privacy forbids", precision, asked, width,
        )  # fmt: skip
    return Way(1, "float32")


def _is_steady(model: Model, live: Live, way: Way, width: int, full: bool) -> bool:
    known = _steady.setdefault(model, {})
    key = (_kind(live), way, width, full)
    if key not in known:
        with _stirred(model, live) as params:
            known[key] = _alike(model, params, way, width, full)
    return known[key]


def _alike(model: Model, params: list[nn.Parameter], way: Way, width: int, full: bool) -> bool:
    """Do made-up examples keep their bits, each a place further on, beside others?"""
    here = torch.arange(way.size)
    even = here % 2 == 0
    longest = width if full else width - 1
    long, half = torch.full_like(here, longest), torch.full_like(here, max(1, longest // 2))
    mixed = torch.where(here % 4 == 0, long, half)  # of those that stay
    lengths = torch.cat([torch.where(even, mixed, long), half.clamp(max=2)]).tolist()
    rows = _rows(model, lengths)
    there = torch.where(even, here, here + way.size).roll(1)  # the odd ones are others
    kept = here[even & (here + 1 < way.size - full)]
    first, second = (
        _taken(model, params, rows, Part(n, len(n), width, full), way) for n in (here, there)
    )
    return all(torch.equal(x[kept], y[kept + 1]) for x, y in zip(first, second, strict=True))


def _taken(
    model: Model, params: list[nn.Parameter], rows: Encoded, part: Part, way: Way
) -> list[Tensor]:
    """Losses and gradients of these examples, each (size, ...)."""
    losses, found = _gradients(model, params, part.batch(rows), way.precision)
    parts = [(g.G,) if isinstance(g, Dense) else (g.g, g.x) for g in map(found.get, params) if g]
    return [losses, *(x for part in parts for x in part)]


def _kind(live: Live) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """What trains: names and shapes."""
    return tuple((name, tuple(p.shape)) for ps in live.values() for name, p in ps.items())


@contextmanager
def _stirred(model: Model, live: Live) -> Iterator[list[nn.Parameter]]:
    """Within it, what trains, and B, is not zero, and the model is in train mode; after it, it has
    its old bits.

    B = 0 would make every gradient of A zero, and a probe blind.
    """
    params = [p for ps in live.values() for p in ps.values()]
    frozen = [model.sides(m)[1] for m in model.held()]
    saved = {p: p.detach().clone() for p in {*params, *frozen}}
    saved |= {x: x.clone() for _, x in _statistics(model)}
    generator = torch.Generator().manual_seed(0)
    try:
        with own_draws(model.devices, 0), undropped(model.peft, scarcely=True):
            with torch.no_grad():
                for p in dict.fromkeys([*params, *frozen]):
                    p.add_((0.02 * torch.randn(p.shape, generator=generator)).to(p.device))
                model.peft.train()
                if _by_chance(model):
                    model.peft.eval()
            yield params
    finally:
        model.peft.eval()
        with torch.no_grad():
            for p, value in saved.items():
                p.copy_(value)


def _by_chance(model: Model) -> bool:
    """Does the model draw something in train mode, beside its dropout?"""
    batch = collate(_rows(model, LENGTHS), torch.arange(len(LENGTHS)))
    once, again = (example_losses(model, batch) for _ in range(2))
    return not torch.equal(once, again)


def _statistics(model: Model) -> Iterator[tuple[str, Tensor]]:
    """What a model may keep of what it saw: tensors that no optimiser moves."""
    yield from ((name, x) for name, x in model.peft.named_buffers() if x.is_floating_point())


def _probe(model: Model, live: Live) -> None:
    rows, every = _rows(model, LENGTHS), torch.arange(len(LENGTHS))
    held = {name: x.clone() for name, x in _statistics(model)}
    with _stirred(model, live) as params:
        together = _gradients(model, params, collate(rows, every))[1]
        for i in every.tolist():
            alone = _gradients(model, params, collate(rows, every[i : i + 1]))[1]
            _compare(together, alone, i)
        for name, x in _statistics(model):
            if name in held and not torch.equal(x, held[name]):
                raise PrivacyError(
                    f"this model keeps something of the examples that it saw, in {name}: no noise "
                    "would cover it; use another model, or privacy.level = 'client'"
                )


def _rows(model: Model, lengths: Sequence[int]) -> Encoded:
    """Made-up examples of these lengths, padded as the model's own are."""
    rows = model.task.made_up(model.tokenizer, model.labels, lengths)
    return as_read(model, rows)


def _gradients(
    model: Model, params: list[nn.Parameter], batch: Batch, precision: str = "float32"
) -> tuple[Tensor, dict[nn.Parameter, Gradient]]:
    """Each example's loss, and its gradients."""
    with kept_apart(model.peft, model.active, frozenset(params)) as sink:
        losses = example_losses(model, batch, precision)
        losses.sum().backward()
        return losses.detach(), sink.take(examples_in(batch))


def _compare(
    together: Mapping[nn.Parameter, Gradient], alone: Mapping[nn.Parameter, Gradient], i: int
) -> None:
    gap = size = 0.0
    for p, gradient in together.items():
        want = wide_on_host(alone[p].dense()[0])
        gap += float((wide_on_host(gradient.dense()[i]) - want).square().sum())
        size += float(want.square().sum())
    if not gap <= TOLERANCE**2 * size:
        raise PrivacyError(
            f"this model does not keep the examples of a batch apart: beside others, an example's "
            f"gradient differs by {(gap / max(size, 1e-30)) ** 0.5:.1e} of its size from its own; "
            "example-level privacy would be void. Use another model, or privacy.level = 'client'"
        )
