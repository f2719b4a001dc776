"""LoftQ: initial adapters that cancel most of the rounding error of a 4-bit base.

Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization", https://arxiv.org/abs/2310.08659

    Q = NF4(W0),   s B A = the leading part of SVD(W0 - Q),   sqrt of its values to each side

One step of the paper's alternation, as PEFT's default is. PEFT's own code asks for a GPU and for
bitsandbytes, and leaves s out, so the few lines are here:

    model.quantization = "4bit"    Q is the base as bitsandbytes holds it; W0 is read once more from
                                   the files, at the server, and let go
    a float base                   Q is computed here, and Q - W0 travels once, dense (d, k), as
                                   what PiSSA takes out does: all clients hold the same bits of Q

Training starts near W0, not from it: what A and B of the largest rank leave out stays rounded.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedlora.config.sections import ModelConfig
from fedlora.lora.adapter import Pair
from fedlora.strategies.base import Layer
from fedlora.training.model.loading import load_base

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
"""The 16 values of NormalFloat-4: Dettmers et al., https://arxiv.org/abs/2305.14314, appendix E."""

BLOCK = 64
"""Weights in a row that share a scale, their largest magnitude."""


def nf4(W: Tensor) -> Tensor:
    """W (d, k) rounded to 4 bits and back, in float32: elementwise, so equal on every machine."""
    code = torch.tensor(NF4)
    flat = W.detach().float().reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    top = blocks.abs().amax(1, keepdim=True)
    nearest = torch.bucketize(blocks / top.clamp(min=1e-30), (code[1:] + code[:-1]) / 2)
    return (code[nearest] * top).view(-1)[: len(flat)].view(W.shape)


def pair(W: Tensor, Q: Tensor, layer: Layer) -> Pair:
    """The pair of the layer's rank and scale nearest to W - Q (d, k)."""
    U, S, Vh = torch.linalg.svd(W.float() - Q.float(), full_matrices=False)
    r, root = layer.rank, (S / layer.scale).sqrt()[: layer.rank]
    A, B = root[:, None] * Vh[:r], U[:, :r] * root  # (r, k), (d, r)
    return Pair(A.contiguous(), B.contiguous(), layer.scale)


def pairs(
    base: Mapping[str, Tensor], config: ModelConfig, layers: Mapping[str, Layer], seed: int
) -> dict[str, Pair]:
    """What A and B begin with, by module, over this base (W0, or what 4 bits made of it)."""
    if config.quantization == "none":
        return {m: pair(base[m], nf4(base[m]), x) for m, x in layers.items()}
    whole = load_base(config.model_copy(update={"quantization": "none"}), ("0", "1"), seed)
    return {m: pair(whole.get_submodule(m).weight, base[m], x) for m, x in layers.items()}
