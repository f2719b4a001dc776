"""This machine's cores, free memory and speed, measured in a few milliseconds."""

import os
import time
from functools import cache

import psutil
import torch

from fedlora.training.precision import lacking


def facts() -> dict[str, int | float | bool]:
    """Cores, free memory in MB, matrix speed in GFLOP/s, and if bfloat16 products are native."""
    return {
        "cores": os.cpu_count() or 1,
        "memory-mb": int(psutil.virtual_memory().available // 2**20),
        "gflops": speed(),
        "bfloat16": lacking() is None,
    }


@cache
def speed(size: int = 256, seconds: float = 0.02) -> float:
    """Billions of float32 operations a second of matrix products on one thread: the best of many.

    The best, since what else runs here only ever makes it slower.
    """
    x = torch.ones(size, size)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.mm(x, x)  # the first call sets things up
        best, until = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < until:
            begun = time.perf_counter()
            torch.mm(x, x)
            best = min(best, time.perf_counter() - begun)
    finally:
        torch.set_num_threads(threads)
    return round(2 * size**3 / best / 1e9, 1) if best < float("inf") else 0.0
