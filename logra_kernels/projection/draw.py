"""Random factors: functions of the seed, the layer's name and the side alone, so a fingerprint is enough to have them.

    orthonormal   Gaussian rows, orthonormalised                     P P^T = I
    gaussian      N(0, 1/k)                                          E[P^T P] = I
    rademacher    +-1/sqrt(k)                                        E[P^T P] = I
    kaiming       LogIX's initialisation, U(+-1/sqrt(d)) for P_in and U(+-1/sqrt(k)) for P_out
    mask          sqrt(d/k) times k different unit vectors           E[P^T P] = I
    sjlt          s entries +-1/sqrt(s) in every column (Kane & Nelson 2014)     E[P^T P] = I

The last two are what FactGraSS (Hu et al. 2025) projects each side with. All but the first two are made on the device,
of integers and exact scalings, and are the same bits on every one. The first two take logarithms and cosines, which
devices round differently, so they are made on the host and moved.
"""

import numpy as np
import torch
from torch import Tensor

from logra_kernels.projection.philox import words

GENERATOR = 1  # raised when the same settings would give other factors
DRAWN = ("orthonormal", "gaussian", "rademacher", "kaiming", "mask", "sjlt")
_CPU = torch.device("cpu")


def draw(
    kind: str, seed: int, name: str, side: str, k: int, dim: int, nonzeros: int = 1, device: torch.device = _CPU
) -> Tensor:
    """A random factor [k, dim], fp32, on the device."""
    stream = f"{seed}/{name}/{side}"
    if kind == "rademacher":
        return _signs(words(stream, k * dim, device) < 0, k).reshape(k, dim)
    if kind == "kaiming":
        bound = 1 / _root(dim if side == "in" else k)
        return ((_uniform(words(stream, k * dim, device)) * 2 - 1) * bound).float().reshape(k, dim)
    if kind == "mask":
        chosen = words(stream, dim, device).argsort(stable=True)[:k].sort().values
        return torch.zeros(k, dim, device=device, dtype=torch.float32).scatter_(1, chosen[:, None], _root(dim / k))
    if kind == "sjlt":
        return _sparse(stream, k, dim, min(nonzeros, k), device)
    normal = normals(stream, k * dim).reshape(k, dim) / np.sqrt(k)
    if kind == "orthonormal":
        q, r = np.linalg.qr(normal.T)
        normal = (q * np.sign(np.diag(r))).T  # the sign makes the factorisation unique
    return torch.from_numpy(np.ascontiguousarray(normal, dtype=np.float32)).to(device)


def normals(stream: str, count: int) -> np.ndarray:
    """The first standard normal variates of a stream, [count] fp64.

    Box-Muller on two streams of words: NumPy promises its raw streams, but not its normal variates, for ever.
    """
    u, v = (_uniform(words(s, count, _CPU)).numpy() for s in (stream, f"{stream}/angle"))
    return np.sqrt(-2.0 * np.log(u)) * np.cos(2.0 * np.pi * v)


def _sparse(stream: str, k: int, dim: int, s: int, device: torch.device) -> Tensor:
    """The k rows are cut into s parts, as even as they can be; a column has one entry in each."""
    raw = words(stream, s * dim, device).reshape(s, dim)
    edges = torch.arange(s + 1, device=device) * k // s
    start, size = edges[:-1, None], (edges[1:] - edges[:-1])[:, None]
    row = start + (((raw >> 32) & 0xFFFFFFFF) * size >> 32)
    return torch.zeros(k, dim, device=device, dtype=torch.float32).scatter_(0, row, _signs((raw & 1) == 1, s))


def _signs(positive: Tensor, count: int) -> Tensor:
    """+-1/sqrt(count), fp32."""
    value = 1 / _root(count)
    return (positive.double() * (2 * value) - value).float()


def _uniform(raw: Tensor) -> Tensor:
    """(0, 1) fp64 of the upper 53 bits; every step is exact."""
    return (((raw >> 11) & (2**53 - 1)).double() + 0.5) * 2.0**-53


def _root(value: float) -> float:
    return float(np.sqrt(value))
