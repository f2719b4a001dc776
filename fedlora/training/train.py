"""Local training: our own loop, because privacy has to own the step.

    for batch in batches:
        loss = mean over the batch of each example's loss
        step

A batch may be larger than what is in memory at once (train.gradient-accumulation-steps,
train.microbatch): then it goes through in parts, each weighted by its rows, so that the gradient is
the whole batch's however it is cut.

One example's loss is the task's (fedlora/training/tasks); of tokens it is the mean over its own, so
what one example adds never depends on another's length.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.config.reader import Config
from fedlora.strategies.base import Penalty, seeded
from fedlora.training.data.batches import (
    Batch,
    Encoded,
    batches,
    examples_in,
    inputs_of,
    local_steps,
    tokens_in,
)
from fedlora.training.data.packing import packed_tokens
from fedlora.training.devices import HOST, Stopwatch, on_host, sent
from fedlora.training.draws import own_draws
from fedlora.training.embedding_noise import noised
from fedlora.training.held_aside import HeldAside
from fedlora.training.model.model import Model
from fedlora.training.model.prefix_cache import ahead
from fedlora.training.optimizers import Live, build_optimizer
from fedlora.training.precision import autocast, scaler
from fedlora.training.rules import with_rule
from fedlora.training.schedule import Stepper, full_rate, scheduled
from fedlora.training.tasks.outputs import own_losses


@dataclass(frozen=True, slots=True)
class Fit:
    """The results of a client's training."""

    loss: float
    """Mean over the examples seen; NaN where none was."""
    steps: int
    seconds: float
    privacy: Mapping[str, float] = field(default_factory=dict)
    forward: float = 0.0
    backward: float = 0.0
    """Seconds of each pass, over all steps."""
    tokens: int = 0
    """Tokens seen, padding included."""
    during: Mapping[str, float] = field(default_factory=dict)
    """The loss on rows held aside, by the share of the steps that were taken before."""


def fit(
    model: Model,
    encoded: Encoded,
    columns: frozenset[str],
    config: Config,
    round: int,
    client: int,
    penalty: Penalty | None = None,
    held: Encoded | None = None,
) -> Fit:
    """Train the model's loaded factors in place; held: rows held aside, for evaluate.steps.

    Batches and dropout come from (seed, round, client) alone. The optimiser starts cold.
    """
    begun = time.perf_counter()
    live, train = model.trainable(columns), config.train
    optimizer = build_optimizer(live, train, full_rate(config, round))
    ruled = with_rule(optimizer, model, live, config, round, client)
    count = local_steps(len(encoded), train)
    ruled = scheduled(ruled, config, round, count)
    generator = seeded(config.run.seed, round, client, "batches")
    drawn = batches(encoded, train.step_size, generator, count)
    watch, sums = Stopwatch(model.device), list[Tensor]()
    seen, tokens, aside = 0, 0, HeldAside(model, held, config, count)
    with training(model, config, round, client):
        aside.after(0)
        for step in steps(model, drawn, live, ruled, config, penalty, watch):
            sums.append(step.losses.sum())
            seen += len(step.losses)
            tokens += step.tokens
            aside.after(len(sums))
        total = sum(on_host(torch.stack(sums)).tolist()) if sums else 0.0  # read once
    mean = total / seen if seen else math.nan
    forward, backward = watch.seconds("forward"), watch.seconds("backward")
    took = time.perf_counter() - begun - aside.seconds
    passes = (forward, backward)
    return Fit(mean, len(sums), took, {}, *passes, tokens=tokens, during=aside.losses)


@dataclass(frozen=True, slots=True)
class Step:
    """One step that was taken."""

    losses: Tensor
    """(batch,), before it; on the model's device, which nothing waits for until it is read."""
    loss: Tensor
    """Their mean and the penalties: what the step descends."""
    tokens: int


