"""What one client's training takes of a device's memory, measured on two made-up batches.

    frozen        the base's weights, once for all clients of a process
    trained       factors and heads, their gradients and the optimiser's states
    activations   what a pass of the longest examples needs beside these: of one, of each more

On a card the passes' peak is what torch counted there. On the host, and on Apple's cards, torch
counts none: it is what the forward pass keeps for the backward pass, without what comes and goes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.config.reader import Config
from fedlora.training.data.batches import Batch, collate
from fedlora.training.devices import counts_memory, forget_most, most_used, release
from fedlora.training.model.alora import invocation
from fedlora.training.model.decoder import as_read
from fedlora.training.model.model import Model
from fedlora.training.model.quantized import bytes_of
from fedlora.training.optimizers import state_bytes
from fedlora.training.train import example_losses, training
from fedlora.training.training_check import untouched

COLUMNS = frozenset({"A", "B", "R", "other"})


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes."""

    frozen: int
    trained: int
    first: int
    """Activations of one example of the most tokens."""
    more: int
    """And of each further one."""

    def activations(self, examples: int) -> int:
        return self.first + self.more * (examples - 1)

    def of(self, examples: int) -> int:
        """All of it, with so many examples in memory at once."""
        return self.frozen + self.trained + self.activations(examples)

    def fitting(self, memory: int) -> int:
        """The most examples that fit into so many bytes; 0: not one."""
        left = memory - self.of(1)
        return 0 if left < 0 else 1 + left // max(self.more, 1)


def footprint(model: Model, config: Config) -> Footprint:
    """Measured on the loaded model, which is as before afterwards."""
    with untouched(model):
        live = {p for ps in model.trainable(COLUMNS).values() for p in ps.values()}
        numbers = sum(p.numel() for p in live)
        frozen = sum(bytes_of(p) for p in model.peft.parameters() if p not in live)
        # not counted: a first product also takes what its library works in, for good
        _pass(model, config, 1)
        one, two = (_pass(model, config, n) for n in (1, 2))
    for device in model.devices:
        release(device)
    trained = 8 * numbers + sum(state_bytes(p.numel(), config.train) for p in live)
    return Footprint(frozen, trained, one, max(0, two - one))


def _pass(model: Model, config: Config, n: int) -> int:
    """What n examples take."""
    batch = _longest(model, config, n)
    kept: dict[int, int] = {}
    counted = all(map(counts_memory, model.devices))
    weights = {id(p) for p in model.peft.parameters()}

    def keep(x: Tensor) -> Tensor:
        if not counted and id(x) not in weights:
            storage = x.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    for device in model.devices:
        release(device)
        forget_most(device)
    before = sum(map(most_used, model.devices))
    with training(model, config, 0, 0):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = example_losses(model, batch, config.train.precision).sum()
        loss.backward()
    for p in model.peft.parameters():
        p.grad = None
    return sum(map(most_used, model.devices)) - before if counted else sum(kept.values())


def _longest(model: Model, config: Config, n: int) -> Batch:
    """A batch of n examples of as many tokens as an example of this config can have."""
    ends = invocation(config.model, config.lora.invocation) if model.form.after else []
    rows = as_read(model, model.task.made_up(model.tokenizer, model.labels, ends=ends))
    one = collate(rows, torch.tensor([len(rows) - 1]))
    length = model.longest(config.data.max_length)
    tokens = {k: x for k, x in one.items() if x.ndim > 1 and not x.is_floating_point()}
    wide = {k: x.repeat(1, length)[:, -length:] for k, x in tokens.items()}
    return {k: wide.get(k, x).repeat(n, *[1] * (x.ndim - 1)) for k, x in one.items()}
