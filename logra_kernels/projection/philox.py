"""Philox4x64-10 (Salmon et al. 2011), the same bits on every device: NumPy's stream, or integer products in torch.

counter c = (n + 1, 0, 0, 0) for words 4n .. 4n + 3;  ten rounds of
c := (hi(M1 c2) ^ c1 ^ k0,  lo(M1 c2),  hi(M0 c0) ^ c3 ^ k1,  lo(M0 c0)),   k := k + W
"""

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

_M = 0xD2E7470EE14C6C93, 0xCA5A826395121157
_W = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
_LOW = 0xFFFFFFFF
HOST = "cpu"  # the device that NumPy's own stream serves


def words(stream: str, count: int, device: torch.device) -> Tensor:
    """The first words of the stream that belongs to a name, [count] int64, on the device."""
    return next(parts(stream, [count], device))


def parts(stream: str, counts: Iterable[int], device: torch.device) -> Iterator[Tensor]:
    """The stream's words, `counts` at a time; all counts but the last must be multiples of 4."""
    key = np.frombuffer(hashlib.sha256(stream.encode()).digest()[:16], dtype="<u8").astype(np.uint64)
    if device.type == HOST:
        numpy = np.random.Philox(key=key)
        yield from (torch.from_numpy(numpy.random_raw(count).view(np.int64)) for count in counts)
        return
    first = 0
    for count in counts:
        yield by_products(key, first, count, device)
        first += count


def by_products(key: np.ndarray, first: int, count: int, device: torch.device) -> Tensor:
    """NumPy's words first .. first + count - 1 by torch's integer products; `first` is a multiple of 4."""
    zero = torch.zeros(-(-count // 4), dtype=torch.int64, device=device)
    c = [torch.arange(1, len(zero) + 1, dtype=torch.int64, device=device) + first // 4, zero, zero, zero]
    k0, k1 = (int(k) for k in key)
    for _ in range(10):
        high0, low0 = _product(_M[0], c[0])
        high1, low1 = _product(_M[1], c[2])
        c = [high1 ^ c[1] ^ _signed(k0), low1, high0 ^ c[3] ^ _signed(k1), low0]
        k0, k1 = (k0 + _W[0]) % 2**64, (k1 + _W[1]) % 2**64
    return torch.stack(c, dim=1).flatten()[:count]


def _product(m: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """(high, low) words of the 128-bit product of unsigned m and x; the four 32-bit products fit 64 bits each."""
    m_low, m_high = m & _LOW, m >> 32
    x_low, x_high = x & _LOW, (x >> 32) & _LOW
    middle = ((x_low * m_low) >> 32 & _LOW) + (x_high * m_low & _LOW) + (x_low * m_high & _LOW)
    high = x_high * m_high + (x_high * m_low >> 32 & _LOW) + (x_low * m_high >> 32 & _LOW) + (middle >> 32)
    return high, x * _signed(m)


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word
