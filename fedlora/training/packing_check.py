"""train.packing is for models that keep apart what lies in one row: measured, not known by name.

    alone         each example's loss by its definition, in float64, in a row of its own
    packed        the same from shared rows
    neighbours    and with other words in every place that is not its own

Both must agree with the packed loss. The first sees positions that run on; the second, in whatever
numbers the base has, any look at a neighbour, since what is masked adds nothing at all to a sum.
On made-up rows, as the model is loaded, and so before round 1 and by doctor too.
"""

import inspect

import torch
from torch import Tensor

from fedlora.errors import ModelError
from fedlora.training.data.batches import Batch, collate, synthetic
from fedlora.training.data.batches import alone as one
from fedlora.training.devices import wide_on_host
from fedlora.training.model.model import Model

LENGTHS = (3, 5, 6, 8, 8, 4)
"""Rows of [8], [8], [6], [5, 3], [4]: more than one row, and one that two examples share."""
SAME = 1e-5
"""Of a loss, relative: rounding in float32."""
COARSE = 0.02
"""And in the numbers of a base in 16 bits, or quantised."""


@torch.no_grad()
def check_packing(model: Model) -> None:
    """Raises ModelError where rows that examples share change what an example's loss is."""
    base = model.peft.get_base_model()
    if "position_ids" not in inspect.signature(base.forward).parameters:
        raise _refused(model, "its forward takes no positions, so none can begin anew")
    model.peft.eval()
    batch, other = (_made(model, seed) for seed in (0, 1))
    packed = _losses(model, batch)
    alone = torch.cat([model.task.defined(model, one(batch, i)) for i in range(len(packed))])
    beside = torch.cat([_losses(model, _among(batch, other, i))[i : i + 1]
                        for i in range(len(packed))])  # fmt: skip
    config = model.config.model
    wide = config.dtype == "float32" and config.quantization == "none"
    for want, size in ((beside, SAME), (alone, SAME if wide else COARSE)):
        if not float(gap := ((packed - want).abs() / want.abs()).max()) <= size:
            raise _refused(model, f"an example's loss hangs on its neighbours, by {gap:.1e} of it")


def _refused(model: Model, why: str) -> ModelError:
    return ModelError(
        f"train.packing = true: model.path = {model.config.model.path!r} does not keep examples "
        f"of one row apart ({why}); set it to false, or try another model.attention"
    )


def _made(model: Model, seed: int) -> Batch:
    rows = synthetic(model.tokenizer, 0, seed=seed, lengths=LENGTHS)
    return collate(rows, torch.arange(len(rows)))


def _among(batch: Batch, other: Batch, i: int) -> Batch:
    """Example i of the batch, among the others of another batch of the same lengths."""
    found = {key: x.clone() for key, x in other.items()}
    for key, x in batch.items():
        found[key][i] = x[i]
    return found


def _losses(model: Model, batch: Batch) -> Tensor:
    return wide_on_host(model.task.losses(model, batch))
