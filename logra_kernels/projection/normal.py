"""Standard normal variates by Box-Muller, the same bits on every device.

    sqrt(-2 ln u) cos(2 pi v)       u, v uniform in (0, 1), from two streams of words

Devices' own ln and cos round differently. Here both are polynomials, evaluated by additions, multiplications, one
division and a square root in fp64, each a tensor operation of its own. IEEE 754 defines every bit of these, and no two
are contracted into one. What comes out is within 8e-15 of NumPy's.
"""

import math

import numpy as np
import torch
from torch import Tensor

from logra_kernels.projection.philox import parts

# ln m = s P(s^2) with s = (m - 1) / (m + 1), m in [sqrt(1/2), sqrt(2)]; relative error 2^-58
_LN = (
    2.0,
    0.6666666666666765,
    0.3999999999930234,
    0.2857142876064168,
    0.22222197056726048,
    0.18183631680229329,
    0.1531252814836419,
    0.14809710360655276,
)
# sin(pi y / 2) = y P(y^2), y in [-1, 1]; relative error 2^-54
_SIN = (
    1.5707963267948966,
    -0.6459640975062462,
    0.07969262624616565,
    -0.004681754135304255,
    0.0001604411847130916,
    -3.5988430204672576e-06,
    5.6921364280986254e-08,
    -6.684416831856085e-10,
    5.87297574479995e-12,
)
_ROOT_HALF = 0x3FE6A09E667F3BCD  # sqrt(1/2), as the bits of fp64
PIECE = {"cpu": 1 << 16, "device": 1 << 22}  # numbers made at a time: what caches hold; what memory is to spare
BOUND = 8.66  # no variate is beyond: u >= 2^-54


def normals(stream: str, count: int, device: torch.device) -> Tensor:
    """The first standard normal variates of a stream, [count] fp64, on the device."""
    found = torch.empty(count, dtype=torch.float64, device=device)
    pieces = found.split(PIECE["cpu" if device.type == "cpu" else "device"])
    counts = [len(piece) for piece in pieces]
    radius, angle = (parts(name, counts, device) for name in (stream, f"{stream}/angle"))
    for piece, u, v in zip(pieces, radius, angle, strict=True):
        piece.copy_(_box_muller(u, v))
    return found


def uniform(raw: Tensor) -> Tensor:
    """(0, 1) fp64 of the upper 53 bits of each word; (n + 1/2) 2^-53, rounded once."""
    return ((raw >> 11) & (2**53 - 1)).double().add_(0.5).mul_(2.0**-53)


def _box_muller(radius: Tensor, angle: Tensor) -> Tensor:
    """From a word each, [count] int64."""
    return _sqrt(_ln(uniform(radius)).mul_(-2.0)).mul_(_cos_turns(uniform(angle)))


def _ln(u: Tensor) -> Tensor:
    """ln of normal positive numbers: e ln 2 + ln m with u = 2^e m."""
    bits = u.view(torch.int64)
    exponent = (bits - _ROOT_HALF) >> 52
    m = (bits - (exponent << 52)).view(torch.float64)
    s = (m - 1.0).div_(m.add_(1.0))
    return _polynomial(_LN, s * s).mul_(s).add_(exponent.double().mul_(math.log(2.0)))


def _sqrt(x: Tensor) -> Tensor:
    """The correctly rounded root, in place. CUDA's is; on a CPU torch's own is not in one number of seventy."""
    if x.device.type == "cpu":
        np.sqrt(x.numpy(), out=x.numpy())
        return x
    return x.sqrt_()


def _cos_turns(v: Tensor) -> Tensor:
    """cos(2 pi v) of v in [0, 1] = sin(pi y / 2) with y = 4 (|v - 1/2| - 1/4); v is overwritten."""
    y = v.sub_(0.5).abs_().sub_(0.25).mul_(4.0)
    return _polynomial(_SIN, y * y).mul_(y)


def _polynomial(coefficients: tuple[float, ...], z: Tensor) -> Tensor:
    """Horner's rule."""
    value = z * coefficients[-1]
    for coefficient in coefficients[-2:0:-1]:
        value.add_(coefficient).mul_(z)
    return value.add_(coefficients[0])
