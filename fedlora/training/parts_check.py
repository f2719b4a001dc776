"""A part of the training check: a step of several batches is of the mean over all of their rows."""

from collections.abc import Sequence

from torch import nn

from fedlora.config.reader import Config
from fedlora.errors import TrainingCheckError
from fedlora.training.data.batches import Batch, examples_in
from fedlora.training.devices import wide_on_host
from fedlora.training.model.model import Model
from fedlora.training.optimizers import Live
from fedlora.training.train import steps


class Still:
    """In the optimiser's place: leaves the gradient where it is, and the weights too."""

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        self.params = params
        self.param_groups = [{"params": [*params]}]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self.params:
            p.grad = None

    def step(self) -> None:
        pass


def check_parts(model: Model, batch: Batch, live: Live, config: Config) -> None:
    """Raises TrainingCheckError where a step of several batches is not of the mean over its rows.

    Where train.gradient-accumulation-steps is 1 there is nothing to see. The batch is cut so that
    its parts differ in size: a mean of their means would be another. Runs within `training`.
    """
    if (n := examples_in(batch)) < 2 or config.train.gradient_accumulation_steps < 2:
        return
    changes = {"microbatch": n - 1, "grad_clip": 0.0, "prox": 0.0}
    config = config.model_copy(update={"train": config.train.model_copy(update=changes)})
    params = [p for ps in live.values() for p in ps.values()]
    (step,) = steps(model, [batch], live, Still(params), config)
    mean = float(wide_on_host(step.losses).mean())
    Still(params).zero_grad()
    if not abs(float(step.loss) - mean) <= 1e-5 * max(abs(mean), 0.1):
        raise TrainingCheckError(
            "the loss of a step of several batches is not the mean over their rows",
            f"it is {float(step.loss):.6g}, the mean is {mean:.6g}",
        )
