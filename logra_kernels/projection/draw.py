"""Random factors: functions of the seed, the layer's name and the side alone, so a fingerprint is enough to have them.

    orthonormal   Gaussian rows, orthonormalised                     P P^T = I
    gaussian      N(0, 1/k)                                          E[P^T P] = I
    rademacher    +-1/sqrt(k)                                        E[P^T P] = I
    kaiming       LogIX's initialisation, U(+-1/sqrt(d)) for P_in and U(+-1/sqrt(k)) for P_out
    mask          sqrt(d/k) times k different unit vectors           E[P^T P] = I
    sjlt          s entries +-1/sqrt(s) in every column (Kane & Nelson 2014)     E[P^T P] = I

The last two are what FactGraSS (Hu et al. 2025) projects each side with. All are made on the device, and are the same
bits on every one: of integers, of fp64 operations that IEEE 754 defines to the last bit (`normal`), and of matrix
products in which nothing is rounded (`orthonormal`).
"""

import math

import torch
from torch import Tensor

from logra_kernels.projection.normal import BOUND, normals, uniform
from logra_kernels.projection.orthonormal import orthonormalise
from logra_kernels.projection.philox import words

GENERATOR = 1  # raised when the same settings would give factors that differ by more than fp32's last bit
DRAWN = ("orthonormal", "gaussian", "rademacher", "kaiming", "mask", "sjlt")
_CPU = torch.device("cpu")
_WITHOUT_FP64 = ("meta", "mps")  # devices whose factors are made on the host


def draw(
    kind: str, seed: int, name: str, side: str, k: int, dim: int, nonzeros: int = 1, device: torch.device = _CPU
) -> Tensor:
    """A random factor [k, dim], fp32, on the device."""
    if device.type in _WITHOUT_FP64:
        return draw(kind, seed, name, side, k, dim, nonzeros).to(device)
    stream = f"{seed}/{name}/{side}"
    if kind == "rademacher":
        return _signs(words(stream, k * dim, device) < 0, k).reshape(k, dim)
    if kind == "kaiming":
        bound = 1 / math.sqrt(dim if side == "in" else k)
        return ((uniform(words(stream, k * dim, device)) * 2 - 1) * bound).float().reshape(k, dim)
    if kind == "mask":
        chosen = words(stream, dim, device).argsort(stable=True)[:k].sort().values
        return torch.zeros(k, dim, device=device, dtype=torch.float32).scatter_(1, chosen[:, None], math.sqrt(dim / k))
    if kind == "sjlt":
        return _sparse(stream, k, dim, min(nonzeros, k), device)
    normal = normals(stream, k * dim, device).reshape(k, dim)
    return (orthonormalise(normal, BOUND) if kind == "orthonormal" else normal.mul_(1 / math.sqrt(k))).float()


def _sparse(stream: str, k: int, dim: int, s: int, device: torch.device) -> Tensor:
    """The k rows are cut into s parts, as even as they can be; a column has one entry in each."""
    raw = words(stream, s * dim, device).reshape(s, dim)
    edges = torch.arange(s + 1, device=device) * k // s
    start, size = edges[:-1, None], (edges[1:] - edges[:-1])[:, None]
    row = start + (((raw >> 32) & 0xFFFFFFFF) * size >> 32)
    return torch.zeros(k, dim, device=device, dtype=torch.float32).scatter_(0, row, _signs((raw & 1) == 1, s))


def _signs(positive: Tensor, count: int) -> Tensor:
    """+-1/sqrt(count), fp32."""
    value = 1 / math.sqrt(count)
    return (positive.double() * (2 * value) - value).float()
