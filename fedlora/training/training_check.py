"""Checks that a model trains as it must, through the training loop itself, before it counts.

    rows        some are there; what is scored is what the task says; an example's loss is that of
                the definition, and the same alone as beside others
    gradient    loss(w + t d) - loss(w - t d) = 2 t g.d, for each column of trained tensors apart
    step        the real optimiser moves exactly the tensors that are declared trainable

All of it at a point where nothing is zero. A freshly loaded adapter has B = 0 and often a head of
zeros, so most gradients are 0 there, and a check would pass with the adapters frozen: every factor
and trained tensor is moved by a small seeded perturbation first. Both passes of a difference have
the same dropout masks. d is seeded in size and has the gradient's signs, and t makes the change
CHANGE times what rounding does to the loss.

The losses are those of `train.steps`, many in one run of it, with nothing in the optimiser's place.
So whatever that loop keeps from one step to the next (a cache of casts, remembered states, a
detached copy) shows as a loss that does not follow the weights. Afterwards weights, flags,
generators and caches are as before, bit for bit.

Under example-level DP no private row is looked at: see `privacy.rehearsal`.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.config.reader import Config
from fedlora.errors import TrainingCheckError
from fedlora.strategies.base import Penalty
from fedlora.training.data.batches import Batch, Encoded, collate, examples_in, local_steps
from fedlora.training.devices import OutOfMemory, by_any_algorithm, is_host, on_host, wide_on_host
from fedlora.training.draws import own_draws
from fedlora.training.loss_check import check_labels, check_losses, check_rows, chosen
from fedlora.training.model.expert import Expert
from fedlora.training.model.model import Model
from fedlora.training.optimizers import Live, build_optimizer
from fedlora.training.parts_check import Still as Still
from fedlora.training.parts_check import check_parts
from fedlora.training.precision import resolved
from fedlora.training.schedule import learning_rate
from fedlora.training.slope_check import (
    Tolerance,
    check_slope,
    moved,
    noise_like,
    put_back,
    size_of,
)
from fedlora.training.train import example_losses, steps, training

PERTURBATION = 0.02
"""Of a tensor's own size; of 1 where it is all zero."""
SCALES = 16
"""How often a gradient that overflows in float16 is scaled by half."""
FAR = 10.0
"""How far a tensor without a gradient is moved."""
NOISE = 8.0
"""Times what rounding did to the loss in three tries: no such move is told by less."""


TOLERANCES = {
    "float32": Tolerance(1e-6, 2.0**-24, 0.8, 1.25, 1e-3),
    "bfloat16": Tolerance(1e-4, 2.0**-9, 0.5, 2.0, 0.1),
    "float16": Tolerance(1e-4, 2.0**-12, 0.5, 2.0, 0.1),
}


def tolerance_of(model: Model, config: Config) -> Tolerance:
    """The tolerance of the coarsest numbers in a pass: autocast's, or the base's own."""
    coarse = config.model.dtype != "float32" or config.model.quantization != "none"
    return TOLERANCES["bfloat16" if coarse else resolved(config.train.precision, model.device)]


def check_training(
    model: Model,
    encoded: Encoded,
    columns: frozenset[str],
    config: Config,
    round: int,
    client: int,
    penalty: Penalty | None = None,
) -> None:
    """Check what `train.fit` is about to do with the same arguments.

    Raises:
        TrainingCheckError: what is wrong, in a fixed text; what was measured is apart from it.
    """
    asked = model, encoded, columns, config, round, client, penalty
    try:
        _check(*asked)
    except RuntimeError as e:  # of torch; ours are none
        if not isinstance(e, OutOfMemory) and _passes_by_any_algorithm(*asked):
            raise TrainingCheckError(NOT_DETERMINISTIC, str(e).partition("\n")[0]) from e
        raise


NOT_DETERMINISTIC = (
    "this model trains on its device only without torch's deterministic algorithms: one of its "
    "operations has none there; set train.deterministic = false"
)


def _passes_by_any_algorithm(*asked: Any) -> bool:
    """Does the same check pass where the device need not compute the same bits each time?"""
    model, _, _, config, *_ = asked
    if is_host(model.device) or not config.train.deterministic:
        return False
    with by_any_algorithm():
        try:
            _check(*asked)
        except Exception:
            return False
    return True


