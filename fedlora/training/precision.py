"""The precision of a forward pass: float32, or bfloat16 or float16 products by autocast.

    with autocast(config.train.precision, model.device):
        logits = model.logits(inputs)          one forward pass, and nothing else

Weights, gradients, optimiser and everything that travels are float32 either way.

Autocast never caches here. Its cache holds the bfloat16 copies of trained weights for as long as
the outermost block lasts: a block around a training loop computes every step with the weights of
the first. Without it each use casts the weight as it is then, which costs one cast of a small
tensor.

float16 has 5 bits of exponent, so small gradients would be zero: `scaler` multiplies the loss, and
divides them again before anything looks at them.
"""

import functools
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, cast

import torch

from fedlora.training.devices import HOST, in_dtype, is_host, lacks_bfloat16, name_of

Precision = Literal["float32", "bfloat16", "float16"]

ISA_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Where a user tells oneDNN, which computes torch's products, how far it may go."""

WITHOUT_BFLOAT16 = (
    "SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI",
)  # fmt: skip
"""oneDNN's instruction sets that emulate a bfloat16 product, 2 to 14 times slower than float32."""


@contextmanager
def autocast(precision: str, device: torch.device) -> Iterator[None]:
    """Within it, a forward pass computes in train.precision. Nothing in it outlives its use."""
    with in_dtype(device, getattr(torch, resolved(precision, device))):
        yield


def scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """What keeps small gradients from becoming 0 in float16; elsewhere it does nothing.

    A step whose gradients overflow is left out, and the next is scaled by half as much.
    """
    return torch.amp.GradScaler(device.type, enabled=resolved(precision, device) == "float16")


def resolved(precision: str, device: torch.device = HOST) -> Precision:
    """The precision to use there: "auto" is bfloat16 where torch has native products."""
    if precision == "auto":
        return "bfloat16" if lacking(device) is None else "float32"
    return cast(Precision, precision)


def lacking(device: torch.device = HOST) -> str | None:
    """Why bfloat16 is not native to what torch will really use there; None where it is.

    Follows from the processor or card and the environment alone, so that every process of a
    machine, and a resumed run, comes to the same answer.
    """
    if not is_host(device):
        return lacks_bfloat16(device)
    if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return "this processor has neither AVX512-BF16 nor AMX"
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return "this torch computes without oneDNN"
    for variable in ISA_VARIABLES:
        if (value := os.environ.get(variable, "")).upper() in WITHOUT_BFLOAT16:
            return f"{variable} = {value}"
    if (used := torch.backends.cpu.get_cpu_capability()) != "AVX512":
        return f"torch uses {used}, as ATEN_CPU_CAPABILITY may say"
    return None


def computing(precision: str, device: torch.device = HOST) -> str:
    """What decides the bits of a product there, as one word for each: for logs and records."""
    where = _processor() if is_host(device) else name_of(device)
    return f"{resolved(precision, device)}, torch {torch.__version__}, {where}"


def _processor() -> str:
    variables = (f"{v}={os.environ[v]}" for v in ISA_VARIABLES if v in os.environ)
    return " ".join([platform.machine(), torch.backends.cpu.get_cpu_capability(), *variables])


def described(precision: str, device: torch.device = HOST) -> str:
    """The resolved precision and the reason for it, as one line for a log."""
    chosen = resolved(precision, device)
    if precision != "auto":
        return f"precision: {chosen}"
    why = lacking(device) or "torch multiplies bfloat16 natively"
    return f"precision: {chosen} (train.precision = 'auto'; {why})"


@functools.cache
def slowdown(rows: int = 512, width: int = 256, seconds: float = 0.02) -> float:
    """A bfloat16 product's time over a float32 one's on one thread; measured in about 50 ms."""

    def best(dtype: torch.dtype) -> float:
        x, W = torch.ones(rows, width, dtype=dtype), torch.ones(width, width, dtype=dtype)
        x @ W  # the first call sets things up
        found, until = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < until:
            begun = time.perf_counter()
            x @ W
            found = min(found, time.perf_counter() - begun)
        return found

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return best(torch.bfloat16) / best(torch.float32)
    finally:
        torch.set_num_threads(before)