def steps(
    model: Model,
    drawn: Iterable[Batch],
    live: Live,
    optimizer: Stepper,
    config: Config,
    penalty: Penalty | None = None,
    watch: Stopwatch | None = None,
) -> Iterator[Step]:
    """One step of the optimiser a batch, each given back once it is taken; within `training`.

    `watch` gets the time of each "forward" and "backward" pass.
    """
    watch = watch or Stopwatch(model.device)
    params = [p for ps in live.values() for p in ps.values()]
    received = {p: p.detach().clone() for p in params}
    scale = scaler(config.train.precision, model.device)
    stepped: Any = optimizer  # of which a scaler asks for the groups of parameters alone
    for batch in ahead(model.prefix, model.peft, drawn, config.train.precision):
        optimizer.zero_grad(set_to_none=True)
        extra = extra_loss(model.sides, received, penalty, config.train.prox)
        extra = extra.to(model.device) if isinstance(extra, Tensor) else extra
        found, whole, tokens = list[Tensor](), list[Tensor](), 0
        for part in microbatches(batch, config.train.at_once):
            with watch.timed("forward"):
                losses = example_losses(model, part, config.train.precision)
                share = len(losses) / examples_in(batch)
                loss = (losses.mean() * share if share < 1 else losses.mean()) + extra
            with watch.timed("backward"):
                scale.scale(loss).backward()
            tokens += packed_tokens(part) if config.train.packing else tokens_in(part)
            found.append(losses.detach())
            whole.append(loss.detach())
            extra = 0.0  # penalties count once
        scale.unscale_(stepped)
        if config.train.grad_clip:
            nn.utils.clip_grad_norm_(params, config.train.grad_clip)
        scale.step(stepped)
        scale.update()
        yield Step(torch.cat(found), torch.stack(whole).sum(), tokens)


def microbatches(batch: Batch, size: int) -> Iterator[Batch]:
    """A batch in parts of at most `size` examples, in its order; 0: as a whole."""
    n = examples_in(batch)
    if not size or size >= n:
        yield batch
        return
    for start in range(0, n, size):
        yield {key: x[start : start + size] for key, x in batch.items()}


def example_losses(model: Model, batch: Batch, precision: str = "float32") -> Tensor:
    """Each example's own loss, (batch,), in float32; the model's products in `precision`.

    On the model's device, wherever the batch is.
    """
    if not (own := model.config.train.loss):
        with autocast(precision, model.device):
            return model.task.losses(model, batch).float()
    inputs = inputs_of(batch)
    with autocast(precision, model.device):
        logits = model.logits(inputs)
    return own_losses(own, logits, sent(batch["labels"], logits.device))


def extra_loss(
    sides: Callable[[str], tuple[Tensor, Tensor]],
    received: Mapping[nn.Parameter, Tensor],
    penalty: Penalty | None,
    prox: float,
) -> Tensor | float:
    """FedProx's mu/2 |w - w_received|^2 and a strategy's own penalty; 0 where there is none.

    sides: A (r, k) and B (d, r) of a layer, as they train.
    """
    extra: Tensor | float = 0.0
    at = next((p.device for p in received), HOST)  # a base may be spread over several
    if prox:
        extra = extra + prox / 2 * sum(((p - p0) ** 2).sum().to(at) for p, p0 in received.items())
    if penalty and penalty.weight:
        for m, keep in penalty.keep.items():
            A, B = sides(m)
            tail = B[:, keep:], A[keep:]
            if tail[0].numel():
                both = _safe_norm(tail[0]) * _safe_norm(tail[1])
                extra = extra + penalty.weight * both.to(at)
    return extra


def _safe_norm(x: Tensor) -> Tensor:
    """The norm, with gradient zero at zero instead of NaN."""
    return (x.square().sum() + 1e-24).sqrt()


@contextmanager
def training(model: Model, config: Config, round: int, client: int) -> Iterator[None]:
    """Train mode; dropout, and noise, from a stream of its own; no gradient outlasts it."""
    seed = seeded(config.run.seed, round, client, "dropout").initial_seed()
    alpha = config.train.neftune_noise_alpha
    with own_draws(model.devices, seed), noised(model.peft.get_base_model(), alpha):
        model.peft.train()
        try:
            yield
        finally:
            model.peft.eval()
            model.peft.zero_grad()


@contextmanager
def threads(n: int) -> Iterator[None]:
    """A context in which torch computes with n threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
