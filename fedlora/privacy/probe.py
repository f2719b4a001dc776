"""Checks that a model's examples do not mix, measured on made-up inputs before any real one.

Three random examples of different lengths go through the model together, padded, and one by one;
the per-example gradients must agree. It finds what no list of module types can: layers that mix
examples, sequence-first layouts, routers, caches, a head that reads its neighbour's row.

Formal guarantee: none; a model that mixes examples on some inputs only would pass.
"""

from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fedlora.errors import PrivacyError
from fedlora.privacy.per_example import Gradient, kept_apart
from fedlora.training.data.batches import IGNORE, Batch
from fedlora.training.devices import wide_on_host
from fedlora.training.model.agreement import padding, vocabulary
from fedlora.training.model.model import Model
from fedlora.training.optimizers import Live
from fedlora.training.train import example_losses

TOLERANCE = 1e-2
"""Relative; float32 rounding leaves 1e-5, a mixed-up example leaves 1."""

LENGTHS = (7, 4, 2)

_passed: WeakKeyDictionary[Model, set[tuple[tuple[str, tuple[int, ...]], ...]]] = (
    WeakKeyDictionary()
)


def check_apart(model: Model, live: Live) -> None:
    """Check it, once in a process for each model and set of trainable tensors.

    Raises:
        PrivacyError: gradients of examples in a batch are not those of the examples alone.
    """
    key = tuple((name, tuple(p.shape)) for ps in live.values() for name, p in ps.items())
    passed = _passed.setdefault(model, set())
    if key not in passed:
        _probe(model, live)
        passed.add(key)


def _probe(model: Model, live: Live) -> None:
    params = [p for ps in live.values() for p in ps.values()]
    frozen = [model.sides(m)[1] for m in model.held()]
    saved = {p: p.detach().clone() for p in {*params, *frozen}}
    generator = torch.Generator().manual_seed(0)
    examples = [_made_up(model, n, generator) for n in LENGTHS]
    try:
        with torch.no_grad():  # B = 0 would make every gradient of A zero, and the probe blind
            for p in saved:
                p.add_((0.02 * torch.randn(p.shape, generator=generator)).to(p.device))
        together = _gradients(model, params, _stacked(model, examples))
        for i, example in enumerate(examples):
            _compare(together, _gradients(model, params, example), i)
    finally:
        with torch.no_grad():
            for p, value in saved.items():
                p.copy_(value)


def _gradients(
    model: Model, params: list[nn.Parameter], batch: Batch
) -> dict[nn.Parameter, Gradient]:
    with kept_apart(model.peft, model.active, frozenset(params)) as sink:
        example_losses(model, batch).sum().backward()
        return sink.take(len(batch["input_ids"]))


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


def _made_up(model: Model, n: int, generator: torch.Generator) -> dict[str, Tensor]:
    size = vocabulary(model.peft.get_base_model(), model.tokenizer)
    ids = torch.randint(0, size, (1, n), generator=generator)
    mask = torch.ones_like(ids)
    if model.labels:
        labels = torch.randint(0, len(model.labels), (1,), generator=generator)
    else:
        labels = ids.clone()
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _stacked(model: Model, examples: list[Batch]) -> Batch:
    width = max(e["input_ids"].shape[1] for e in examples)
    pad = padding(model.peft.get_base_model(), model.tokenizer)
    fill = {"input_ids": pad, "attention_mask": 0}

    def padded(key: str, x: Tensor) -> Tensor:
        if x.ndim == 1:
            return x
        value = fill.get(key, IGNORE)
        return nn.functional.pad(x, (0, width - x.shape[1]), value=value)

    return {k: torch.cat([padded(k, e[k]) for e in examples]) for k in examples[0]}
