"""Noise and sampling that nobody can predict: AES-256-CTR, keyed by the operating system.

Formal guarantee
    `gaussians` are Box-Muller transforms of 53-bit uniforms in float64: the largest is
    sqrt(-2 ln 2^-53) = 8.57, reached with probability 2^-53. (A float32 Box-Muller ends at 5.77,
    and a released value beyond it would prove an example's presence.)
    Two `Chance` objects share no stream unless both are reproducible and of equal name.

Edge cases
    a forked process      make a new `Chance` for each round: a copy would repeat the stream
    reproducible          the stream follows from (seed, round, client, purpose), which the server
                          knows: no privacy at all. Only under privacy.insecure-reproducible-noise

What is not done: a discrete Gaussian. Attacks on the low bits of floating-point noise (Mironov
2012, Haney et al. 2022) are met by rounding the noised sum, in `mechanism`; that is a mitigation,
not a proof.
"""

import hashlib
import os

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor


class Chance:
    """One stream of uniforms and Gaussians."""

    def __init__(self, key: bytes | None = None) -> None:
        """`key`: 32 bytes; by default fresh from the system."""
        cipher = Cipher(algorithms.AES(key or os.urandom(32)), modes.CTR(bytes(16)))
        self._stream = cipher.encryptor()

    @classmethod
    def reproducible(cls, seed: int, round: int, client: int, purpose: str) -> "Chance":
        """A stream that anyone who knows these can draw as well: for experiments, not privacy."""
        name = f"fedlora insecure/{seed}/{round}/{client}/{purpose}"
        return cls(hashlib.sha256(name.encode()).digest())

    def _integers(self, n: int) -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
        return np.frombuffer(self._stream.update(bytes(8 * n)), dtype="<u8") >> np.uint64(11)

    def words(
        self, n: int, dtype: "np.dtype[np.unsignedinteger]"
    ) -> "np.ndarray[tuple[int], np.dtype[np.unsignedinteger]]":
        """n unsigned integers, uniform over all that the dtype holds."""
        return np.frombuffer(self._stream.update(bytes(dtype.itemsize * n)), dtype=dtype)

    def uniforms(self, n: int) -> Tensor:
        """n numbers of [0, 1), multiples of 2^-53, float64."""
        return torch.from_numpy(self._integers(n) * 2.0**-53)

    def gaussians(self, n: int) -> Tensor:
        """n standard normal numbers, float64."""
        half = (n + 1) // 2
        radius = np.sqrt(-2.0 * np.log((self._integers(half) + np.uint64(1)) * 2.0**-53))
        angle = self._integers(half) * (2.0**-53 * 2.0 * np.pi)
        z = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:n]
        return torch.from_numpy(z)

    def seed(self) -> int:
        """A seed for a generator of another library, such as dropout's."""
        return int(self._integers(1)[0])
