"""The training check, with and without DP: on a client's own rows, or on synthetic ones.

Under example-level DP no private row may be looked at without noise, so the check takes rows of
random token ids. On them the plain loop is checked as ever, and then one private step without
noise and with a clip that nothing reaches is compared with the plain step: the per-example
gradients must add up to the gradient, and the optimiser move the same tensors.

Formal guarantee: under privacy.level = "example" nothing here depends on a row of a client, but
for whether there are any; the ledger is not touched.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedlora.config.reader import Config
from fedlora.errors import TrainingCheckError
from fedlora.lora.adapter import Factors
from fedlora.privacy.chance import Chance
from fedlora.privacy.microbatch import microbatches
from fedlora.privacy.per_example import kept_apart
from fedlora.privacy.probe import Way, check_apart
from fedlora.privacy.training import PrivacyPlan, Ways, private_step
from fedlora.strategies.base import Client, Download, Round, State, Strategy, whole_download
from fedlora.training.data.batches import SYNTHETIC, Batch, Encoded
from fedlora.training.devices import wide_on_host
from fedlora.training.loss_check import check_losses, check_rows
from fedlora.training.model.alora import invocation
from fedlora.training.model.decoder import as_read
from fedlora.training.model.dropout import undropped
from fedlora.training.model.model import Model
from fedlora.training.optimizers import Live, build_optimizer
from fedlora.training.schedule import full_rate
from fedlora.training.train import (
    extra_loss,
    steps,
    threads,
    training,
)
from fedlora.training.training_check import (
    Still,
    check_gradients,
    check_training,
    moves_exactly,
    perturb,
    tolerance_of,
    untouched,
)

UNREACHED = 1e30
"""A clip norm that no gradient has."""


def check_before_training(
    model: Model, rows: Encoded | None, download: Download, config: Config, round: int, client: int
) -> None:
    """Check the loaded model with what it is about to train on; on synthetic rows where it must.

    rows: None where there are none to look at, as on the server of a deployment.

    Raises:
        TrainingCheckError: it would not train as it must.
    """
    args = (download.trainable, config, round, client, download.penalty)
    if config.privacy.by_example:
        if rows is not None:
            check_rows(rows, model.task)
        check_private(model, download, config, round, client)
    else:
        check_training(model, made_up(model) if rows is None else rows, *args)


def check_first(
    model: Model,
    strategy: Strategy[State],
    state: State,
    client: Client,
    rows: Encoded | None,
    config: Config,
    round: int,
) -> None:
    """The check of a newcomer's model as `state` sends it, on the base as it is now.

    Leaves the model loaded with it.

    Raises:
        TrainingCheckError: it would not train as it must.
    """
    now = Round(round, config.run.seed)
    came = whole_download(strategy, state, client, now, config.ranks.absent == "fold")
    with threads(config.train.threads), model.folded(came.fold):
        model.load(strategy.start(came, Factors(), client, now), came.block)
        check_before_training(model, rows, came, config, round, client.id)


def made_up(model: Model) -> Encoded:
    """Rows of random token ids of this model's tokenizer."""
    config = model.config
    ends = invocation(config.model, config.lora.invocation) if model.form.after else []
    return as_read(model, model.task.made_up(model.tokenizer, model.labels, ends=ends))


def check_private(
    model: Model, download: Download, config: Config, round: int, client: int
) -> None:
    """The check on synthetic rows, with the private step beside the plain one."""
    rows = made_up(model)
    width = max(SYNTHETIC)
    every = torch.arange(len(rows))
    (part,) = microbatches(every, rows.widths, lambda _: len(rows) + 1, width)
    batch = {key: x[: part.real] for key, x in part.batch(rows).items()}
    ways = {width: Way(len(rows) + 1, config.train.precision)}
    train = config.train.model_copy(update={"grad_clip": 0.0, "batch_size": len(rows)})
    data = config.data.model_copy(update={"max_length": width})
    config = config.model_copy(update={"train": train, "data": data})
    with untouched(model):
        live = model.trainable(download.trainable)
        check_apart(model, live)
        perturb(model, config.run.seed)
        check_losses(model, batch, config)
        with training(model, config, round, client):
            check_gradients(model, batch, live, config, download.penalty)
        # masks and noise of the two would be of other shapes
        with training(model, _still(config), round, client), undropped(model.peft):
            want = _plain(model, batch, live, download, config)
            found = _step(model, rows, live, download, config, ways, round)
    gap, size = _distance(want, found)
    if not gap <= tolerance_of(model, config).private * size:
        raise TrainingCheckError(
            "the private step's gradient is not the plain one's, without noise and clip",
            f"off by {gap / max(size, 1e-30):.1e} of it",
        )


def _still(config: Config) -> Config:
    """The same without noise on embeddings."""
    train = config.train.model_copy(update={"neftune_noise_alpha": 0.0})
    return config.model_copy(update={"train": train})


def _plain(
    model: Model, batch: Batch, live: Live, download: Download, config: Config
) -> dict[nn.Parameter, Tensor]:
    """The gradient of one plain step, which is not taken."""
    params = [p for ps in live.values() for p in ps.values()]
    for _ in steps(model, [batch], live, Still(params), config, download.penalty):
        pass
    return {p: p.grad.clone() for p in params if p.grad is not None}


def _distance(
    want: Mapping[nn.Parameter, Tensor], found: Mapping[nn.Parameter, Tensor]
) -> tuple[float, float]:
    """How far a gradient is from the one wanted, and that one's size."""
    gap = size = 0.0
    for p, g in want.items():
        gap += float(wide_on_host(found[p] - g).square().sum())
        size += float(wide_on_host(g).square().sum())
    return gap**0.5, size**0.5


def _step(
    model: Model,
    rows: Encoded,
    live: Live,
    download: Download,
    config: Config,
    ways: Ways,
    round: int,
) -> dict[nn.Parameter, Tensor]:
    """The gradient of one private step over all of these rows, without noise and clip."""
    n, rate = len(rows), full_rate(config, round)
    plan = PrivacyPlan(n=n, q=1.0, steps=1, sigma=0.0, C=UNREACHED, delta=config.privacy.delta)
    params = tuple(p for ps in live.values() for p in ps.values())
    received = {p: p.detach().clone() for p in params}
    optimizer = build_optimizer(live, config.train, rate)
    with (
        kept_apart(model.peft, model.active, frozenset(params), model.masks) as sink,
        moves_exactly(model, live, rate),
    ):
        extra = extra_loss(model.sides, received, download.penalty, config.train.prox)
        every, chance = torch.arange(n), Chance()
        private_step(model, rows, every, params, optimizer, sink, plan, chance, config, ways, extra)
        return {p: p.grad.clone() for p in params if p.grad is not None}
