"""What Triton kernels of encoded rows share: codes as fp32 numbers, in registers.

CODE is `RowFormat.code`: 3 fp8, 4 int8, 5 int4, 6 int2, 7 sign. Codes are loaded as bytes (uint8).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from logra_kernels.ops._device import capability_of


@triton.jit
def field_of(byte, d, CODE: tl.constexpr):
    """The bits of number d, from the byte that holds it."""
    BITS: tl.constexpr = 8 if CODE < 5 else (4 if CODE == 5 else (2 if CODE == 6 else 1))
    if BITS == 8:
        return byte.to(tl.int32)
    return (byte.to(tl.int32) >> ((d % (8 // BITS)) * BITS)) & ((1 << BITS) - 1)


@triton.jit
def _pair(byte, first: tl.constexpr, second: tl.constexpr, MASK: tl.constexpr):
    return tl.join((byte >> first) & MASK, (byte >> second) & MASK)


@triton.jit
def _interleaved(parts):
    """[B, N, 2, .., 2] as [2 .. 2 B, N], the last sides of an entry one after the other."""
    EACH: tl.constexpr = parts.numel // (parts.shape[0] * parts.shape[1])
    each = tl.reshape(parts, [parts.shape[0], parts.shape[1], EACH])
    return tl.reshape(tl.permute(each, (0, 2, 1)), [parts.shape[0] * EACH, parts.shape[1]])


@triton.jit
def fields_of(byte, CODE: tl.constexpr):
    """The bits of every number of bytes [B, N], in order along the first side: [8 B / bits, N]. Each is loaded once."""
    fields = byte.to(tl.int32)
    if CODE == 5:
        fields = _interleaved(tl.join(fields & 15, fields >> 4))
    elif CODE == 6:
        fields = _interleaved(tl.join(_pair(fields, 0, 4, 3), _pair(fields, 2, 6, 3)))
    elif CODE == 7:
        even = tl.join(_pair(fields, 0, 4, 1), _pair(fields, 2, 6, 1))
        fields = _interleaved(tl.join(even, tl.join(_pair(fields, 1, 5, 1), _pair(fields, 3, 7, 1))))
    return fields


@triton.jit
def number_of(field, CODE: tl.constexpr, CONVERTS: tl.constexpr):
    """A code's bits as fp32: the code itself."""
    if CODE == 3 and CONVERTS:
        return field.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
    if CODE == 3:
        # fp16 has the same fields, its exponents 8 larger
        half = (((field & 0x7F) << 7) | ((field & 0x80) << 8)).to(tl.int16).to(tl.float16, bitcast=True)
        return tl.where((field & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)
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


def converts_f8(codes: Tensor) -> bool:
    """Whether the device of these codes has instructions that convert fp8."""
    return capability_of(codes) >= (8, 9)


def as_bytes(codes: Tensor) -> Tensor:
    """The same codes as uint8."""
    return codes.view(torch.uint8)
