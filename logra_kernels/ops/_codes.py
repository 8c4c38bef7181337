"""What Triton kernels of encoded rows share: codes as fp32 numbers, in registers.

CODE is `RowFormat.code`: 3 fp8, 4 int8, 5 int4, 6 int2, 7 sign. Codes are loaded as bytes (uint8).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def field_of(byte, d, CODE: tl.constexpr):
    """The bits of number d, from the byte that holds it."""
    BITS: tl.constexpr = 8 if CODE < 5 else (4 if CODE == 5 else (2 if CODE == 6 else 1))
    if BITS == 8:
        return byte.to(tl.int32)
    return (byte.to(tl.int32) >> ((d % (8 // BITS)) * BITS)) & ((1 << BITS) - 1)


@triton.jit
def fields_of(byte, CODE: tl.constexpr):
    """The bits of every number of bytes [B, N], in order along the first side: [8 B / bits, N]. Each is loaded once."""
    EACH: tl.constexpr = 1 if CODE < 5 else (2 if CODE == 5 else (4 if CODE == 6 else 8))
    if EACH == 1:
        return byte.to(tl.int32)
    BITS: tl.constexpr = 8 // EACH
    parts = byte.to(tl.int32)[:, None, :] >> (tl.arange(0, EACH) * BITS)[None, :, None]
    return tl.reshape(parts & ((1 << BITS) - 1), [byte.shape[0] * EACH, byte.shape[1]])


@triton.jit
def number_of(field, CODE: tl.constexpr):
    """A code's bits as fp32: the code itself."""
    if CODE == 3:
        size = field & 0x7F
        normal = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
        number = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)
        number = tl.where(size == 0x7F, float("nan"), number)
        return tl.where(field >= 0x80, -number, number)
    if CODE == 4:
        return ((field ^ 0x80) - 0x80).to(tl.float32)
    if CODE == 7:
        return (2 * field - 1).to(tl.float32)
    return (field - (8 if CODE == 5 else 2)).to(tl.float32)


@triton.jit
def integer_of(field, CODE: tl.constexpr):
    """A whole code's bits as int8: the code itself."""
    if CODE == 4:
        return ((field ^ 0x80) - 0x80).to(tl.int8)
    if CODE == 7:
        return (2 * field - 1).to(tl.int8)
    return (field - (8 if CODE == 5 else 2)).to(tl.int8)


def as_bytes(codes: Tensor) -> Tensor:
    """The same codes as uint8."""
    return codes.view(torch.uint8)
