"""Tensors in 8 or 4 bits: one float32 scale a row, and integers of that row's step.

Rows are taken along the longer side: those of A are (r, k)'s, those of B are its columns, so a
scale is one rank's and costs nothing beside its integers.

    step_i = max_j |x_ij| / Q        Q = 127 or 7
    q_ij   = floor(x_ij / step_i + u_ij),  u uniform in [0, 1) from the generator

so that E[step q] = x (stochastic rounding: QSGD, Alistarh et al. 2017, arXiv:1610.02132, with the
row's maximum in place of its norm), and |step q - x| < step. Without a generator u = 1/2, which
is rounding to nearest, and |step q - x| <= step / 2. A row that holds NaN or Inf comes back as
NaN, so that who receives it can tell. Layout: the scales, then the integers, row by row; 4-bit
ones two a byte, low half first.
"""

import math

import torch
from torch import Tensor

LEVELS = {"int8": 127, "int4": 7}


def size(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of a tensor of this shape."""
    n = math.prod(shape)
    return 4 * _rows(shape) + (n if dtype == "int8" else (n + 1) // 2)


def quantize(x: Tensor, dtype: str, generator: torch.Generator | None = None) -> bytes:
    """Scales and integers; stochastic with a generator, to nearest without."""
    levels = LEVELS[dtype]
    wide = _long(x.detach().to(torch.float32))
    scale = wide.abs().amax(dim=1, keepdim=True) / levels  # (rows, 1)
    u = torch.full_like(wide, 0.5) if generator is None else _uniform(wide, generator)
    q = torch.floor(wide / scale.clamp(min=1e-38) + u).nan_to_num(0.0).clamp(-levels, levels)
    raw = q.to(torch.int8).reshape(-1)
    if dtype == "int4":
        if raw.numel() % 2:
            raw = torch.cat([raw, raw.new_zeros(1)])
        raw = (raw[0::2] & 0x0F) | (raw[1::2] << 4)
    scales = scale.where(scale.isfinite(), torch.nan)
    return bytes(scales.reshape(-1).numpy().tobytes() + raw.contiguous().numpy().tobytes())


def dequantize(data: bytes, shape: tuple[int, ...], dtype: str) -> Tensor:
    """Float32. The data must be `size` bytes, which is for the caller to check."""
    rows, n = _rows(shape), math.prod(shape)
    scale = torch.frombuffer(bytearray(data[: 4 * rows]), dtype=torch.float32)
    raw = torch.frombuffer(bytearray(data[4 * rows :]), dtype=torch.int8)
    if dtype == "int4":
        low, high = (raw << 4) >> 4, raw >> 4  # arithmetic shifts keep the sign
        raw = torch.stack([low, high], dim=1).reshape(-1)[:n]
    x = raw.to(torch.float32).reshape(rows, -1) * scale[:, None]
    return x.T.contiguous() if _tall(shape) else x.reshape(shape)


def _rows(shape: tuple[int, ...]) -> int:
    if _tall(shape):
        return shape[1]
    return shape[0] if len(shape) > 1 else 1


def _tall(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and shape[0] > shape[1] > 0


def _long(x: Tensor) -> Tensor:
    return x.T if _tall(tuple(x.shape)) else x.reshape(_rows(tuple(x.shape)), -1)


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(like.shape, generator=generator)
