"""A client's answers while the first gradient is found: see server/first_gradient.py.

    asked for     what comes              the answer, by module
    gradient      nothing                 G_i (d, k)
    signs         nothing                 sign(G_i) Omega (d, w), Omega the same on every client
                  Q (d, w)                Q^T sign(G_i) (w, k)
                  V (w, k)                sign(G_i) V^T (d, w)

G_i is the loss's mean gradient at W0 over the client's first EXAMPLES rows.

Where the head begins at zero (model.pooling = "mean") every gradient below it is exactly zero. So
the gradient is then taken at a head that was trained first: it alone, by AdamW at train.lr, in one
pass over the same rows. It is put back to the last bit.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from flwr.app import MetricRecord, RecordDict
from torch import Tensor, nn

from fedlora.config.reader import Config
from fedlora.errors import WireError
from fedlora.federation.wire.messages import (
    arrays_of,
    configs_of,
    pack_factors,
    unpack_factors,
)
from fedlora.lora.adapter import Factors
from fedlora.strategies.base import Client, Round, seeded
from fedlora.strategies.chosen import Chosen, chooses
from fedlora.training.data.batches import Encoded, batches, examples_in
from fedlora.training.devices import on_host
from fedlora.training.model.model import Model
from fedlora.training.model.whole import trained_whole
from fedlora.training.train import example_losses, microbatches

EXAMPLES = 256
"""A client's gradient is that of its first so many examples, in batches."""


def omega(k: int, width: int, m: str, seed: int) -> Tensor:
    """The probing matrix (k, w) of a module: the same on every client."""
    return torch.randn(k, width, generator=seeded(seed, 0, 0, f"omega/{m}"))


def sketch(model: Model, rows: Encoded, config: Config, asked: RecordDict) -> RecordDict:
    """A client's answer to any phase."""
    settings: Mapping[str, Any] = configs_of(asked, "sketch")
    widths = dict(zip(settings["modules"], settings["widths"], strict=True))
    for m, w in widths.items():
        size = model.shapes[m].d, model.shapes[m].k
        if not 0 < w <= min(size):
            raise WireError(f"{m}: a sketch of width {w} of a weight of {size}")
    came = unpack_factors(arrays_of(asked, "send"), {})
    G = first_gradient(model, rows, config)
    if settings.get("what", "signs") == "gradient":
        found = G
    elif came.B:
        found = {m: came.B[m].T @ M.sign() for m, M in G.items()}
    elif came.A:
        found = {m: M.sign() @ came.A[m].T for m, M in G.items()}
    else:
        seed = config.run.seed
        found = {m: M.sign() @ omega(M.shape[1], widths[m], m, seed) for m, M in G.items()}
    return RecordDict(
        {
            "sent": pack_factors(Factors(A=found), "float32"),
            "metrics": MetricRecord({"num-examples": len(rows)}),
        }
    )


def first_gradient(model: Model, rows: Encoded, config: Config) -> dict[str, Tensor]:
    """The mean of the loss's gradient over the first rows, (d, k), by module, at W0."""
    seen = 0
    with model.base_gradients() as gradients, trained_heads(model, rows, config):
        for batch in first_batches(rows, config):
            for part in microbatches(batch, config.train.microbatch):
                example_losses(model, part).sum().backward()
            seen += examples_in(batch)
        return {m: G.float() / seen for m, G in gradients().items()}


def chosen_first(
    model: Model, rows: Encoded, config: Config, strategy: Any, client: Client, round: Round
) -> Chosen | None:
    """The ranks of the loaded cores that alone train from here on, where the gradient chooses them.

    By the loss's mean gradient of each core R over EXAMPLES of the client's rows.
    """
    chooser = chooses(strategy)
    if not chooser or strategy.needs().client_choice != "gradient":
        return None
    cores, seen, begun = model.trainable(frozenset({"R"}))["R"], 0, model.read()
    model.peft.eval()
    for batch in first_batches(rows, config):
        for part in microbatches(batch, config.train.microbatch):
            example_losses(model, part).sum().backward()
        seen += examples_in(batch)
    grads = {m: core.R.grad for m, core in model.cores.items()}  # None where none arrives
    less = {m: R if (G := grads[m]) is None else R - on_host(G) / seen for m, R in begun.R.items()}
    for p in cores.values():
        p.grad = None
    chosen = chooser.choose(begun, replace(begun, R=less), client, round)
    for m, core in model.cores.items():
        core.only(chosen.get(m, torch.arange(0)))
    return chosen


def first_batches(rows: Encoded, config: Config) -> Iterator[Any]:
    """The batches that the gradient is of."""
    generator = seeded(config.run.seed, 0, 0, "first gradient")
    seen = 0
    for batch in batches(rows, config.train.batch_size, generator, 0, 1.0):
        yield batch
        seen += examples_in(batch)
        if seen >= EXAMPLES:
            return


def heads_as_loaded(model: Model) -> list[nn.Parameter]:
    """The heads' own parameters, which act while adapters are off."""
    wrappers = trained_whole(model.peft).values()
    return [p for w in wrappers for p in w.original_module.parameters()]


@contextmanager
def trained_heads(model: Model, rows: Encoded, config: Config) -> Iterator[None]:
    """Within it, a head that begins at zero is one that was trained; after it, its old bits.

    In the context of `Model.base_gradients`, whose gathering it leaves as it found it.
    """
    heads = heads_as_loaded(model)
    if all(bool(p.any()) for p in heads if p.ndim > 1):
        yield
        return
    before = [p.detach().clone() for p in heads]
    asked = [p.requires_grad for p in heads]
    others = [p for p in model.peft.parameters() if p.requires_grad]
    try:
        for p in others:
            p.requires_grad_(False)
        for p in heads:
            p.requires_grad_(True)
        optimizer = torch.optim.AdamW(heads, config.train.lr)
        for batch in first_batches(rows, config):
            for part in microbatches(batch, config.train.microbatch):
                example_losses(model, part).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        for p, asks in zip(heads, asked, strict=True):
            p.requires_grad_(asks)
            p.grad = None
        for p in others:
            p.requires_grad_(True)
        yield
    finally:
        with torch.no_grad():
            for p, old, asks in zip(heads, before, asked, strict=True):
                p.copy_(old)
                p.requires_grad_(asks)
                p.grad = None