def _check(
    model: Model,
    encoded: Encoded,
    columns: frozenset[str],
    config: Config,
    round: int,
    client: int,
    penalty: Penalty | None,
) -> None:
    check_rows(encoded, model.task)
    numbers = chosen(encoded, model.task)
    batch = collate(encoded, numbers)
    with untouched(model):
        live = model.trainable(columns)
        perturb(model, config.run.seed)
        check_labels(batch, model.task.scored(encoded)[numbers], model.task)
        check_losses(model, batch, config)
        with training(model, config, round, client):
            check_gradients(model, batch, live, config, penalty)
            check_parts(model, batch, live, config)
            rate = learning_rate(config, round, local_steps(len(encoded), config.train))
            check_step(model, batch, live, config, rate, penalty)


# -- the gradient ---------------------------------------------------------------------------------


def check_gradients(
    model: Model, batch: Batch, live: Live, config: Config, penalty: Penalty | None = None
) -> None:
    """Raises TrainingCheckError where the loss does not follow the weights as the gradient says.

    Where a whole column has no gradient, those of the examples may have cancelled, as in 16 bits a
    bias's do of two classes with as many rows each: then fewer are asked. Runs within `training`.
    """
    unclipped = config.train.model_copy(update={"grad_clip": 0.0})
    config = config.model_copy(update={"train": unclipped})
    if not example_losses(model, batch, config.train.precision).requires_grad:
        raise TrainingCheckError("the loss hangs on no trained tensor")
    params = [p for ps in live.values() for p in ps.values()]
    passes = steps(model, repeat(batch), live, Still(params), config, penalty)

    def loss() -> float:
        """The training loss of the weights as they are now, under the same dropout each time."""
        with own_draws(model.devices, config.run.seed):
            found = float(next(passes).loss)
        if not abs(found) < float("inf"):
            raise TrainingCheckError("the loss is not finite")
        return found

    loss()  # thrown away: it fills what would be stale in the next
    here = loss()
    for _ in range(SCALES):  # in float16, until its scaler has found a scale
        if all(p.grad is None or bool(p.grad.isfinite().all()) for p in params):
            break
        here = loss()
    gradient = {p: p.grad for p in params if p.grad is not None and bool(p.grad.any())}
    Still(params).zero_grad()  # the next pass has gradients of its own
    tolerance = tolerance_of(model, config)
    jitters = [_jittered(params, n, tolerance.jitter, loss, config.run.seed) for n in range(3)]
    gaps = [abs(x - here) for x in jitters]
    rounding = max(*gaps, tolerance.rounding * max(abs(here), 0.1))
    for name, column in _columns(live):
        if silent := [p for p in column if p not in gradient]:
            noise = NOISE * max(*gaps, 1e-6 * max(abs(here), 0.1))
            change = _change_with(name, silent, loss, here, config.run.seed)
            whole = len(silent) == len(column)
            if whole and (n := examples_in(batch)) > 1:
                passes.close()  # type: ignore[attr-defined]
                fewer = {key: x[: n - 1] for key, x in batch.items()}
                check_gradients(model, fewer, live, config, penalty)
                return
            if whole or change > noise:
                raise TrainingCheckError(
                    f"{len(silent)} of {len(column)} tensors of {name} are to train and have no "
                    "gradient",
                    f"the loss changes by {change:.1e} with them",
                )
        if moving := [p for p in column if p in gradient]:
            slope = {p: gradient[p] for p in moving}
            check_slope(name, slope, loss, rounding, tolerance, config.run.seed)
    passes.close()  # type: ignore[attr-defined]


def _jittered(
    params: Sequence[nn.Parameter], n: int, size: float, loss: Callable[[], float], seed: int
) -> float:
    """The loss of weights that differ by about what rounding makes of them."""
    home = {p: p.detach().clone() for p in params}
    try:
        with torch.no_grad():
            for i, p in enumerate(params):
                p.add_(size * p * noise_like(p, f"jitter {n}", i, seed))
        return loss()
    finally:
        put_back(home)


