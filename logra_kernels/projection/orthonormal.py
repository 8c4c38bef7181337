"""Rows made orthonormal, the same bits on every device: Cholesky QR whose matrix products are exact.

    G = A A^T,   G = L L^T,   P = L^-1 A          P = Q^T of A^T = Q R with R's diagonal positive, R = L^T

Sums depend on their order, which every device's matrix product chooses for itself, unless no sum is rounded. So both
factors of a product are cut into slices of integers, so small that sums of their products stay below 2^53, where fp64
holds every integer (Ozaki et al. 2012):

    A := 2^-e (A_1 + 2^-b A_2)                    integers [k, d];  2^-(e + b) = 2^-36 at d = 14336
    G := 2^-2e (A_1 A_1^T + 2^-b (A_1 A_2^T + A_2 A_1^T))
    P := 2^-e (L_1 A_1 + 2^-c L_2 A_1 + 2^-b L_1 A_2)      row by row times a power of 2;   L^-1 ~ L_1 + 2^-c L_2

L^-1 is [k, k] and made on the host, of elementwise operations in fp64. Where A is square its rows can be nearly
dependent: P is then made orthonormal again, and a G too close to singular is shifted first (Fukaya et al. 2020).
"""

import math

import numpy as np
import torch
from torch import Tensor

from logra_kernels.projection.normal import PIECE

_EXACT = 53  # bits of fp64's integers
_ENOUGH = 0.125  # of (least pivot / greatest diagonal of G): P P^T = I within 2^-30 after such a pass
_SHIFT = 2.0**-36  # of G's greatest diagonal; pivots below this are rounding's


def orthonormalise(rows: Tensor, bound: float) -> Tensor:
    """The rows of Q^T in place of rows [k, d] fp64, which are of rank k and have no entry beyond `bound`."""
    squares = rows.shape[1] * bound**2
    while _turn(rows, bound, squares) < _ENOUGH:
        bound, squares = 1.0, 1.01
    return rows


def _turn(rows: Tensor, bound: float, squares: float) -> float:
    """A becomes L^-1 A; returns the least pivot of G over its greatest diagonal.

    Args:
        rows: A, [k, d] fp64.
        bound: No entry is beyond.
        squares: No row's sum of squares is beyond.
    """
    k, d = rows.shape
    # by Cauchy and Schwarz a sum of products is at most the product of the rows' norms, which are 2^26.5 at most
    scale = math.floor((_EXACT - math.log2(squares)) / 2 - 0.01)
    bits = math.floor((_EXACT - math.log2(d)) / 2 - 0.01) + 1
    pieces = rows.split(max(64, PIECE["cpu" if rows.device.type == "cpu" else "device"] // k), dim=1)
    square, cross = rows.new_zeros(k, k), rows.new_zeros(k, k)
    for piece in pieces:
        high, low = _slices(piece, scale, bits)
        square += product(high, high.T)
        cross += product(high, low.T)
    gram = (cross + cross.T).mul_(2.0**-bits).add_(square)
    inverse, pivots = _inverse_root(gram.cpu().numpy())
    turn = torch.from_numpy(inverse)
    power = torch.frexp(turn.abs().amax(1, keepdim=True)).exponent  # of each row, whose entries are below 2^power
    most = _EXACT - math.ceil(math.log2(k * bound)) - scale - 1
    turn_high, turn_low = (part.to(rows.device) for part in _slices(torch.ldexp(turn, -power), most, most))
    unit = torch.ldexp(torch.ones_like(turn[:, :1]), power - most).to(rows.device)
    for piece in pieces:
        high, low = _slices(piece, scale, bits)
        found = product(turn_low, high).mul_(2.0**-most)
        found.add_(product(turn_high, low).mul_(2.0**-bits)).add_(product(turn_high, high))
        torch.mul(found, unit, out=piece)
    return pivots


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b of integers in fp64, whose sums are at most 2^53: exact in whatever order a device sums them."""
    return a @ b


def _slices(x: Tensor, scale: int, bits: int) -> tuple[Tensor, Tensor]:
    """Integers (high, low) with 2^scale x = high + 2^-bits low but for low's rounding; |low| <= 2^(bits - 1)."""
    low = x * 2.0**scale
    high = low.round()
    return high, low.sub_(high).mul_(2.0**bits).round_()


def _inverse_root(gram: np.ndarray) -> tuple[np.ndarray, float]:
    """L^-1 of gram = L L^T, [k, k] fp64, and the least pivot over the greatest diagonal.

    Cholesky's elimination applied to the identity beside it. A gram with too small a pivot is shifted.
    """
    k, most = len(gram), float(gram.diagonal().max())
    product = np.empty((k, k))
    for shift in (0.0, _SHIFT * most):
        both, least = np.concatenate([gram + shift * np.eye(k), np.eye(k)], axis=1), most
        for i in range(k):
            least = min(least, float(both[i, i]))
            if least < _SHIFT / 2 * most:
                break
            row = both[i, i : i + k + 1]  # what is left of L^T's row and what has come of L^-1's
            row /= np.sqrt(row[0])
            below = both[i + 1 :, i + 1 : i + k + 1]
            below -= np.multiply(row[1 : k - i, None], row[1:], out=product[: k - i - 1])
        else:
            break
    return both[:, k:], least / most
