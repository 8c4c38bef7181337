"""Random factors from a counter-based generator, so that a fingerprint is enough to have them again."""

import hashlib

import numpy as np
import torch
from torch import Tensor

GENERATOR = 1  # raised when the same settings would give other factors
DRAWN = ("orthonormal", "gaussian", "rademacher")


def draw(kind: str, seed: int, name: str, side: str, k: int, dim: int) -> Tensor:
    """A random factor [k, dim], fp32, on the CPU: a function of its arguments and nothing else."""
    raw = _bits(f"{seed}/{name}/{side}", k * dim)
    if kind == "rademacher":
        p = np.where(raw >> np.uint64(63), 1.0, -1.0).reshape(k, dim) / np.sqrt(k)
    else:
        p = _normal(raw, _bits(f"{seed}/{name}/{side}/angle", k * dim)).reshape(k, dim) / np.sqrt(k)
    if kind == "orthonormal":
        q, r = np.linalg.qr(p.T)
        p = (q * np.sign(np.diag(r))).T  # the sign makes the factorisation unique
    return torch.from_numpy(np.ascontiguousarray(p, dtype=np.float32))


def _bits(stream: str, count: int) -> np.ndarray:
    """`count` uint64 of the Philox stream that belongs to the name."""
    key = np.frombuffer(hashlib.sha256(stream.encode()).digest()[:16], dtype="<u8")
    return np.random.Philox(key=key.astype(np.uint64)).random_raw(count)


def _normal(radius: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Box-Muller on two streams of uint64: NumPy promises its raw streams, but not its normal variates, for ever."""
    u, v = (((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53 for bits in (radius, angle))
    return np.sqrt(-2.0 * np.log(u)) * np.cos(2.0 * np.pi * v)
