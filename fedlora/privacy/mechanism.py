"""Clip each example's gradient, sum, add noise once: the Gaussian mechanism of DP-SGD.

    sum_i min(1, C / |g_i|) g_i + sigma C z,   z ~ N(0, 1)          then divided by q n

Abadi et al., "Deep Learning with Differential Privacy", 2016, https://arxiv.org/abs/1607.00133

Formal guarantee
    The sum's sensitivity to adding or removing one example is at most C, over all live parameters
    together, whatever the example is. So the noised sum of a Poisson sample of rate q is a
    Poisson-subsampled Gaussian mechanism of noise multiplier sigma.

Edge cases
    empty batch                   the noise alone, and it counts as a step
    a NaN or infinite example     counts as zero
    gradients of any precision    norms in float64 of the very numbers that are summed
    micro-batches                 all of one shape for each width; sums are kept in float64, on the
                                  host whatever the model is on; noise is added there once, after
                                  the last
    floating point                an example's gradient is the same bits whoever else was sampled:
                                  microbatch.py. So adding or removing it changes the sum
                                  by its own clipped gradient, to 1e-15 of the sum. The noised sum
                                  is rounded to a grid of about 2^-24 sigma C that depends on
                                  nothing in the data, so its low bits say nothing of the addition's
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedlora.privacy.chance import Chance
from fedlora.privacy.per_example import Gradient, clipping
from fedlora.training.devices import on_host


@dataclass
class ClippedSum:
    """The clipped sum of one logical batch, taken micro-batch by micro-batch."""

    params: tuple[nn.Parameter, ...]
    C: float
    total: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    examples: int = 0
    clipped: int = 0

    def __post_init__(self) -> None:
        self.total = {p: torch.zeros(p.shape, dtype=torch.float64) for p in self.params}

    @torch.no_grad()
    def add(self, found: Mapping[nn.Parameter, Gradient], real: int | None = None) -> None:
        """The clipped gradients of one micro-batch, of which the first `real` count; None: all."""
        finite, c = clipping(found, self.C)
        real = len(c) if real is None else real
        self.examples += real
        self.clipped += int((c[:real] < 1).sum())
        c[real:] = 0
        for p, gradient in finite.items():
            self.total[p] += on_host(gradient.weighted_sum(c))

    @torch.no_grad()
    def noised(self, sigma: float, chance: Chance) -> dict[nn.Parameter, Tensor]:
        """The sum with noise of standard deviation sigma C, float64. Ends this sum's use."""
        std = sigma * self.C
        sizes = [p.numel() for p in self.params]
        noise = torch.split(chance.gaussians(sum(sizes)).mul_(std), sizes)
        out = {}
        for p, z in zip(self.params, noise, strict=True):
            out[p] = rounded(self.total.pop(p).add_(z.view(p.shape)), std)
        return out


def rounded(x: Tensor, std: float) -> Tensor:
    """x on a grid of about 2^-24 std; x itself where there is no noise."""
    if not std:
        return x
    grid = 2.0 ** (math.floor(math.log2(std)) - 24)
    return x.div_(grid).round_().mul_(grid)


def poisson(n: int, q: float, chance: Chance) -> Tensor:
    """The examples of one Poisson sample: each of n on its own with probability q."""
    return torch.nonzero(chance.uniforms(n) < q).flatten()