def _columns(live: Live) -> Iterator[tuple[str, list[nn.Parameter]]]:
    """A, B and R each as a whole; every other tensor by itself."""
    for column, ps in live.items():
        if column == "other":
            yield from ((name, [p]) for name, p in ps.items())
        else:
            yield column, [*ps.values()]


def _change_with(
    name: str, params: Sequence[nn.Parameter], loss: Callable[[], float], here: float, seed: int
) -> float:
    """How far the loss moves with tensors that have no gradient."""
    direction = {p: noise_like(p, name, i, seed) * size_of(p) for i, p in enumerate(params)}
    with moved(direction, FAR):
        return abs(loss() - here)


def perturb(model: Model, seed: int) -> None:
    """Move every factor and trained tensor by a little noise, so that none is zero."""
    with torch.no_grad():
        for column, ps in model.live().items():
            for name, p in ps.items():
                noise = PERTURBATION * noise_like(p, f"{column}/{name}", 0, seed) * size_of(p)
                p.add_(noise * model.masks[p] if p in model.masks else noise)


# -- the step -------------------------------------------------------------------------------------

SIGNIFICANT = 1e-4
"""Of the largest gradient: what is smaller need not move a float32 number."""


def check_step(
    model: Model,
    batch: Batch,
    live: Live,
    config: Config,
    rate: float,
    penalty: Penalty | None = None,
) -> None:
    """Raises TrainingCheckError where the real optimiser moves other tensors than it must.

    Runs within `training`.
    """
    optimizer = build_optimizer(live, config.train, rate)
    with moves_exactly(model, live, rate):
        for _ in steps(model, [batch], live, optimizer, config, penalty):
            pass


@contextmanager
def moves_exactly(model: Model, live: Live, rate: float) -> Iterator[None]:
    """Raises TrainingCheckError where what happens within it moves other tensors than `live`.

    A tensor whose gradient is next to nothing need not move.
    """
    named = {p: f"{c} of {name}" for c, ps in live.items() for name, p in ps.items()}
    frozen = {name: p for name, p in model.peft.named_parameters() if p not in named}
    wrapped = {x.stack for x in model.adapted.values() if isinstance(x, Expert)}
    states = {name: _state(p, p in wrapped) for name, p in frozen.items()}
    before = {p: _digest(p) for p in named}  # a copy would be one adapter more beside its moments
    yield
    for name, p in frozen.items():
        if _state(p, p in wrapped) != states[name]:
            raise TrainingCheckError(f"a step changed {name}, which is not to train")
    sizes = {p: 0.0 if p.grad is None else float(p.grad.abs().max()) for p in named}
    for p, name in named.items():
        if sizes[p] > SIGNIFICANT * max(sizes.values()) and _digest(p) == before[p]:
            raise TrainingCheckError(
                f"a step left {name} as it was, though it has a gradient: another set of "
                "parameters is optimised, or the learning rate is too small for its numbers",
                f"learning rate {rate:g}",
            )


def _digest(p: Tensor) -> bytes:
    """Of a tensor's bits."""
    bits = on_host(p).contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(bits.numpy().data).digest()


def _state(p: Tensor, wrapped: bool) -> float:
    """A number that changes when the tensor does.

    Its version, which any writing counts up; but PEFT counts up that of a stack of experts in every
    forward, without writing, so of those the sum.
    """
    return float(wide_on_host(p).sum()) if wrapped else p._version


@contextmanager
def untouched(model: Model) -> Iterator[None]:
    """Whatever happens within it, the model is as before: weights, flags, caches, mode."""
    weights = {p: p.detach().clone() for ps in model.live().values() for p in ps.values()}
    flags = {p: p.requires_grad for p in [*model.peft.parameters(), *weights]}
    modes = {m: m.training for m in model.peft.modules()}  # PEFT's own is not always its parts'
    prefix = model.prefix and model.prefix.snapshot()
    try:
        yield
    finally:
        with torch.no_grad():
            for p, w in weights.items():
                p.copy_(w)
        for p, flag in flags.items():
            p.grad = None
            p.requires_grad_(flag)
        for m, mode in modes.items():
            m.training = mode
        if model.prefix and prefix:
            model.prefix.restore(prefix)
