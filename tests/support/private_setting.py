"""A tiny model with factors worth differentiating, and gradients the slow way to compare with."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fedlora.config.reader import Config
from fedlora.lora.adapter import Factors
from fedlora.strategies.base import Client, Round, Start
from fedlora.training import cache
from fedlora.training.data.batches import Encoded, collate
from fedlora.training.model.inner_factor import inside
from fedlora.training.model.model import Model
from fedlora.training.train import example_losses


class Setting:
    """A client's model, loaded with what its strategy sends in round 1, B moved away from 0."""

    def __init__(
        self, given: dict[str, object], dtype: torch.dtype = torch.float64, rank: int = 3
    ) -> None:
        self.config = Config.read(given)
        self.precision = "float32"
        self.labels = cache.corpus(self.config).labels
        self.model = Model(self.config, self.labels)
        self.model.peft.to(dtype)
        self.rows: Encoded = cache.encoded("train", 0, self.config, self.labels)
        strategy = self.config.build_strategy()
        ranks = dict.fromkeys(self.model.shapes, rank)
        client = Client(0, self.model.layers(ranks))
        first = self.model.init_factors(client, 0)
        state = strategy.init(Start(first, [client], self.model.weights()))
        came = strategy.download(state, client, Round(1, 0))
        self.columns = came.trainable
        self.block = came.block
        self.load(strategy.start(came, Factors(), client, Round(1, 0)), dtype)

    def load(self, factors: Factors, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(1)

        def moved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            noise = {m: torch.randn(x.shape, generator=generator) for m, x in tensors.items()}
            return {m: (x + 0.1 * noise[m]).to(dtype) for m, x in tensors.items()}

        B, R, other = (moved(dict(getattr(factors, c))) for c in ("B", "R", "other"))
        if self.block:
            R = {m: x * inside(x, self.block) for m, x in R.items()}
        A = {m: x.to(dtype) for m, x in factors.A.items()}
        self.model.load(Factors(factors.scale, A, B, R, other), self.block)
        self.live = self.model.trainable(self.columns)
        self.params = tuple(p for ps in self.live.values() for p in ps.values())

    def losses(self, numbers: list[int]) -> Tensor:
        return example_losses(self.model, collate(self.rows, torch.tensor(numbers)), self.precision)

    def one_by_one(self, numbers: list[int]) -> list[dict[nn.Parameter, Tensor]]:
        """Each example's gradient by PyTorch alone, in a batch of its own."""
        found = []
        for i in numbers:
            self.losses([i]).sum().backward()
            found.append({p: p.grad for p in self.params if p.grad is not None})
            for p in self.params:
                p.grad = None
        return found


def norm(gradient: dict[nn.Parameter, Tensor]) -> float:
    return float(sum(g.double().square().sum() for g in gradient.values()) ** 0.5)


Build = Callable[..., dict[str, object]]
